"""RLDS: TFDS datasets whose examples are episodes with nested `steps`, read without TensorFlow.

config.data.path is the version directory (.../1.0.0) or the one above it, if it has one version.
config.data.fields, relative to a step, with a leading "/" to the episode (`keys.py` has the
syntax):

  state    default ("observation/state",)       image  default "observation/{camera}"
  action   default ("action",)                  task   default "language_instruction"; text:WORDS
  fps      steps per second; the data never say

All splits are read, in order; an episode's id is its split and its number in it: train/000012. The
last step is kept, although some datasets put no meaningful action there (`is_last`): cut it off
with "action[:-1]", "observation/state[:-1]" and so on for every key, if yours does.

A TFRecord file is a row of records, each framed by its length, the length's checksum, and its own
checksum behind it. Every record is read once, and checked, when the dataset is opened; its
images are decoded when asked for. Files in the array_record format are read too.
"""

import contextlib
import dataclasses
import functools
import operator
import os
import pathlib
import struct

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from google.protobuf import message

from lightwam_jax.data import tfds_metadata
from lightwam_jax.data.episodes import Problem
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats.stored import BadEpisode

_DEFAULTS = {
    "state": ("observation/state",),
    "action": ("action",),
    "image": "observation/{camera}",
    "task": "language_instruction",
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RldsEpisode(keys_lib.KeyedEpisode):
    """An `episodes.Episode` in a record file.

    Attributes beyond those of `KeyedEpisode`:
      record: (position in the file, bytes) of the record; (number, 0) in an array_record file.
    """

    record: tuple

    def encoded(self, path):
        """Returns the encoded images of the episode [n]."""
        try:
            return _parse(_record(self.file, self.record), {path: _BYTES})[path]
        except BadEpisode as error:
            raise self.error(path, error) from error


def read(config):
    """Returns (episodes, problems) of the dataset at config.data.path.

    Raises:
      ValueError: no TFDS dataset, several versions of one, a key that is no feature of it or not
        of the right type (the features are listed), or no config.data.fields.fps.
    """
    directory = _directory(config.data.path)
    source = _Source(config.data, directory)
    with tfds_metadata.naming(directory / "dataset_info.json"):
        info = tfds.builder_from_directory(str(directory)).info
        splits = [
            (name, list(zip(s.filepaths, s.shard_lengths))) for name, s in info.splits.items()
        ]
    found, problems = [], []
    total = sum(expected for _, shards in splits for _, expected in shards)
    if not total:
        raise ValueError(f"{directory / 'dataset_info.json'} lists no episode; copy it again")
    problems += _unlisted(
        directory, {os.fspath(path) for _, shards in splits for path, _ in shards}
    )
    with tqdm.tqdm(total=total, desc="columns", unit="episode") as bar:
        for name, shards in splits:
            first = 0
            for path, expected in shards:
                ids = [f"{name}/{first + i:06d}" for i in range(expected)]
                _read_shard(os.fspath(path), ids, source, found, problems, bar)
                first += expected
    return found, problems


def _unlisted(directory, listed):
    """Warnings about record files that dataset_info.json does not list."""
    message = "dataset_info.json lists no records of it in any split; it is not read"
    return [
        Problem.warning("unlisted file", "", file, message)
        for file in sorted(directory.iterdir())
        if (".tfrecord" in file.name or ".array_record" in file.name)
        and os.fspath(file) not in listed
    ]


def _read_shard(path, ids, source, found, problems, bar):
    records, lost = [], None
    try:
        for record in _records(path):
            records.append(record)
    except BadEpisode as error:
        lost = error
    announced = f"dataset_info.json speaks of {len(ids)} records"
    lost = lost or BadEpisode("missing record", f"the file ends after {len(records)}; {announced}")
    if len(records) > len(ids):
        reason = f"{announced}, {len(records)} are there; the rest has no id and is not read"
        problems.append(Problem.error("too many records", os.path.basename(path), path, reason))
    for number, name in enumerate(ids):
        bar.update()
        try:
            if number >= len(records):
                raise lost
            found.append(source.episode(path, records[number], name))
        except BadEpisode as error:
            reason = f"record {number}: {error}"
            problems.append(Problem.error(error.kind, name, path, reason))


def _directory(path):
    path = pathlib.Path(path)
    if (path / "features.json").exists():
        return path
    versions = sorted(file.parent for file in path.glob("*/features.json"))
    if len(versions) != 1:
        raise ValueError(
            f"config.data.path={str(path)!r} has no features.json and "
            f"{', '.join(v.name for v in versions) or 'no version of a dataset'} below it; give "
            "the directory of one version of a TFDS dataset, e.g. .../libero_10_no_noops/1.0.0"
        )
    return versions[0]


# --- the files -----------------------------------------------------------------------------------


def _records(path):
    """Yields where each record of a file lies; `BadEpisode`: why there are no more."""
    if not os.path.exists(path):
        raise BadEpisode("missing file", "its file is not there")
    if os.path.isdir(path):
        raise BadEpisode("damaged file", "a directory is in its place")
    if _is_array_record(path):
        try:
            reader = array_record_module.ArrayRecordReader(path)
            count = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError) as error:
            raise BadEpisode("damaged file", str(error)) from error
        yield from ((number, 0) for number in range(count))
        return
    position, end = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while position < end:
            file.seek(position)
            header = file.read(12)
            if len(header) < 12:
                raise BadEpisode("truncated file", f"the file ends in a header, at byte {end}")
            (length,) = struct.unpack("<Q", header[:8])
            if not _intact(header[:8], header[8:]):
                wrong = f"the length at byte {position} does not match its checksum"
                raise BadEpisode("damaged file", f"{wrong}; nothing behind it can be found")
            following = position + length + 16
            if following > end:
                reason = f"it ends at byte {following}, the file at {end}"
                raise BadEpisode("truncated file", reason)
            yield position + 12, length
            position = following


def _is_array_record(path):
    return ".array_record" in os.path.basename(path)


def _record(path, place):
    """The bytes of a record; `BadEpisode` if they are gone or do not match their checksum."""
    position, length = place
    try:
        if _is_array_record(path):
            with contextlib.closing(array_record_module.ArrayRecordReader(path)) as reader:
                return reader.read([position])[0]
        with open(path, "rb") as file:
            file.seek(position)
            data, checksum = file.read(length), file.read(4)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise BadEpisode("unreadable record", str(error)) from error
    if not _intact(data, checksum):
        wrong = f"the {length} bytes from {position} on do not match their checksum"
        raise BadEpisode("bad checksum", f"{wrong}; copy the file again")
    return data


def _intact(data, checksum):
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # as TFRecord stores it
    return checksum == struct.pack("<I", masked)


# --- the features --------------------------------------------------------------------------------

# An encoded image as it lies there: decoding all of them to use a few would take seconds.
_BYTES = tfds.features.Tensor(shape=(), dtype=np.object_)


class _Source:
    """The features of a dataset that the config asks for, and the episodes read with them."""

    def __init__(self, data, directory):
        with tfds_metadata.naming(directory / "features.json"):
            features = tfds.features.FeatureConnector.from_config(str(directory))
            features = dict(features.items())
        if "steps" not in features or not isinstance(features["steps"], tfds.features.Sequence):
            raise ValueError(
                f"{directory}/features.json has no nested steps, so it is not RLDS; its features: "
                f"{', '.join(features)}"
            )
        self.fps, self.channel_order = data.fields.fps, data.fields.channel_order
        if not self.fps:
            raise ValueError(
                "config.data.fields.fps is 0 and RLDS data do not say how many steps a second "
                "has; set it"
            )
        self.leaves, self._file = dict(_leaves(features)), directory / "features.json"
        self.keys = {
            name: getattr(data.fields, name) or default for name, default in _DEFAULTS.items()
        }
        numbers = lambda feature: _kind(feature) in "fiub" and len(feature.shape) < 2
        text = lambda feature: _kind(feature) == "O" and not feature.shape
        image = lambda feature: isinstance(feature, tfds.features.Image) and _kind(feature) == "u"
        wanted = [
            self._path(name, key, numbers, "numbers, [] or [d] in each step")
            for name in ("state", "action")
            for key in self.keys[name]
        ]
        if not self.keys["task"].startswith("text:"):
            wanted.append(self._path("task", self.keys["task"], text, "text"))
        self.columns = {path: self.leaves[path] for path in wanted}
        pattern = self.keys["image"]
        self.images = {camera: pattern.replace("{camera}", camera) for camera in data.cameras}
        for key in self.images.values():
            self._path("image", key, image, "a tfds.features.Image of uint8")

    def _path(self, name, key, fits, expected):
        """The path in the record of a key of the config, if its feature fits."""
        path, entry = _path(key), f"config.data.fields.{name}: "
        if path not in self.leaves:
            there = "\n  ".join(
                f"{f'/{p}'.removeprefix('/steps/')}: {feature!r}"
                for p, feature in self.leaves.items()
            )
            raise ValueError(f"{entry}{self._file} has no {key!r}; it has\n  {there}")
        if name != "task" and not path.startswith("steps/"):
            raise ValueError(f"{entry}{key} is not in the steps of an episode")
        if not fits(self.leaves[path]):
            raise ValueError(f"{entry}{key} is {self.leaves[path]!r}; expected {expected}")
        return path

    def episode(self, file, place, name):
        """Returns the `RldsEpisode` of a record; `BadEpisode` says why not."""
        columns = _parse(_record(file, place), self.columns)
        task, tasks = self.keys["task"], self.keys["task"].removeprefix("text:")
        if task == tasks:
            tasks = columns[_path(task)]
        if isinstance(tasks, list):
            tasks = tasks[keys_lib.parse(task).rows]
        steps = len(columns[_path(self.keys["action"][0])])
        state, action = (
            keys_lib.join(what, {k: np.asarray(columns[_path(k)]) for k in self.keys[what]})
            for what in ("state", "action")
        )
        return RldsEpisode(
            id=name,
            file=file,
            record=place,
            fps=self.fps,
            channel_order=self.channel_order,
            state=state,
            action=action,
            tasks=keys_lib.instructions(tasks),
            images={
                camera: (_path(key), range(steps)[keys_lib.parse(key).rows])
                for camera, key in self.images.items()
            },
        )


def _path(key):
    path = keys_lib.parse(key).path
    return path[1:] if path.startswith("/") else f"steps/{path}"


def _kind(feature):
    """The numpy kind of a feature; that of several together: "several"."""
    return "several" if isinstance(feature.np_dtype, dict) else np.dtype(feature.np_dtype).kind


def _leaves(feature, prefix=""):
    for name, inner in feature.items():
        if prefix == "" and name == "steps":
            inner = inner.feature
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from _leaves(inner, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", inner


def _parse(record, wanted):
    """{path: values} of the features `wanted` {path: feature} of a record; the rest is skipped."""
    tree = {}
    for path, feature in wanted.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = feature
    if "steps" in tree:
        tree["steps"] = tfds.features.Sequence(tree["steps"])
    try:
        values = tfds.features.FeaturesDict(tree).deserialize_example_np(record)
    except (message.DecodeError, ValueError, LookupError, AttributeError) as error:
        raise BadEpisode(
            "unreadable record", f"it has no readable {', '.join(wanted)}: {error}"
        ) from error
    return {path: functools.reduce(operator.getitem, path.split("/"), values) for path in wanted}
