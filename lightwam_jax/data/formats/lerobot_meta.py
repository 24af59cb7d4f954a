"""What a LeRobot data set says of itself: meta/ of v2.0, v2.1 and v3.0."""

import json
import pathlib
import re
import typing

import pyarrow as pa
import pyarrow.parquet as pq

from lightwam_jax.data import episodes

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE, ACTION = ("observation.state",), ("action",)  # where config.data.fields names none
IMAGE = "observation.images.{camera}"
INDEX = ("timestamp", "frame_index", "episode_index", "task_index")  # columns of every data set


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
    """A data set whose features are those that a config asks for."""

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


def episode_id(index):
    """Returns the id of episode number `index`."""
    return f"episode_{index:06d}"


def problem(kind, index, file, message):
    """Returns the `Problem` that makes episode number `index` unreadable."""
    return episodes.Problem("error", kind, episode_id(index), str(file), None, message)


def open_set(config):
    """Returns the `DataSet` at config.data.path.

    Raises:
      ValueError: not a data set of a known version, or one that lacks what config.data.fields or
        config.data.cameras name; the message lists what it has.
    """
    root, fields = pathlib.Path(config.data.path), config.data.fields
    file = root / "meta" / "info.json"
    if not file.exists():
        raise ValueError(
            f"config.data.path={str(root)!r} has no meta/info.json: it is not a "
            "LeRobot data set, or its writing was interrupted"
        )
    info = _json(file.read_text(), file)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{file}: codebase_version is {version!r}; readable are "
            f"{', '.join(VERSIONS)}: convert the data set with LeRobot's own scripts"
        )
    _require(
        info, file, "fps", "features", "data_path", *(() if version == "v3.0" else ("chunks_size",))
    )
    if any(f["dtype"] == "video" for f in info["features"].values()) and not info.get("video_path"):
        raise ValueError(f"{file} has features of dtype video, but no video_path")
    if fields.episodes or fields.task or fields.channel_order != "rgb":
        raise ValueError(
            "config.data.fields.episodes, task and channel_order do nothing for LeRobot "
            "data, whose meta/ has all that; remove them"
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
                f"{file} has no feature {key!r} of numbers; correct config.data.fields"
                f". It has {_names(info['features'])}"
            )
    needed, others = _cameras(info, config, file)
    return LeRobotInfo(
        root, info, state, action, others | needed, tuple(needed.values()), _tasks(root, version)
    )


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
            f"config.data.fields.image={pattern!r} is one feature for all of "
            f"config.data.cameras; it needs {{camera}} where their names stand"
        )
    needed = {camera: pattern.replace("{camera}", camera) for camera in config.data.cameras}
    for camera, key in needed.items():
        if key not in images:
            raise ValueError(
                f"{file} has no feature {key!r} of colour images (camera "
                f"{camera!r}); correct config.data.cameras or config.data.fields."
                f"image. It has {_names(info['features'])}"
            )
    return needed, {
        key[len(head) : len(key) - len(tail)]: key
        for key in images
        if mark and key.startswith(head) and key.endswith(tail)
    }


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
        raise ValueError(f"{file} does not exist, and the data set cannot be read without it")
    for number, line in enumerate(file.read_text().splitlines(), 1):
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
        raise ValueError(
            f"{file} cannot be read, and the data set not without it: {error}"
        ) from error
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
    """Returns the `Listed` of v2.0 and v2.1, where the number of an episode names its files."""
    lines = _json_lines(data.root / "meta" / "episodes.jsonl", "episode_index", "length")
    out = []
    for line in lines:
        index = line["episode_index"]
        at = {"episode_chunk": index // data.info["chunks_size"], "episode_index": index}
        videos = {
            key: Video(data.root / data.info["video_path"].format(video_key=key, **at), 0.0)
            for key in _video_keys(data)
        }
        out.append(
            Listed(
                index, line["length"], data.root / data.info["data_path"].format(**at), videos, {}
            )
        )
    return out


def _packed(data):
    """Returns the `Listed` of v3.0, where each row says where it lies, camera by camera."""
    files = sorted((data.root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{data.root / 'meta' / 'episodes'} has no parquet file; copy it again")
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    keys = _video_keys(data)
    needed = [f"videos/{key}/{part}" for key in keys for part in parts]
    out = []
    for file in files:
        for row in _rows(
            file,
            "episode_index",
            "length",
            "data/chunk_index",
            "data/file_index",
            *needed,
            skip="stats/",
        ):
            videos, seconds = {}, {}
            for key in keys:
                chunk, number, begin, end = (row[f"videos/{key}/{part}"] for part in parts)
                if end is None:  # recorded, but never encoded: named as what is missing
                    videos[key] = Video(data.root / "videos" / key / "not encoded", 0.0)
                    continue
                path = data.info["video_path"].format(
                    video_key=key, chunk_index=int(chunk), file_index=int(number)
                )
                videos[key], seconds[key] = Video(data.root / path, begin), end - begin
            path = data.info["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
            out.append(
                Listed(row["episode_index"], row["length"], data.root / path, videos, seconds)
            )
    return out


def _video_keys(data):
    return [key for key in data.cameras.values() if data.info["features"][key]["dtype"] == "video"]
