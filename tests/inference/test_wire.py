"""Messages go both ways unchanged; anything else is a `WireError`, soon and in little memory."""

import contextlib
import json
import pathlib
import time
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest

from lightwam_jax.inference import wire
from tests.mutations import mutations

FRAMES = pathlib.Path(__file__).parents[1] / "serving"
DESCRIBED = json.loads((FRAMES / "fixtures.json").read_text(encoding="utf-8"))


def describe(value):
    """As fixtures.json describes a value."""
    if isinstance(value, np.ndarray):
        return {
            "array": value.dtype.str,
            "shape": list(value.shape),
            "sum": float(value.astype(np.float64).sum()),
            "c_contiguous": value.flags.c_contiguous,
        }
    if isinstance(value, np.generic):
        return {"scalar": value.dtype.str, "value": value.item()}
    return {k: describe(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("path", sorted(FRAMES.glob("*.bin")), ids=lambda path: path.stem)
def test_frames_of_openpis_client_are_read_and_written_alike(path):
    frame, described = path.read_bytes(), DESCRIBED[path.name]
    message = wire.decode(frame)
    assert describe(message) == described.get("decodes_to", described)
    assert wire.encode(message) == frame


def test_every_kind_of_value_goes_both_ways():
    dtypes = ["?", "b", "h", "i", "l", "B", "H", "I", "L", "e", "f", "d", ">i4", ">f4", ">f8"]
    sent = {code: np.arange(6).reshape(2, 3).astype(code) for code in dtypes}
    sent |= {f"scalar {code}": np.dtype(code).type(1) for code in dtypes[:11]}
    sent |= {"none": None, "list": [1, "ä", {"x": b"y"}], "deep": {"a": {"b": 1.5}}}
    sent |= {
        "empty": np.zeros((0, 3), np.uint8),
        "number": np.float32(0.1),
        "zero-d": np.array(2.0),
    }
    got = wire.decode(wire.encode(sent))
    assert list(got) == list(sent)
    for name, value in sent.items():
        if isinstance(value, (np.ndarray, np.generic)):
            np.testing.assert_array_equal(got[name], value)
            assert got[name].dtype == value.dtype and type(got[name]) is type(value)
        else:
            assert got[name] == value
    strided = np.arange(24).reshape(2, 3, 4)[:, ::-1, ::2]
    np.testing.assert_array_equal(wire.decode(wire.encode({"x": strided}))["x"], strided)
    assert wire.decode(wire.encode({"x": (1, 2)}))["x"] == [1, 2]


def test_arrays_are_views_and_cannot_be_written():
    x = wire.decode(wire.encode({"x": np.zeros(3)}))["x"]
    assert x.base is not None and not x.flags.writeable


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.zeros(2, complex), np.zeros(2, "S3"), np.array(["a"]), object(), {1, 2}],
    ids=["object", "complex", "bytes", "text", "any", "set"],
)
def test_what_cannot_be_sent_is_refused_before(value):
    with pytest.raises(TypeError, match="cannot send"):
        wire.encode({"x": value})


def test_bfloat16_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"bfloat16: \.astype\(np\.float32\)"):
        wire.encode({"x": np.zeros(2, ml_dtypes.bfloat16)})


def packed(**fields):
    good = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    changed = good | {name.encode(): value for name, value in fields.items()}
    kept = {key: value for key, value in changed.items() if value is not ...}
    return msgpack.packb({"x": kept})


BAD_ARRAYS = {
    "object": (packed(dtype="|O"), r"dtype '\|O'"),
    "record": (packed(dtype="|V8"), "dtype"),
    "complex": (packed(dtype="<c8"), "dtype"),
    "date": (packed(dtype="<M8[s]"), "dtype"),
    "dtype of bytes": (packed(dtype=b"<f4"), "dtype"),
    "several dtypes": (packed(dtype="<f4,<f4"), "dtype"),
    "too few bytes": (packed(data=bytes(7)), r"shape \[2\] and dtype float32 with 7 bytes"),
    "too many bytes": (packed(data=bytes(12)), "with 12 bytes"),
    "text for data": (packed(data="00000000"), "data of an array are str"),
    "negative": (packed(shape=[-2]), "sizes of 0 or more"),
    "minus one twice": (packed(shape=[-1, -2]), "sizes of 0 or more"),
    "product that wraps": (packed(shape=[2**31, 2**31, 4]), "sizes of 0 or more"),
    "five axes": (packed(shape=[2, 1, 1, 1, 1]), "at most 4"),
    "no list": (packed(shape=2), "at most 4"),
    "float": (packed(shape=[2.0]), "sizes of 0 or more"),
    "true": (packed(shape=[True, 2]), "sizes of 0 or more"),
    "empty and huge": (packed(shape=[0, 2**30, 2**30, 2**30], data=b""), "shape"),
    "key missing": (packed(shape=...), "an array needs the keys"),
    "key too much": (packed(order="F"), "an array needs the keys"),
    "bools of 2": (packed(dtype="|b1", data=b"\x00\x02"), "other bytes than 0 and 1"),
    "scalar of text": (
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}}),
        "numpy scalar of str",
    ),
    "scalar too large": (
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        "numpy scalar 300",
    ),
    "scalar of objects": (
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}}),
        "dtype",
    ),
    "scalar with more": (
        msgpack.packb({"x": {b"__npgeneric__": 1, b"data": 1, b"dtype": "<i8", b"x": 1}}),
        "needs the keys",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused(name):
    frame, message = BAD_ARRAYS[name]
    with pytest.raises(wire.WireError, match=message) as caught:
        wire.decode(frame)
    assert caught.value.code == "bad_frame"


def test_limits_are_those_given():
    frame = wire.encode({"x": list(range(2000))})
    with pytest.raises(wire.WireError, match="max_array_len"):
        wire.decode(frame)
    assert len(wire.decode(frame, wire.Limits(list=2000))["x"]) == 2000
    with pytest.raises(wire.WireError, match=f"{len(frame)} bytes; expected at most 100"):
        wire.decode(frame, wire.Limits(frame=100))
    with pytest.raises(wire.WireError, match="max_str_len"):
        wire.decode(wire.encode({"prompt": "x" * (2**16 + 1)}))
    with pytest.raises(wire.WireError, match="max_map_len"):
        wire.decode(wire.encode({str(i): 0 for i in range(257)}))
    nested = {"x": [[i] for i in range(999)]}
    with pytest.raises(wire.WireError, match="more than 1000 lists and maps"):
        wire.decode(wire.encode(nested))
    nested["x"].pop()
    assert len(wire.decode(wire.encode(nested))["x"]) == 998
    many = {"x": [[0] * 1000 for _ in range(17)]}
    with pytest.raises(wire.WireError, match="16384 values"):
        wire.decode(wire.encode(many))
    stamp = msgpack.packb({"x": msgpack.Timestamp(1)})
    with pytest.raises(wire.WireError, match="ext"):
        wire.decode(stamp)


def test_errors_are_texts_and_back():
    error = wire.WireError("bad_state", "the state: 3 numbers\nsecond line")
    again = wire.WireError.from_text(str(error))
    assert (again.code, again.message) == (error.code, error.message)
    other = wire.WireError.from_text("Traceback: of another server")
    assert (other.code, other.message) == ("internal", "Traceback: of another server")
    with pytest.raises(ValueError, match="'oops' is none of"):
        wire.WireError("oops", "x")


BOMBS = {
    "deep lists": b"\xdd\x00\x00\x04\x00" * 5000,
    "deep maps": b"\x81\xa1a" * 2**20,
    "lists of empty maps": b"\xdc\x03\xff" + (b"\xdc\x03\xff" + b"\x80" * 1023) * 1023,
    "lists of texts": b"\xdc\x03\xff" + (b"\xdc\x03\xff" + b"\xa2ab" * 1023) * 1023,
    "wide maps, deep": (
        b"\xde\x00\xff"
        + b"".join(b"\xa2" + bytes([97 + i // 16, 97 + i % 16]) + b"\xc0" for i in range(254))
        + b"\xa1z"
    )
    * 1023,
    "a list as long as can be said": b"\xdd\xff\xff\xff\xff",
    "16 MiB of empty maps": b"\xdd\x00\xff\xff\xff" + b"\x80" * 2**24,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_early_in_little_memory(name):
    frame = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(wire.WireError):
            wire.decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 4 * len(frame) + 2**24
    assert peak <= 2**24, "nor does a large frame help"


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_damaged_frames_give_errors_or_messages_and_nothing_else(count):
    codes, slowest = {"message": 0, "bad_frame": 0}, 0.0
    for frame in mutations(seed=count, count=count):
        began = time.perf_counter()
        try:
            message = wire.decode(frame)
            assert isinstance(message, dict) and all(isinstance(key, str) for key in message)
            codes["message"] += 1
        except wire.WireError as error:
            codes[error.code] += 1
        slowest = max(slowest, time.perf_counter() - began)
    assert min(codes.values()) > 1000, codes
    assert slowest < 5, "none takes long; 0.1 s on an idle machine"


def test_damaged_frames_take_little_memory():
    worst = 0
    tracemalloc.start()
    try:
        for frame in mutations(seed=1, count=1000):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(wire.WireError):
                wire.decode(frame)
            worst = max(worst, tracemalloc.get_traced_memory()[1] - before - 4 * len(frame))
    finally:
        tracemalloc.stop()
    assert worst <= 2**24
