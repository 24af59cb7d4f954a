"""What entries of config.data.fields may be for HDF5 and RLDS, and the episode read through them.

A key is a path inside the episode ("/..." starts at the root of the file or record), followed by
numpy's slices where only a part is wanted:

  observations/qpos            all of it, [n, d]; [n] counts as width 1
  observations/qpos[:, :7]     its first seven dimensions; [:, 6] only the seventh
  joint_action/vector[:-1]     all rows but the last
  joint_action/vector[1:]      from the second row on: with the line above as the state, the action
                               of a step is the state that follows it
  actions[::2]                 every second row

Keys of one episode may be cut differently as long as the same number of rows is left of each.
"""

import abc
import dataclasses
import functools
import re
import typing

import numpy as np

from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.formats import stored
from lightwam_jax.data.formats.stored import BadEpisode

no_task = functools.partial(BadEpisode, "missing task")


class Key(typing.NamedTuple):
    """A parsed key: path, and slices of rows and dimensions."""

    path: str
    rows: slice
    dims: slice


def parse(key):
    """Returns the `Key` of a text; ValueError if it is malformed."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\],]*:[^\[\],]*)(?:,([^\[\],]+))?\])?", key.strip())
    try:
        path, rows, dims = match.groups()
        return Key(path.strip(), _slice(rows or ":"), _slice(dims or ":"))
    except (AttributeError, ValueError):
        raise ValueError(
            f"config.data.fields has {key!r}; expected PATH, PATH[rows] or PATH[rows, dimensions] "
            "with numpy's slices, e.g. 'observations/qpos[:, :7]' or 'actions[1:]'"
        ) from None


def _slice(text):
    bounds = [int(part) if part.strip() else None for part in text.split(":")]
    if len(bounds) == 1:  # one dimension
        return slice(bounds[0], bounds[0] + 1 or None)
    if len(bounds) > 3 or (bounds[2:] and bounds[2] is not None and bounds[2] < 1):
        raise ValueError(text)
    return slice(*bounds)


def join(name, parts):
    """Returns the columns of a state or an action side by side, f32 [rows, D].

    Args:
      name: "state" or "action", for messages.
      parts: {key as in the config: numbers [n] or [n, d]}, uncut.

    Raises:
      BadEpisode: not such arrays, or different numbers of rows.
    """
    columns = {}
    for text, values in parts.items():
        key = parse(text)
        if values.ndim not in (1, 2) or values.dtype.kind not in "fiub":
            found = f"{values.dtype} {list(values.shape)}"
            raise BadEpisode(
                "wrong type", f"{name} {key.path} is {found}; expected numbers [n] or [n, d]"
            )
        values = values[:, None] if values.ndim == 1 else values
        columns[text] = values[key.rows, key.dims].astype(np.float32)
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{text} has {len(values)}" for text, values in columns.items())
        raise BadEpisode("wrong length", f"the parts of the {name} differ in length: {counts}")
    return np.concatenate(list(columns.values()), axis=-1)


def instructions(values):
    """Returns the tasks of an episode: one, or one per step where they change.

    Args:
      values: the instruction, or [n] of them; text or UTF-8 bytes.

    Raises:
      BadEpisode: not text, or empty.
    """
    values = np.asarray(values, object).ravel().tolist()
    try:
        texts = [(v.decode() if isinstance(v, bytes) else v).strip() for v in values]
    except (AttributeError, UnicodeDecodeError):
        raise no_task(f"the instruction is {values[0]!r}; expected text") from None
    if not all(texts):
        raise no_task(f"the instruction of step {texts.index('')} is empty")
    return stored.one_or_each(texts)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KeyedEpisode(stored.StoredEpisode):
    """An episode read through keys. Raises `BadEpisode` where its parts differ in length.

    Attributes beyond those of `StoredEpisode`:
      images: {camera: (path, range of the stored images that are the frames)}.
      channel_order: config.data.fields.channel_order.
    """

    channel_order: str

    def __post_init__(self):
        counts = {"state": len(self.state)}
        counts |= {f"camera {name!r}": len(rows) for name, (_, rows) in self.images.items()}
        if len(self.tasks) > 1:
            counts["the instruction"] = len(self.tasks)
        for name, count in counts.items():
            if count != self.length:
                raise BadEpisode(
                    "wrong length",
                    f"{name} has {count} rows and action has {self.length}; expected equally many",
                )

    def frames(self, camera, indices):
        """Returns uint8 [k, H, W, 3]; see `episodes.Episode.frames`."""
        path, rows = self.images_of(camera)
        images = self.encoded(path)

        def read(frame):
            pixels = images[rows[frame]]
            if getattr(pixels, "ndim", 0) == 3:
                return stored.in_rgb(pixels, self.channel_order)
            return stored.decode_image(bytes(pixels), self.channel_order)

        error = functools.partial(self.error, path)
        return stored.stack_frames(np.arange(self.length)[indices], read, error)

    def files(self, camera):
        """Returns the file of the episode."""
        return (self.file,)

    @abc.abstractmethod
    def encoded(self, path):
        """Returns what is at a path; [i] is uint8 [H, W, 3] or the bytes of an image."""

    def error(self, path, reason, frame=None):
        """Returns the `FrameError` of a frame, or of all of them."""
        return episodes_lib.FrameError(self.file, frame, f"{self.id} {path}: {reason}")
