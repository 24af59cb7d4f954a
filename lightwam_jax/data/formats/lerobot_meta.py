"""What a LeRobot dataset says of itself: meta/ of v2.0, v2.1 and v3.0."""

import json
import pathlib
import re
import typing

import pyarrow as pa
import pyarrow.parquet as pq

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE, ACTION = ("observation.state",), ("action",)  # where config.data.fields names none
IMAGE = "observation.images.{camera}"
INDEX = ("timestamp", "frame_index", "episode_index", "task_index")  # columns of every dataset


class Video(typing.NamedTuple):
    """Where the frames of an episode begin: a file, and seconds into it."""

    file: pathlib.Path
    begin: float


class Listed(typing.NamedTuple):
    """An episode as meta/ describes it: its number, its steps and its files."""

    index: int
    length: int
    data: pathlib.Path
    videos: dict  # {feature: `Video`}
    seconds: dict  # {feature: duration of the video}, v3.0 only

    @property
    def id(self):
        """The id of the episode."""
        return episode_id(self.index)


class LeRobotInfo(typing.NamedTuple):
    """A dataset whose features are those that a config asks for."""

    root: pathlib.Path
    info: dict  # meta/info.json
    state: tuple  # features
    action: tuple
    cameras: dict  # {camera: feature}
    needed: tuple  # the features of config.data.cameras
    tasks: dict  # {task_index: instruction}

    def listed(self):
        """Returns the `Listed` episodes in the order of their numbers.

        Raises:
          ValueError: a file of meta/ is missing, broken or incomplete.
        """
        found = _packed(self) if self.info["codebase_version"] == "v3.0" else _single(self)
        return sorted(found, key=lambda entry: entry.index)

    def videos(self):
        """Returns the features that are videos."""
        features = self.info["features"]
        return [key for key in self.cameras.values() if features[key]["dtype"] == "video"]

    def file(self, template, **place):
        """Returns the path of a file from its template in info.json, e.g. "data_path"."""
        return self.root / self.info[template].format(**place)


def episode_id(index):
    """Returns the id of episode number `index`."""
    return f"episode_{index:06d}"


def open_set(config):
    """Returns the `LeRobotInfo` of config.data.path.

    Raises:
      ValueError: not a dataset of a known version, or one that lacks what config.data.fields or
        config.data.cameras name; the message lists what it has.
    """
    root, fields = pathlib.Path(config.data.path), config.data.fields
    file = root / "meta" / "info.json"
    info = _info(root, file)
    if fields.episodes or fields.task or fields.channel_order != "rgb":
        raise ValueError(
            "config.data.fields.episodes, task and channel_order do nothing for LeRobot data, "
            "whose meta/ has all that; remove them"
        )
    if fields.fps and fields.fps != info["fps"]:
        raise ValueError(
            f"config.data.fields.fps={fields.fps:g}, but {file} says {info['fps']:g}; "
            "remove the key"
        )
    state, action = fields.state or STATE, fields.action or ACTION
    for key in (*state, *action, *INDEX):
        if not re.match("float|int|uint|bool", info["features"].get(key, {}).get("dtype", "")):
            raise ValueError(
                f"{file} has no feature {key!r} of numbers; correct config.data.fields. "
                f"It has {_names(info['features'])}"
            )
    needed, others = _cameras(info, config, file)
    tasks = _tasks(root, info["codebase_version"])
    return LeRobotInfo(root, info, state, action, others | needed, tuple(needed.values()), tasks)


def _info(root, file):
    """The content of meta/info.json, if the dataset is of a version that can be read."""
    if not file.exists():
        raise ValueError(
            f"config.data.path={str(root)!r} has no meta/info.json: it is not a LeRobot dataset, "
            "or its writing was interrupted"
        )
    info = _json(file.read_text(encoding="utf-8"), file)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{file}: codebase_version is {version!r}; readable are {', '.join(VERSIONS)}: "
            "convert the dataset with LeRobot's own scripts"
        )
    _require(info, file, "fps", "features", "data_path", *["chunks_size"] * (version != "v3.0"))
    if any(f["dtype"] == "video" for f in info["features"].values()) and not info.get("video_path"):
        raise ValueError(f"{file} has features of dtype video, but no video_path")
    return info


def _cameras(info, config, file):
    """Returns {camera: feature} of the cameras that the config names, and of all there are."""
    pattern = config.data.fields.image or IMAGE
    images = [
        key
        for key, feature in info["features"].items()
        if feature["dtype"] in ("video", "image") and not _is_depth(feature)
    ]
    head, mark, tail = pattern.partition("{camera}")
    if not mark and len(config.data.cameras) > 1:
        raise ValueError(
            f"config.data.fields.image={pattern!r} is one feature for all of config.data.cameras; "
            "it needs {camera} where their names stand"
        )
    needed = {camera: pattern.replace("{camera}", camera) for camera in config.data.cameras}
    for camera, key in needed.items():
        if key not in images:
            raise ValueError(
                f"{file} has no feature {key!r} of colour images (camera {camera!r}); correct "
                "config.data.cameras or config.data.fields.image. It has "
                f"{_names(info['features'])}"
            )
    found = [key for key in images if mark and key.startswith(head) and key.endswith(tail)]
    return needed, {key[len(head) : len(key) - len(tail)]: key for key in found}


def _is_depth(feature):
    known = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(known.get("is_depth_map") or known.get("video.is_depth_map"))


def _names(features):
    return ", ".join(
        f"{key} ({feature['dtype']} {list(feature['shape'])})" for key, feature in features.items()
    )


def _json(text, place):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); copy it again") from error


def _require(entry, place, *keys):
    absent = [key for key in keys if key not in entry]
    if absent:
        raise ValueError(f"{place} lacks {', '.join(absent)}; it has {', '.join(entry)}")
    return entry


def _json_lines(file, *keys):
    """Yields the dicts of a JSON-lines file, each with `keys`."""
    if not file.exists():
        raise ValueError(f"{file} does not exist; the dataset cannot be read without it")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            place = f"{file}, line {number}"
            yield _require(_json(line, place), place, *keys)


def _rows(file, *keys, skip=()):
    """Returns the dicts of a parquet file, each with `keys`; `skip`: beginnings of column names."""
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            table = parquet.read(columns=[n for n in names if not n.startswith(skip)])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read, nor the dataset without it: {error}") from error
    _require(dict.fromkeys(names), file, *keys)
    return table.to_pylist()


def _tasks(root, version):
    if version != "v3.0":
        lines = _json_lines(root / "meta" / "tasks.jsonl", "task_index", "task")
        return {line["task_index"]: line["task"] for line in lines}
    rows = _rows(root / "meta" / "tasks.parquet", "task_index")
    # pandas wrote the instructions as its index, which does not always have a name.
    return {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in rows}


def _single(data):
    """Yields the `Listed` of v2.0 and v2.1, where the number of an episode names its files."""
    for line in _json_lines(data.root / "meta" / "episodes.jsonl", "episode_index", "length"):
        index = line["episode_index"]
        at = {"episode_chunk": index // data.info["chunks_size"], "episode_index": index}
        videos = {
            key: Video(data.file("video_path", video_key=key, **at), 0.0) for key in data.videos()
        }
        yield Listed(index, line["length"], data.file("data_path", **at), videos, {})


def _packed(data):
    """Yields the `Listed` of v3.0, where each row says where it lies, camera by camera."""
    directory = data.root / "meta" / "episodes"
    files = sorted(directory.glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{directory} has no parquet file; copy it again")
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns = {key: [f"videos/{key}/{part}" for part in parts] for key in data.videos()}
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    needed += [name for names in columns.values() for name in names]
    for row in (row for file in files for row in _rows(file, *needed, skip="stats/")):
        videos, seconds = {}, {}
        for key, names in columns.items():
            chunk, number, begin, end = (row[name] for name in names)
            if end is None:  # recorded, but never encoded: named as what is missing
                videos[key] = Video(data.root / "videos" / key / "not encoded", 0.0)
                continue
            place = {"chunk_index": int(chunk), "file_index": int(number)}
            videos[key] = Video(data.file("video_path", video_key=key, **place), begin)
            seconds[key] = end - begin
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        file = data.file("data_path", **place)
        yield Listed(row["episode_index"], row["length"], file, videos, seconds)
