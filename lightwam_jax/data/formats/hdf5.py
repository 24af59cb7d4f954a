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
import contextlib
import fnmatch
import json
import os
import pathlib
import re
import threading

import h5py
import numpy as np
import tqdm

from lightwam_jax.data.episodes import Problem
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats.keys import no_task
from lightwam_jax.data.formats.stored import BadEpisode

_OPEN_FILES = 16  # per thread
_SHOWN = 40  # entries of a file that an error lists
_DAMAGE = (OSError, KeyError, RuntimeError)  # what h5py raises for damaged files
# If every episode has one of these problems, the config is wrong and not the data.
_MISFIT = ("no episode", "missing dataset", "missing task", "missing fps", "wrong type")


class Hdf5Episode(keys_lib.KeyedEpisode):
    """An `episodes.Episode` in an HDF5 file."""

    def encoded(self, path):
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
    root, fields = pathlib.Path(config.data.path), config.data.fields
    files = [path for path in root.rglob("*") if path.suffix.lower() in (".hdf5", ".h5")]
    files.sort(key=lambda path: _natural(path.relative_to(root).as_posix()))
    if not files:
        raise ValueError(f"no *.hdf5 or *.h5 file below config.data.path={str(root)!r}")
    missing = [name for name in ("state", "action", "image", "task") if not getattr(fields, name)]
    if missing:
        raise ValueError(
            f"config.data.fields.{', '.join(missing)} must say where an HDF5 episode keeps it "
            f"(lightwam_jax/data/formats/hdf5.py explains how). {_contents(files)}"
        )
    for key in (*fields.state, *fields.action, fields.image):
        keys_lib.parse(key)
    found, problems = [], []
    for path in tqdm.tqdm(files, desc="columns", unit="file"):
        name = path.relative_to(root).with_suffix("").as_posix()
        with _noting(problems, name, path), h5py.File(path, "r") as file:
            groups = _matching(file, fields.episodes)
            if not groups:
                wanted = f"{fields.episodes!r} (config.data.fields.episodes)"
                raise BadEpisode("no episode", f"it has no group {wanted}")
            for group in groups:
                episode = f"{name}/{group}" if group else name
                with _noting(problems, episode, path):
                    found.append(_episode(file[group or "/"], path, episode, config.data))
    misfits = [problem for problem in problems if problem.kind in _MISFIT]
    if misfits and not found:
        raise ValueError(
            f"config.data.fields fits no episode below {root}; the first: "
            f"{misfits[0].line()}. {_contents(files)}"
        )
    return found, problems


@contextlib.contextmanager
def _noting(problems, name, path):
    """Makes a `Problem` of what is wrong with a file or an episode."""
    try:
        yield
    except BadEpisode as error:
        problems.append(Problem.error(error.kind, name, path, str(error)))
    except _DAMAGE as error:
        problems.append(Problem.error("unreadable file", name, path, str(error)))


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
    fields = data.fields
    cameras = {camera: fields.image.replace("{camera}", camera) for camera in data.cameras}
    return Hdf5Episode(
        id=name,
        file=str(path),
        fps=_fps(group, fields.fps),
        channel_order=fields.channel_order,
        tasks=keys_lib.instructions(_instruction(group, path, fields.task)),
        state=keys_lib.join("state", {key: _dataset(group, key)[()] for key in fields.state}),
        action=keys_lib.join("action", {key: _dataset(group, key)[()] for key in fields.action}),
        images={camera: _images(group, key) for camera, key in cameras.items()},
    )


def _dataset(group, key):
    path = keys_lib.parse(key).path
    dataset = group.get(path)
    if not isinstance(dataset, h5py.Dataset):
        raise BadEpisode("missing dataset", _not_there(path, group))
    return dataset


def _not_there(path, group):
    return f"{path} is not there; there are {', '.join(_entries(group)[:_SHOWN])}"


def _images(group, key):
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
            f"{dataset.name} is {dataset.dtype} {list(dataset.shape)}; expected images: uint8 "
            "[n, H, W, 3], or encoded as n byte strings or uint8 [n, bytes]",
        )
    return dataset.name, range(len(dataset))[keys_lib.parse(key).rows]


def _fps(group, fps):
    """What the episode or a group above it says, else `fps` of the config."""
    node, stated = group, group.attrs.get("fps")
    while stated is None and node.name != "/":
        node = node.parent
        stated = node.attrs.get("fps")
    if stated is None:
        if fps:
            return fps
        raise BadEpisode(
            "missing fps", "nothing says how many steps a second has; set config.data.fields.fps"
        )
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
    for name, value in (("{name}", path.stem), ("{episode}", group.name.rpartition("/")[2])):
        key, rest = key.replace(name, value), rest.replace(name, value)
    place, _, pointer = (rest if kind == "file" else key).partition("#")
    inside, at, attribute = place.partition("@")
    if kind == "file":
        file = path.parent / place
        try:
            value = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise no_task(f"{file} cannot be read: {error}") from error
    elif at:
        node = group.get(inside or ".")
        if node is None or attribute not in node.attrs:
            raise no_task(_not_there(place, group.file))
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
        within = str(value or text)[:200]
        raise no_task(f"{key} leads nowhere ({error!r}); it points into {within}") from None
    if isinstance(value, list) and all(isinstance(v, str) and len(v) == 1 for v in value):
        return "".join(value)
    if not isinstance(value, str):
        raise no_task(
            f"{key} is {str(value)[:200]}; expected one text: point to it, e.g. with /0 at the end"
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
        with contextlib.suppress(*_DAMAGE), h5py.File(path, "r") as file:
            lines = _entries(file)
            more = [f"... and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)
            return "\n  ".join([f"{path} holds:", *lines[:_SHOWN], *more])
    return "None of the files can be opened."
