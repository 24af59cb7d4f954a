"""What all formats share: an episode with its columns in memory and its images on disk."""

import dataclasses
import io

import numpy as np
import PIL.Image

from lightwam_jax.data import episodes as episodes_lib


class BadEpisode(ValueError):
    """An episode that cannot be used; `kind` is what an `episodes.Problem` calls it."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredEpisode(episodes_lib.Episode):
    """An `episodes.Episode` of files.

    Attributes beyond those of the protocol:
      tasks: the instruction, or one per step; empty only without steps.
      images: {camera: where its images are}.
    """

    id: str
    fps: float
    tasks: tuple
    state: np.ndarray
    action: np.ndarray
    file: str
    images: dict

    @property
    def length(self):
        """Steps, and frames per camera."""
        return len(self.action)

    @property
    def task(self):
        """The instruction of the first step."""
        return self.task_at(0)

    def task_at(self, step):
        """Returns the instruction of a step; "" in an episode without steps."""
        return self.tasks[step if len(self.tasks) > 1 else 0] if self.tasks else ""


def one_or_each(tasks):
    """Returns the instructions of all steps as `StoredEpisode.tasks`: a single one if all agree."""
    return tuple(tasks[:1] if len(set(tasks)) == 1 else tasks)


def stack_frames(indices, read, error):
    """Returns the frames at `indices` [k] as uint8 [k, H, W, 3]; each is read once.

    Args:
      indices: of frames.
      read: function of an index that returns uint8 [H, W, 3].
      error: function (reason, index) that returns the `FrameError` to raise.
    """
    wanted, order = np.unique(indices, return_inverse=True)
    found = []
    for index in wanted.tolist():
        try:
            found.append(read(index))
        except (OSError, RuntimeError, ValueError, LookupError, TypeError) as reason:
            raise error(reason, index) from reason
        shape, first = list(found[-1].shape), list(found[0].shape)
        if shape != first:
            raise error(
                f"{shape} here and {first} in frame {wanted[0]}; all must have one size", index
            )
    return np.stack(found)[order]


def decode_image(encoded, channel_order="rgb"):
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
    except PIL.UnidentifiedImageError:
        kinds = "not a JPEG, PNG or WebP image, or cut off in its first bytes"
        raise ValueError(f"{len(encoded)} bytes do not decode: {kinds}") from None
    except (OSError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:  # damaged
        raise ValueError(f"{len(encoded)} bytes do not decode: {error}") from error


def in_rgb(pixels, channel_order):
    """Returns pixels [..., 3] with red first, whatever the order in the data."""
    return np.ascontiguousarray(pixels[..., ::-1]) if channel_order == "bgr" else pixels
