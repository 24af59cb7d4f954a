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
import math
import os
import pathlib
import re
import threading

import h5py
import numpy as np
import tqdm

from lightwam_jax import folders
from lightwam_jax.data.episodes import Problem
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats.keys import no_task
from lightwam_jax.data.formats.stored import BadEpisode

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401 (where it is installed, its compression filters are known)

_SUFFIXES = (".hdf5", ".h5")
_OPEN_FILES = 16  # per thread
_SHOWN = 40  # entries of a file that an error lists
_DAMAGE = (OSError, KeyError, RuntimeError)  # what h5py raises for damaged files
# What HDF5 says of files, and what a person can do; the first that is in the message counts.
_MEANINGS = (
    ("file signature not found", "it is no HDF5 file"),
    ("truncated file", "the file is cut off; copy it again"),
    (
        "unable to lock file",
        "another program writes it, or the file system has no locks: then set "
        "HDF5_USE_FILE_LOCKING=FALSE",
    ),
    ("already open for write", "the program that recorded it did not close it: h5clear -s FILE"),
    ("consistency flags", "the program that recorded it did not close it: h5clear -s FILE"),
    ("filter", "a compression filter is missing: pip install hdf5plugin"),
    ("plugin", "a compression filter is missing: pip install hdf5plugin"),
)
# If every episode has one of these problems, the config is wrong and not the data.
_MISFIT = ("no episode", "missing dataset", "missing task", "missing fps", "wrong type")


class Hdf5Episode(keys_lib.KeyedEpisode):
    """An `episodes.Episode` in an HDF5 file."""

    def encoded(self, path):
        """Returns the dataset of the images."""
        try:
            return _opened(self.file)[path]
        except _DAMAGE as error:
            raise self.error(path, _said(error)) from error


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
    """Returns (episodes, problems) of all *.hdf5 and *.h5 below config.data.path, linked ones too.

    Ids are the paths of the files below it, without suffix, and of the groups in them. The order
    is natural: demo_2 comes before demo_10.

    Raises:
      ValueError: no file, a key that is missing or malformed, or keys that fit no episode at all;
        lists what the first file holds.
    """
    root, fields = pathlib.Path(config.data.path), config.data.fields
    files, missed = _files(root)
    if not files:
        more = "".join(f"; {problem.line()}" for problem in missed)
        raise ValueError(f"no *.hdf5 or *.h5 file below config.data.path={str(root)!r}{more}")
    missing = [name for name in ("state", "action", "image", "task") if not getattr(fields, name)]
    if missing:
        raise ValueError(
            f"config.data.fields.{', '.join(missing)} must say where an HDF5 episode keeps it "
            f"(lightwam_jax/data/formats/hdf5.py explains how). {_contents(files)}"
        )
    for key in (*fields.state, *fields.action, fields.image):
        keys_lib.parse(key)
    found, problems = [], missed
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
                    problems += _counted(file[group or "/"], found[-1])
    misfits = [problem for problem in problems if problem.kind in _MISFIT]
    if misfits and not found:
        raise ValueError(
            f"config.data.fields fits no episode below {root}; the first: "
            f"{misfits[0].line()}. {_contents(files)}"
        )
    return found, problems


def _files(root):
    """Returns (the recordings below a folder in natural order, `Problem`s of finding them)."""
    found = folders.search(root)
    files = [path for path in found.files if path.suffix.lower() in _SUFFIXES]
    problems = []
    for path, reason in found.missed:
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in _SUFFIXES:  # a link to a recording: opening it says the rest
            files.append(path)
        elif path.is_symlink() and not path.exists():
            problems.append(Problem.warning("broken link", name, path, f"{name} is {reason}"))
        else:
            problems.append(Problem.error("unreadable folder", name, path, reason))
    for path in found.entered:
        if path.suffix.lower() in _SUFFIXES and not any(f.is_relative_to(path) for f in files):
            name, reason = path.relative_to(root).as_posix(), "a directory is in its place"
            if path != pathlib.Path(root):
                problems.append(Problem.error("unreadable file", name, path, reason))
    return sorted(files, key=lambda path: _natural(path.relative_to(root).as_posix())), problems


@contextlib.contextmanager
def _noting(problems, name, path):
    """Makes a `Problem` of what is wrong with a file or an episode."""
    try:
        yield
    except BadEpisode as error:
        problems.append(Problem.error(error.kind, name, path, str(error)))
    except _DAMAGE as error:
        problems.append(Problem.error("unreadable file", name, path, _said(error)))


def _said(error):
    """What HDF5's own message means, and the message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    meaning = next((words for mark, words in _MEANINGS if mark in text), "")
    return f"{meaning} ({text})" if meaning else text


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


def _counted(group, episode):
    """A warning where robomimic's attribute num_samples is not the number of steps."""
    count = _number(group.attrs.get("num_samples"))
    if count in (None, episode.length):
        return []
    message = f"the attribute num_samples is {count:g}, there are {episode.length} steps"
    return [Problem.warning("wrong length", episode.id, episode.file, message)]


def _dataset(group, key):
    path = keys_lib.parse(key).path
    dataset = group.get(path)
    if not isinstance(dataset, h5py.Dataset):
        raise BadEpisode("missing dataset", _not_there(path, group))
    filters = dataset.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code, _, _, name = filters.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            called = f" ({name.decode(errors='replace')})" if name else ""
            raise BadEpisode(
                "missing filter",
                f"{dataset.name} is compressed with filter {code}{called}, which is not installed: "
                "pip install hdf5plugin; it is found by itself",
            )
    return dataset


def _not_there(path, group):
    link = group.get(path, getlink=True) if path.strip("/") else None
    if isinstance(link, h5py.ExternalLink):
        return f"{path} is a link to {link.path} in {link.filename}, which is not there"
    if isinstance(link, h5py.SoftLink):
        return f"{path} is a link to {link.path}, which is not there"
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
    number = _number(stated)
    if number is None or not 0 < number < math.inf:
        if fps:
            return fps
        if stated is None:
            said = "nothing says how many steps a second has"
        else:
            said = f"the attribute fps of {node.name} is {stated!r}; expected one number above 0"
        kind = "missing fps" if stated is None else "wrong fps"
        raise BadEpisode(kind, f"{said}; set config.data.fields.fps, which counts then")
    if fps and not math.isclose(number, fps, rel_tol=1e-5):
        raise BadEpisode(
            "wrong fps",
            f"the file says {number:g}, config.data.fields.fps is {fps:g}; "
            "correct it, or set it to 0 to believe the file",
        )
    return number


def _number(value):
    """The number that an attribute holds: as it is, as an array of one, or as text; else None."""
    try:
        value = _scalar(value)
        return None if isinstance(value, (bool, np.bool_, complex)) else float(value)
    except (TypeError, ValueError, OverflowError):  # None, several numbers, h5py.Empty, words
        return None


def _scalar(value):
    """An array of one value as that value."""
    if isinstance(value, np.ndarray) and value.size == 1:
        return value.reshape(-1)[0]
    return value


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
    text, value = _scalar(text), None
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
