"""What a LeRobot dataset says of itself: meta/info.json and the list of features it names.

The episodes are listed by `lerobot_listed.py`, the instructions by `lerobot_tasks.py`.
"""

import glob
import math
import pathlib
import re
import typing

from lightwam_jax.data.formats import checked, lerobot_tasks
from lightwam_jax.data.formats import keys as keys_lib

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE, ACTION = ("observation.state",), ("action",)  # where config.data.fields names none
IMAGE = "observation.images.{camera}"
INDEX = ("timestamp", "frame_index", "episode_index", "task_index")  # columns of every dataset
_PARTS = {"v3.0": ("chunk_index", "file_index")}  # of the paths in info.json
_OLD_PARTS = ("episode_chunk", "episode_index")


class LeRobotInfo(typing.NamedTuple):
    """A dataset whose features are those that a config asks for."""

    root: pathlib.Path
    info: dict  # meta/info.json; "features" holds those with a dtype
    state: tuple  # features, cut as config.data.fields says
    action: tuple
    cameras: dict  # {camera: feature}
    needed: tuple  # the features of config.data.cameras
    tasks: dict  # {task_index: instruction}
    task_faults: tuple = ()  # messages about instructions that cannot be used
    tolerance_s: float = 0.0  # config.data.tolerance_s

    @property
    def packed(self):
        """Whether several episodes lie in a file, as in v3.0."""
        return self.info["codebase_version"] == "v3.0"

    def videos(self):
        """Returns the features that are videos."""
        features = self.info["features"]
        return [key for key in self.cameras.values() if features[key]["dtype"] == "video"]

    def file(self, template, **place):
        """Returns the path of a file from its template in info.json, e.g. "data_path"."""
        return self.root / self.info[template].format(**place)

    def data_files(self):
        """Returns the set of all data files there are, whatever meta/ lists."""
        parts = re.split(r"\{[^}]*\}", self.info["data_path"])
        return set(self.root.glob("*".join(glob.escape(part) for part in parts)))


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
    if fields.fps and not math.isclose(fields.fps, info["fps"], rel_tol=1e-5):
        raise ValueError(
            f"config.data.fields.fps={fields.fps:g}, but {file} says {info['fps']:g}; "
            "remove the key"
        )
    state, action = fields.state or STATE, fields.action or ACTION
    for key in (*state, *action):
        _check_numbers(key, info["features"], file)
    needed, others = _cameras(info, config, file)
    cameras = others | needed
    if not _has_videos(info, file, needed.values()):
        cameras = {c: k for c, k in cameras.items() if info["features"][k]["dtype"] != "video"}
    tasks, faults = lerobot_tasks.read(root, info["codebase_version"])
    more = tuple(faults), config.data.tolerance_s
    return LeRobotInfo(root, info, state, action, cameras, tuple(needed.values()), tasks, *more)


def _info(root, file):
    """The content of meta/info.json, if the dataset is of a version that can be read."""
    if not file.exists():
        raise ValueError(
            f"config.data.path={str(root)!r} has no meta/info.json: it is not a LeRobot dataset, "
            "or its writing was interrupted"
        )
    entry = checked.json_object(file)
    version = entry.values.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{file}: codebase_version is {version!r}; readable are {', '.join(VERSIONS)}: "
            "convert the dataset with LeRobot's own scripts"
        )
    _check_layout(root, version, file)
    info = {**entry.values, "fps": entry.number("fps", above=0)}
    # A feature that nobody asks for may be described as badly as it likes.
    features = entry.entry("features").values
    info["features"] = {
        key: {"dtype": "", **feature} | {"dtype": str(feature.get("dtype") or "")}
        for key, feature in features.items()
        if isinstance(feature, dict)
    }
    _check_template(entry, "data_path", _PARTS.get(version, _OLD_PARTS))
    if version != "v3.0":
        used = "{episode_chunk" in f"{info['data_path']} {info.get('video_path')}"
        info["chunks_size"] = entry.whole("chunks_size", least=1) if used else 1000
    return info


def _check_layout(root, version, file):
    """Raises ValueError where the files lie as in another version than info.json names."""
    there = {
        "v3.0": (root / "meta" / "episodes").is_dir(),
        "v2.1": (root / "meta" / "episodes.jsonl").exists(),
    }
    named, other = ("v3.0", "v2.1") if version == "v3.0" else ("v2.1", "v3.0")
    if there[other] and not there[named]:
        names = {"v3.0": "meta/episodes/", "v2.1": "meta/episodes.jsonl"}
        raise ValueError(
            f"{file}: codebase_version is {version!r}, but the files lie as in {other}: there is "
            f"{names[other]} and no {names[named]}. Correct codebase_version, or convert the "
            "dataset with LeRobot's own script"
        )


def _check_template(entry, key, parts):
    """Raises `Wrong` where a path in info.json is no path with these parts."""
    template = entry.text(key)
    expected = f"a path below the dataset with {{{parts[0]}}} and {{{parts[1]}}}"
    try:
        path = pathlib.PurePosixPath(template.format(**dict.fromkeys(parts, 0), video_key="key"))
    except (LookupError, ValueError, AttributeError, TypeError):
        raise entry.wrong(key, expected) from None
    if path.is_absolute() or ".." in path.parts:
        raise entry.wrong(key, expected)


def _has_videos(info, file, needed):
    """Whether video_path can be used; `Wrong` if it cannot, and one of the features needs it."""
    try:
        parts = _PARTS.get(info["codebase_version"], _OLD_PARTS)
        _check_template(checked.Entry(info, str(file)), "video_path", parts)
        return True
    except checked.Wrong:
        if any(info["features"][key]["dtype"] == "video" for key in needed):
            raise
        return False


def _check_numbers(text, features, file):
    """Raises ValueError where a key of config.data.fields names no feature of numbers."""
    key = keys_lib.parse(text)
    if key.rows != slice(None):
        raise ValueError(
            f"config.data.fields has {text!r}; the rows of a LeRobot column belong to its times "
            f"and images and cannot be cut, its dimensions can: '{key.path}[:, :7]'"
        )
    dtype = features.get(key.path, {}).get("dtype")
    if dtype == "":
        raise ValueError(
            f"{file}: features.{key.path} has no dtype; expected the type of its numbers, e.g. "
            "float32"
        )
    if not re.match("float|int|uint|bool", dtype or ""):
        raise ValueError(
            f"{file} has no feature {key.path!r} of numbers; correct config.data.fields. "
            f"It has {_names(features)}"
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
    known = {}
    for key in ("info", "video_info"):
        known |= feature[key] if isinstance(feature.get(key), dict) else {}
    return bool(known.get("is_depth_map") or known.get("video.is_depth_map"))


def _names(features):
    return ", ".join(
        f"{key} ({feature['dtype'] or 'no dtype'} {feature.get('shape', 'no shape')})"
        for key, feature in features.items()
    )
