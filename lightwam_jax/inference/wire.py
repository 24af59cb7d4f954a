"""Messages of the policy server: msgpack maps with numpy arrays, as openpi's clients write them.

An array is a map with the keys b"__ndarray__", b"data", b"dtype" and b"shape"; a numpy scalar has
b"__npgeneric__", b"data" and b"dtype". Nothing else has keys that are not strings.

What comes from outside is checked before it becomes an array, and counted while it is read: a few
megabytes of empty maps would otherwise become gigabytes. Server, client and skew check use this
file; it needs numpy and msgpack only, no jax.
"""

import typing

import msgpack
import numpy as np

from lightwam_jax.inference import arrays
from lightwam_jax.inference.arrays import MAX_FRAME, WireError, refused

# The stack of msgpack holds 1,024 open containers, and a list is allocated when its length is read:
# 1,024 * _LIST * 8 bytes is what a small message can claim.
_LIST, _MAP, _STRING = 1024, 256, 2**16
_CONTAINERS, _ITEMS = 1000, 2**14  # of a message
_PLAIN = (type(None), bool, int, float, str, bytes, list, dict, np.ndarray, np.generic)
_DEEPEST = 32  # lists and maps in one another


class Limits(typing.NamedTuple):
    """How much a message may hold."""

    frame: int = MAX_FRAME
    list: int = _LIST
    map: int = _MAP
    string: int = _STRING
    containers: int = _CONTAINERS
    items: int = _ITEMS


def encode(message):
    """Returns the bytes of a message.

    Args:
      message: dict with string keys of None, bool, int, float, str, bytes, list, tuple, dict,
        numpy arrays and scalars. Strided arrays arrive contiguous, tuples as lists.

    Raises:
      TypeError: another type; or an array of objects, records, complex numbers or bfloat16.
    """
    return msgpack.packb(message, default=_pack, use_bin_type=True)


def _pack(value):
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = value.dtype.str
        if not arrays.DTYPE.fullmatch(dtype):
            raise TypeError(
                f"cannot send values of dtype {value.dtype}; expected bool, int or float: convert "
                "them (bfloat16: .astype(np.float32))"
            )
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype}
        data, shape = value.tobytes(), value.shape
        return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    raise TypeError(f"cannot send {type(value).__name__}; expected numbers, text, lists, arrays")


def decode(frame, limits=None):
    """Returns the message of a frame.

    Args:
      frame: bytes. limits: `Limits`; default: those of a request.

    Returns:
      dict with string keys; arrays are read-only and of the byte order that came.

    Raises:
      WireError: "bad_frame"; nothing else, whatever the bytes are.
    """
    limits = limits or Limits()
    if isinstance(frame, str):
        raise refused("a text message; expected a binary one, a msgpack map")
    if len(frame) > limits.frame:
        raise refused(f"a message of {len(frame)} bytes; expected at most {limits.frame}")
    counter = _Counter(limits)
    try:
        message = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            object_hook=counter.map,
            list_hook=counter.list,
            max_array_len=limits.list,
            max_map_len=limits.map,
            max_str_len=limits.string,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        said = str(error) or type(error).__name__
        raise refused(f"not a msgpack message within the limits ({said})") from None
    if not isinstance(message, dict):
        raise refused(f"the message is {type(message).__name__}; expected a map with string keys")
    _check_depth(message)
    return message


def _check_depth(message):
    inside = [message]
    for _ in range(_DEEPEST):
        parts = (value.values() if isinstance(value, dict) else value for value in inside)
        inside = [value for part in parts for value in part if isinstance(value, (dict, list))]
        if not inside:
            return
    raise refused(f"lists and maps are nested more than {_DEEPEST} deep")


class _Counter:
    """Turns maps into arrays where they are some, and ends a message that holds too much."""

    def __init__(self, limits):
        self._limits, self._containers, self._items = limits, 0, 0

    def list(self, values):
        self._count(values)
        return values

    def map(self, values):
        self._count(values.values())
        if b"__ndarray__" in values:
            return self._array(values)
        if b"__npgeneric__" in values:
            return _scalar(values)
        for key in values:
            if not isinstance(key, str):
                raise refused(f"a map has the key {key!r:.40}; expected strings")
        return values

    def _array(self, values):
        if set(values) != {b"__ndarray__", b"data", b"dtype", b"shape"}:
            raise refused("an array needs the keys __ndarray__, data, dtype and shape only")
        return arrays.array(values[b"data"], values[b"dtype"], values[b"shape"])

    def _count(self, values):
        self._containers += 1
        self._items += len(values)
        if self._containers > self._limits.containers or self._items > self._limits.items:
            raise refused(
                f"more than {self._limits.containers} lists and maps or {self._limits.items} "
                "values in a message; send numbers as arrays"
            )
        for value in values:
            if not isinstance(value, _PLAIN):
                raise refused(f"a value of type {type(value).__name__}; expected numbers or text")


def _scalar(values):
    if set(values) != {b"__npgeneric__", b"data", b"dtype"}:
        raise refused("a numpy scalar needs the keys __npgeneric__, data and dtype, nothing else")
    dtype, value = arrays.dtype_of(values[b"dtype"]), values[b"data"]
    if type(value) not in (bool, int, float):
        raise refused(f"a numpy scalar of {type(value).__name__}; expected a number")
    try:
        with np.errstate(over="ignore"):
            return dtype.type(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise refused(f"a numpy scalar {value!r:.40} of dtype {dtype}: {error}") from None
