"""Arrays that come from outside, checked before they are arrays; and the errors of a request.

numpy only: RoboTwin's environment has no more.
"""

import math
import re

import numpy as np

MAX_FRAME = 32 * 2**20  # bytes of a message
CODES = (
    *("bad_frame", "bad_key", "bad_image", "bad_state", "bad_prompt", "stale", "overloaded"),
    *("timeout", "not_finite", "limits", "draining", "internal"),
)
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_NAMES = {np.dtype(code).name for code in ("?", *"bhilqBHILQefd")}
_DIMENSIONS = 4


class WireError(ValueError):
    """What is wrong with a request, with one of `CODES`.

    Attributes:
      code: of `CODES`. message: what came, what was expected, what to change.
    """

    def __init__(self, code, message):
        if code not in CODES:
            raise ValueError(f"error code {code!r} is none of {', '.join(CODES)}")
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    @classmethod
    def from_text(cls, text):
        """Returns the error of a text frame; one without a known code is "internal"."""
        code, colon, message = text.partition(": ")
        known = bool(colon) and code in CODES
        return cls(code, message) if known else cls("internal", text)


def array(data, dtype, shape):
    """Returns the array of bytes that came from outside, a view of them, checked.

    Args:
      data: bytes, C order. dtype: such as "<f4", "|u1" or "float32". shape: list of at most 4.

    Raises:
      WireError: "bad_frame": another dtype, or sizes that do not fit together.
    """
    dtype = dtype_of(dtype)
    if not isinstance(data, bytes):
        raise refused(f"the data of an array are {type(data).__name__}; expected bytes")
    if not isinstance(shape, (list, tuple)) or len(shape) > _DIMENSIONS:
        raise refused(f"an array of shape {shape!r:.80}; expected a list of at most {_DIMENSIONS}")
    if any(type(size) is not int or not 0 <= size < 2**31 for size in shape):
        raise refused(f"an array of shape {shape!r:.80}; expected sizes of 0 or more")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise refused(f"an array of shape {list(shape)} and dtype {dtype} with {len(data)} bytes")
    if dtype.kind == "b" and data.strip(b"\x00\x01"):
        raise refused("an array of bool with other bytes than 0 and 1")
    try:
        return np.ndarray(shape, dtype, data)
    except (ValueError, TypeError) as error:  # such as [2**30, 0, 2**30, 2**30]
        raise refused(f"an array of shape {list(shape)} and dtype {dtype}: {error}") from None


def dtype_of(text):
    """Returns the dtype that came as text; raises as `array`."""
    if not isinstance(text, str) or not (DTYPE.fullmatch(text) or text in _NAMES):
        raise refused(f"an array of dtype {text!r:.40}; expected bool, int or float")
    return np.dtype(text)


def refused(message):
    """Returns the `WireError` of a message that cannot be read."""
    return WireError("bad_frame", message)
