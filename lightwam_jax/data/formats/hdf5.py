"""HDF5 recordings of any layout: config.data.fields says where an episode keeps what.

  episodes  pattern of the groups that are episodes: "data/demo_*"; "": each file is one
  state, action, image   keys as in `data/formats/keys.py`; image with {camera}. Images are uint8
            [n, H, W, 3] or encoded: n byte strings (zero-padded or not) or uint8 [n, bytes]
  task      where the instruction is:
              text:fold the towel            these words, for all episodes
              PATH                           a dataset: one text, or one per step
              PATH@NAME                      an attribute; @NAME of the episode itself
              file:../notes/{name}.txt       a file, relative to the recording; {name}: the
                                             recording's name without suffix
            If it is JSON, a JSON pointer follows: /data@problem_info#/language_instruction,
            file:../instructions/{name}.json#/seen/0. {episode} is the name of the group.
  fps       steps per second, unless an attribute "fps" of the episode or a group above it says

Keys are relative to the episode; with a leading "/" to the file.
"""

import collections
import fnmatch
import json
import os
import pathlib
import re
import threading

import h5py
import numpy as np
import tqdm

from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats.keys import BadEpisode

_OPEN_FILES = 16  # per thread
_SHOWN = 40  # entries of a file that an error lists
_DAMAGE = (OSError, KeyError, RuntimeError)  # what h5py raises for damaged files
# Problems that mean, if every episode has one, that it is the config that is wrong.
_MISFIT = ("no episode", "missing dataset", "missing task", "missing fps", "wrong type")


class Hdf5Episode(keys_lib.KeyedEpisode):
    """An `episodes.Episode` in an HDF5 file."""

    def stored(self, path):
        """Returns the dataset of the images."""
        try:
            return _opened(self.file)[path]
        except _DAMAGE as error:
            raise self.error(path, error) from error


class _OpenFiles(threading.local):
    def __init__(self):
        self.files = collections.OrderedDict()


_OPEN = _OpenFiles()


def _opened(path):
    """The open file of this thread; a forked process opens its own."""
    files, key = _OPEN.files, (os.getpid(), path)
    if key not in files:
        if len(files) >= _OPEN_FILES:
            files.popitem(last=False)[1].close()
        files[key] = h5py.File(path, "r")
    files.move_to_end(key)
    return files[key]


def read(config):
    """Returns (episodes, problems) of all *.hdf5 and *.h5 below config.data.path.

    Ids are the paths of the files below it, without suffix, and of the groups in them. The order
    is natural: demo_2 comes before demo_10.

    Raises:
      ValueError: no file, a key that is missing or malformed, or keys that fit no episode at all;
        lists what the first file holds.
    """
    root, keys = pathlib.Path(config.data.path), config.data.fields
    files = sorted(
        (path for path in root.rglob("*") if path.suffix.lower() in (".hdf5", ".h5")),
        key=lambda path: _natural(path.relative_to(root).as_posix()),
    )
    if not files:
        raise ValueError(f"no *.hdf5 or *.h5 file below config.data.path={str(root)!r}")
    missing = [name for name in ("state", "action", "image", "task") if not getattr(keys, name)]
    if missing:
        raise ValueError(
            f"config.data.fields.{', '.join(missing)} must say where an HDF5 episode "
            f"keeps it (lightwam_jax/data/formats/hdf5.py explains how). {_contents(files)}"
        )
    for key in (*keys.state, *keys.action, keys.image):
        keys_lib.parse(key)
    found, problems = [], []
    for path in tqdm.tqdm(files, desc="columns", unit="file"):
        name = path.relative_to(root).with_suffix("").as_posix()
        try:
            with h5py.File(path, "r") as file:
                _read_file(file, path, name, config.data, found, problems)
        except _DAMAGE as error:
            problems.append(_problem("unreadable file", name, path, error))
    misfits = [problem for problem in problems if problem.kind in _MISFIT]
    if misfits and not found:
        raise ValueError(
            f"config.data.fields fits no episode below {root}; the first: "
            f"{misfits[0].line()}. {_contents(files)}"
        )
    return found, problems


def _read_file(file, path, name, data, found, problems):
    groups = _matching(file, data.fields.episodes)
    if not groups:
        problems.append(
            _problem(
                "no episode",
                name,
                path,
                f"it has no group {data.fields.episodes!r} (config.data.fields.episodes)",
            )
        )
    for group in groups:
        episode = f"{name}/{group}" if group else name
        try:
            found.append(_episode(file[group or "/"], path, episode, data))
        except BadEpisode as error:
            problems.append(_problem(error.kind, episode, path, error))
        except _DAMAGE as error:
            problems.append(_problem("unreadable file", episode, path, error))


def _problem(kind, episode, path, message):
    return episodes_lib.Problem("error", kind, episode, str(path), None, str(message))


def _natural(text):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _matching(file, pattern):
    """Paths of the groups that a pattern like "data/demo_*" names; [""] for the pattern ""."""
    paths = [""]
    for part in filter(None, pattern.split("/")):
        paths = [
            f"{path}/{name}".strip("/")
            for path in paths
            for name in sorted(file[path or "/"], key=_natural)
            if fnmatch.fnmatchcase(name, part)
            and isinstance(file.get(f"{path}/{name}"), h5py.Group)
        ]
    return paths


def _episode(group, path, name, data):
    keys = data.fields
    return Hdf5Episode(
        id=name,
        file=str(path),
        fps=_fps(group, keys.fps),
        channel_order=keys.channel_order,
        tasks=keys_lib.instructions(_instruction(group, path, keys.task)),
        state=keys_lib.join("state", {key: _dataset(group, key)[()] for key in keys.state}),
        action=keys_lib.join("action", {key: _dataset(group, key)[()] for key in keys.action}),
        images={
            camera: _rows(group, keys.image.replace("{camera}", camera)) for camera in data.cameras
        },
    )


def _dataset(group, key):
    path = keys_lib.parse(key).path
    dataset = group.get(path)
    if not isinstance(dataset, h5py.Dataset):
        raise BadEpisode(
            "missing dataset",
            f"{path} is not there; there are {', '.join(_entries(group)[:_SHOWN])}",
        )
    return dataset


def _rows(group, key):
    """(absolute path, range of rows) of one camera's images."""
    dataset = _dataset(group, key)
    array = dataset.dtype == np.uint8 and (
        dataset.ndim == 2 or (dataset.ndim == 4 and dataset.shape[-1] == 3)
    )
    strings = dataset.ndim == 1 and (
        dataset.dtype.kind == "V"
        or h5py.check_string_dtype(dataset.dtype)
        or h5py.check_vlen_dtype(dataset.dtype) == np.uint8
    )
    if not array and not strings:
        raise BadEpisode(
            "wrong type",
            f"{dataset.name} is {dataset.dtype} {list(dataset.shape)}; "
            "expected images: uint8 [n, H, W, 3], or encoded as n byte strings or uint8 "
            "[n, bytes]",
        )
    return dataset.name, range(len(dataset))[keys_lib.parse(key).rows]


def _fps(group, fps):
    stated, node = None, group
    while stated is None:
        stated = node.attrs.get("fps")
        if node.name == "/":
            break
        node = node.parent
    if stated is None and not fps:
        raise BadEpisode(
            "missing fps", "nothing says how many steps a second has; set config.data.fields.fps"
        )
    if stated is None:
        return fps
    if np.ndim(stated) or np.asarray(stated).dtype.kind not in "fiu" or (fps and stated != fps):
        raise BadEpisode(
            "wrong fps",
            f"the file says {stated!r}, config.data.fields.fps is {fps}; "
            "correct it, or set it to 0 to believe the file",
        )
    return float(stated)


def _instruction(group, path, key):
    """What the key names: a text or an array of texts; see the top of this file."""
    kind, _, rest = key.partition(":")
    if kind == "text":
        return rest.strip()
    names = {"{name}": path.stem, "{episode}": group.name.rpartition("/")[2]}
    for name, value in names.items():
        key, rest = key.replace(name, value), rest.replace(name, value)
    place, _, pointer = (rest if kind == "file" else key).partition("#")
    if kind == "file":
        file = path.parent / place
        try:
            value = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadEpisode("missing task", f"{file} cannot be read: {error}") from error
    elif "@" in place:
        inside, _, attribute = place.partition("@")
        node = group.get(inside or ".")
        if node is None or attribute not in node.attrs:
            raise BadEpisode(
                "missing task",
                f"{place} is not there; there are {', '.join(_entries(group.file)[:_SHOWN])}",
            )
        value = node.attrs[attribute]
    else:
        value = _dataset(group, place)[()]
        if np.ndim(value):
            value = value[keys_lib.parse(place).rows]
    return _pointed(value, pointer, key) if pointer else value


def _pointed(text, pointer, key):
    """The text at a JSON pointer; LIBERO's, spelt as a list of characters, is joined."""
    value = None
    try:
        value = json.loads(text)
        for part in pointer.strip("/").split("/"):
            value = value[int(part) if isinstance(value, list) else part]
    except (ValueError, LookupError, TypeError) as error:
        raise BadEpisode(
            "missing task",
            f"{key} leads nowhere ({error!r}); it points into {str(value or text)[:200]}",
        ) from None
    if isinstance(value, list) and all(isinstance(v, str) and len(v) == 1 for v in value):
        return "".join(value)
    if not isinstance(value, str):
        raise BadEpisode(
            "missing task",
            f"{key} is {str(value)[:200]}; expected one text: point to it, e.g. with /0 at the end",
        )
    return value


def _entries(node):
    """Paths of all datasets below a group, and of attributes as PATH@NAME."""
    found = [f"@{name}" for name in node.attrs]

    def visit(path, item):
        if isinstance(item, h5py.Dataset):
            found.append(f"{path} ({item.dtype} {list(item.shape)})")
        found.extend(f"{path}@{name}" for name in item.attrs)

    node.visititems(visit)
    return found


def _contents(files):
    """What the first readable file holds, for messages."""
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                lines = _entries(file)
        except _DAMAGE:
            continue
        more = [f"... and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)
        return "\n  ".join([f"{path} holds:", *lines[:_SHOWN], *more])
    return "None of the files can be opened."
