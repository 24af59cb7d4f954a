"""What entries of config.data.fields may be for HDF5 and RLDS, and the episode read through them.

A key is a path inside the episode ("/..." starts at the root of the file or record), and behind it
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
import io
import re
import typing

import numpy as np
import PIL.Image

from lightwam_jax.data import episodes as episodes_lib


class BadEpisode(ValueError):
    """An episode that cannot be used; `kind` is what an `episodes.Problem` calls it."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class Key(typing.NamedTuple):
    """A parsed key: path, and slices of rows and dimensions."""

    path: str
    rows: slice
    dims: slice


def parse(key):
    """Returns the `Key` of a text; ValueError where it is none."""
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
    """Returns the columns of a state or an action side by side.

    Args:
      name: "state" or "action", for messages.
      parts: {key as in the config: numbers [n] or [n, d]}, uncut.

    Returns:
      f32 [rows, D].

    Raises:
      Unfit: not such arrays, or different numbers of rows.
    """
    columns = {}
    for text, values in parts.items():
        key = parse(text)
        if values.ndim not in (1, 2) or values.dtype.kind not in "fiub":
            raise BadEpisode(
                "wrong type",
                f"{name} {key.path} is {values.dtype} {list(values.shape)}; "
                "expected numbers [n] or [n, d]",
            )
        values = values[:, None] if values.ndim == 1 else values
        columns[text] = values[key.rows, key.dims].astype(np.float32)
    rows = {text: len(values) for text, values in columns.items()}
    if len(set(rows.values())) > 1:
        raise BadEpisode(
            "wrong length",
            f"the parts of the {name} differ in length: "
            + ", ".join(f"{text} has {count}" for text, count in rows.items()),
        )
    return np.concatenate(list(columns.values()), axis=-1)


def instructions(values):
    """Returns the tasks of an episode: one, or one per step where they change.

    Args:
      values: the instruction, or [n] of them; text or UTF-8 bytes.

    Raises:
      Unfit: not text, or empty.
    """
    values = np.asarray(values, object).ravel().tolist()
    try:
        texts = [(v.decode() if isinstance(v, bytes) else v).strip() for v in values]
    except (AttributeError, UnicodeDecodeError):
        raise BadEpisode(
            "missing task", f"the instruction is {values[0]!r}; expected text"
        ) from None
    if not all(texts):
        raise BadEpisode("missing task", f"the instruction of step {texts.index('')} is empty")
    return tuple(texts[:1] if len(set(texts)) == 1 else texts)


def decode_image(encoded, channel_order):
    """Returns an encoded image (JPEG, PNG or WebP) as uint8 [H, W, 3]; zeros may follow it.

    Args:
      encoded: bytes.
      channel_order: config.data.fields.channel_order: "bgr" swaps red and blue.

    Raises:
      ValueError: not an image, a damaged one, or not of 8 bits.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.mode not in ("RGB", "RGBA", "L"):
                raise ValueError(f"an image of mode {image.mode}; expected 8-bit RGB, RGBA or L")
            # Converting copies even what is RGB already.
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return in_rgb(np.asarray(rgb), channel_order)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # damaged files
        raise ValueError(f"{len(encoded)} bytes do not decode: {error}") from error


def in_rgb(pixels, channel_order):
    """Returns pixels [..., 3] with red first, whichever comes first in the data."""
    return np.ascontiguousarray(pixels[..., ::-1]) if channel_order == "bgr" else pixels


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KeyedEpisode(episodes_lib.Episode):
    """An `episodes.Episode` whose images are read when asked for.

    Sources add `stored`. Making one raises `Unfit` where its parts differ in length.

    Attributes beyond those of the protocol:
      tasks: the instruction, or one per step.
      images: {camera: (path, range of the stored images that are the frames)}.
      channel_order: config.data.fields.channel_order.
    """

    id: str
    fps: float
    tasks: tuple
    state: np.ndarray
    action: np.ndarray
    file: str
    images: dict
    channel_order: str

    def __post_init__(self):
        counts = {
            "state": len(self.state),
            **{f"camera {camera!r}": len(rows) for camera, (_, rows) in self.images.items()},
        }
        if len(self.tasks) > 1:
            counts["the instruction"] = len(self.tasks)
        for name, count in counts.items():
            if count != self.length:
                raise BadEpisode(
                    "wrong length",
                    f"{name} has {count} rows and action has {self.length}; expected equally many",
                )

    @property
    def length(self):
        """Steps."""
        return len(self.action)

    @property
    def task(self):
        """The instruction of the first step."""
        return self.task_at(0)

    def task_at(self, step):
        """Returns the instruction of a step; "" in an episode without any step."""
        return self.tasks[step if len(self.tasks) > 1 else 0] if self.tasks else ""

    def frames(self, camera, indices):
        """Returns uint8 [k, H, W, 3]; see `episodes.Episode.frames`."""
        if camera not in self.images:
            raise KeyError(
                f"episode {self.id} has no camera {camera!r}; it has "
                f"{', '.join(sorted(self.images))}: correct config.data.cameras"
            )
        path, rows = self.images[camera]
        frames, places = np.unique(np.arange(self.length)[indices], return_inverse=True)
        stored, read = self.stored(path), []
        for frame in frames.tolist():
            try:
                pixels = stored[rows[frame]]
                if getattr(pixels, "ndim", 0) == 3:
                    read.append(in_rgb(pixels, self.channel_order))
                else:
                    read.append(decode_image(bytes(pixels), self.channel_order))
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                raise self.error(path, error, frame) from error
            if read[-1].shape != read[0].shape:
                raise self.error(
                    path,
                    f"{list(read[-1].shape)} here and {list(read[0].shape)} in "
                    f"frame {frames[0]}; all must have one size",
                    frame,
                )
        return np.stack(read)[places]

    @abc.abstractmethod
    def stored(self, path):
        """Returns what is at a path; [i] is uint8 [H, W, 3] or the bytes of an image."""

    def error(self, path, reason, frame=None):
        """Returns the `FrameError` of a frame, or of all of them."""
        return episodes_lib.FrameError(self.file, frame, f"{self.id} {path}: {reason}")
