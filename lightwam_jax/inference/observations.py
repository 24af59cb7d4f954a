"""From a request's values to what `Policy.act` takes, checked: one `Reader` per connection.

The wording of every refusal is here: what came, what was expected, what to send instead.
"""

import io
import math
import typing

import numpy as np
from PIL import Image

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import wire
from lightwam_jax.inference.batching import Observation

MAX_PIXELS = 16_000_000  # of an image
MAX_SIDE = 8192  # a resize of a longer one would need a matrix of that length
MAX_PROMPT = 2000  # characters
_NAMES = 100  # unknown keys of a connection that are looked at
_FROZEN = 30  # equal images in a row, while the state moves, are a frozen camera
_UNDO = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}  # the others undo themselves


class Rules(typing.NamedTuple):
    """What a server accepts.

    Attributes:
      tables: of `keys.choose`. data: `DataConfig`. state_width: P.
      state_range: ((low [P], high [P]) of the training) or None.
      default_prompt: for requests without one; "": they are refused.
      float_images: images in 0..1 too. jpeg: JPEG files too. frozen: "warn", "refuse" or "off".
    """

    tables: tuple
    data: typing.Any
    state_width: int
    state_range: tuple | None = None
    default_prompt: str = ""
    float_images: bool = False
    jpeg: bool = False
    frozen: str = "warn"


class Reader:
    """Reads the requests of one connection, and remembers in which form they come.

    Attributes:
      warnings: texts, each once, for the log: extra keys, units, a frozen camera.
      extra: how many unknown keys came.
    """

    def __init__(self, rules):
        """Args: rules: `Rules`."""
        self._rules, self._table, self._layouts = rules, None, {}
        self.warnings, self.extra = [], 0
        self._seen = set()  # unknown keys, the first of them
        self._still = 0  # requests whose images are those before, while the state moved
        self._last = None  # (images, state) of the last request

    def read(self, request):
        """Returns the `Observation` of a decoded request.

        Raises:
          WireError: "bad_key", "bad_image", "bad_state" or "bad_prompt".
        """
        rules, cameras = self._rules, self._rules.data.cameras
        table = self._table or keys_lib.table_of(request, rules.tables, cameras)
        images, state, prompt, extra = keys_lib.read(request, table, cameras)
        self._note_extra(extra, table)
        images = {c: self._image(c, image, table.images[c]) for c, image in images.items()}
        state = _state(state, table, rules.state_width)
        prompt = _prompt(prompt, rules.default_prompt)
        if self._table is None:
            self._table = table
            self._first_look(state)
        self._watch(images, state)
        return Observation(images, state, prompt)

    def _note_extra(self, extra, table):
        self.extra += len(extra)
        new = [name for name in extra if name not in self._seen][: _NAMES - len(self._seen)]
        self._seen.update(new)
        for name, near in keys_lib.typos(new, table).items():
            self._warn(f"the key {name!r} is ignored; is it meant to be {near!r}?")

    def _warn(self, text):
        if text not in self.warnings and len(self.warnings) < _NAMES:
            self.warnings.append(text)

    def _image(self, camera, image, entry):
        what = f"camera {camera!r}"
        if isinstance(image, bytes):
            image = _jpeg(image, what, self._rules.jpeg)
        image = _as_uint8(image, what, self._rules.float_images)
        layout = _layout(image.shape, what, entry.layout)
        if self._layouts.setdefault(camera, layout) != layout:
            raise _image_error(
                f"{what} came as {self._layouts[camera].upper()} before and as {layout.upper()} "
                "now: send one layout within a connection"
            )
        image = image.transpose(1, 2, 0) if layout == "chw" else image
        return self._turned_back(camera, image, entry.turned)

    def _turned_back(self, camera, image, turned):
        """The picture as the data have it: the policy itself applies config.data.orientation."""
        data = self._rules.data
        orientation = data.orientation or ("",) * len(data.cameras)
        wanted = orientation[data.cameras.index(camera)]
        if turned and turned == wanted:
            return cameras_lib.ORIENTATIONS[_UNDO.get(turned, turned)](image)
        return image

    def _first_look(self, state):
        if self._rules.state_range is None:
            return
        low, high = (np.asarray(end) for end in self._rules.state_range)
        margin = 0.1 * (high - low) + 1e-6
        outside = (state < low - margin) | (state > high + margin)
        if outside.sum() < 2:
            return
        reach = np.maximum(np.abs(low), np.abs(high))[outside]
        factor = float(np.median(np.abs(state[outside]) / np.maximum(reach, 1e-6)))
        named = {1000: "millimetres for metres", 57.3: "degrees for radians"}
        guess = [what for size, what in named.items() if size / 3 < factor < size * 3]
        self._warn(
            f"the state lies outside the training range in dimensions "
            f"{np.flatnonzero(outside).tolist()}, by a factor of about {factor:.3g}"
            + (f": {guess[0]}?" if guess else "")
        )

    def _watch(self, images, state):
        """Notices a camera that shows the same picture while the robot moves."""
        if self._rules.frozen == "off":
            return
        last, self._last = self._last, (images, state)
        if last is None:
            return
        moved = not np.array_equal(last[1], state)
        same = [c for c, image in images.items() if np.array_equal(image, last[0][c])]
        self._still = self._still + moved if same else 0
        if self._still >= _FROZEN:
            text = f"camera {same[0]!r} gave the same picture {_FROZEN} times while the state moved"
            if self._rules.frozen == "refuse":
                raise _image_error(f"{text}: is it frozen?")
            self._warn(text)


# ---- images ------------------------------------------------------------------------------------


def _image_error(text):
    return wire.WireError("bad_image", text)


def _jpeg(content, what, allowed):
    if not content.startswith(b"\xff\xd8"):
        raise _image_error(f"{what} is {len(content)} bytes that are no JPEG; send a uint8 array")
    if not allowed:
        raise _image_error(
            f"{what} is a JPEG; send a uint8 array [h,w,3], or start the server with --jpeg (it "
            "changes the actions a little)"
        )
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise _image_error(f"{what} is a JPEG of {image.size}; send at most 16 megapixels")
            return np.asarray(image.convert("RGB"))
    except wire.WireError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _image_error(f"{what} is a JPEG that cannot be decoded ({error})") from None


def _as_uint8(image, what, float_images):
    if not isinstance(image, np.ndarray):
        raise _image_error(f"{what} is {type(image).__name__}; send a uint8 array [h,w,3]")
    came = f"{what} gives {image.dtype} {list(image.shape)}"
    if image.ndim == 4:
        raise _image_error(f"{came}; send one image [h,w,3], without a batch axis")
    if image.ndim == 2:
        raise _image_error(f"{came}: grey; send RGB [h,w,3]")
    if image.ndim != 3:
        raise _image_error(f"{came}; send uint8 [h,w,3]")
    if not image.size:
        raise _image_error(f"{came}: no pixel; send uint8 [h,w,3]")
    if image.dtype.kind == "f" and float_images:
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN too
            raise _image_error(f"{came} with values outside 0..1; send uint8, or floats in 0..1")
        return np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        hint = ", or start the server with --float_images" if image.dtype.kind == "f" else ""
        raise _image_error(f"{came}; send uint8 in 0..255{hint}")
    return image


def _layout(shape, what, layout):
    """ "hwc" or "chw" of an image's shape, where that is what the table says."""
    hwc, chw = shape[2] == 3, shape[0] == 3
    if layout == "auto":
        if hwc and chw:
            raise _image_error(f"{what} gives {list(shape)}: channels first or last? Send [h,w,3]")
        layout = "chw" if chw else "hwc"
    sides = shape[:2] if layout == "hwc" else shape[1:]
    if not (hwc if layout == "hwc" else chw):
        if 4 in (shape[0], shape[2]):
            raise _image_error(f"{what} gives {list(shape)}: four channels; send RGB without alpha")
        other = hwc or chw
        raise _image_error(
            f"{what} gives {list(shape)}; expected {'[h,w,3]' if layout == 'hwc' else '[3,h,w]'}"
            + (f": {'channels last' if hwc else 'channels first'} came" if other else "")
        )
    if math.prod(sides) > MAX_PIXELS or max(sides) > MAX_SIDE:
        raise _image_error(
            f"{what} gives {list(shape)}; send at most 16 megapixels, and {MAX_SIDE} along a side"
        )
    return layout


# ---- state and prompt --------------------------------------------------------------------------


def _state(parts, table, width):
    rows = []
    for path, part in zip(table.state, parts):
        if isinstance(part, list) and all(type(x) in (int, float) for x in part):
            part = np.array(part, np.float64)
        elif isinstance(part, (int, float, np.generic)) and not isinstance(part, (bool, np.bool_)):
            part = np.array([part], np.float64)
        if not isinstance(part, np.ndarray) or part.dtype.kind not in "fiu":
            raise wire.WireError(
                "bad_state", f"{path} is {_kind(part)}; send an array of numbers, float32 or 64"
            )
        if part.ndim > 1:
            raise wire.WireError(
                "bad_state", f"{path} has shape {list(part.shape)}; send one row [{width}]"
            )
        rows.append(np.atleast_1d(part).astype(np.float64))
    state = np.concatenate(rows)
    if state.shape != (width,):
        sizes = " + ".join(f"{path} [{len(row)}]" for path, row in zip(table.state, rows))
        raise wire.WireError(
            "bad_state", f"the state has {state.size} numbers ({sizes}); expected {width}"
        )
    with np.errstate(over="ignore"):
        state = state.astype(np.float32)
    if not np.isfinite(state).all():
        wrong = np.flatnonzero(~np.isfinite(state)).tolist()
        raise wire.WireError("bad_state", f"the state is not finite in dimensions {wrong}")
    return state


def _kind(value):
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _prompt(prompt, default):
    if prompt is None or prompt == "":
        if default:
            return default
        raise wire.WireError(
            "bad_prompt",
            "no prompt; send the instruction as text, or start the server with --default_prompt",
        )
    if not isinstance(prompt, str):
        raise wire.WireError("bad_prompt", f"the prompt is {_kind(prompt)}; send text")
    if len(prompt) > MAX_PROMPT:
        raise wire.WireError(
            "bad_prompt", f"the prompt has {len(prompt)} characters; send at most {MAX_PROMPT}"
        )
    words = " ".join(prompt.split())
    if not words:
        raise wire.WireError("bad_prompt", "the prompt is empty; send the instruction as text")
    return words
