"""Frames of openpi's client, damaged in every way that costs nothing to think of; seeded."""

import pathlib
import random

import msgpack

FRAMES = [
    path.read_bytes() for path in sorted((pathlib.Path(__file__).parent / "serving").glob("*.bin"))
]
_COUNTS = (b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff")
_COUNTS += (b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\x7f\xff\xff\xff\x01")
_DTYPES = ("|O", "|V8", "<c8", "<f2", ">f8", "<M8[s]", "|S5", "<U3", "|u1,<f4", "<f16", "", "f4")
_SHAPES = ([-1], [2**31], [2**62, 4], [0, 2**40], [1] * 5, ["8"], [8.0], [True], None, 8, [])
_VALUES = (None, True, -1, 2**63, 1e308, "", "x" * 70_000, b"", b"\xff\xd8", [], {}, [[[]]])


def flip(rng, frame):
    """Some bits."""
    out = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng, frame):
    """A part is missing, doubled, or something follows."""
    a, b = sorted(rng.randrange(len(frame) + 1) for _ in range(2))
    return rng.choice((frame[:a], frame[b:], frame[:a] + frame[b:], frame + frame[a:b], frame * 2))


def lengths(rng, frame):
    """The length of a list, map, text or array that is not there."""
    at = rng.randrange(len(frame))
    return frame[:at] + rng.choice(_COUNTS) + frame[at + rng.randrange(6) :]


def fields(rng, frame):
    """Another dtype, shape, size of data or kind of value, in a frame that is well formed."""
    message = msgpack.unpackb(frame, raw=False, strict_map_key=False)
    places = list(_places(message))
    for _ in range(rng.choice((1, 1, 2, 5))):
        tree, key = rng.choice(places)
        name = key if isinstance(key, str) else bytes(key).decode()
        choices = {"dtype": _DTYPES, "shape": _SHAPES}.get(name, _VALUES)
        tree[key] = rng.choice(choices)
        if rng.random() < 0.2:
            tree[rng.choice((b"a", "\x00", "prompt", b"__ndarray__", 1))] = rng.choice(_VALUES)
    return msgpack.packb(message)


def nesting(rng, frame):
    """Deep or wide containers, in the place of a value."""
    depth = rng.choice((1, 10, 600, 2000))
    inner = rng.choice((b"\x91", b"\x81\xa1a", b"\xdc\x04\x00", b"\xde\x00\xff\xa1a")) * depth
    wide = rng.choice((b"\x80", b"\x90", b"\xa2ab", b"\xc0", b"\x81\xa1a\xc0"))
    body = rng.choice((inner + b"\xc0", b"\xdc\x03\xff" + wide * 1023, b"\xdc\x27\x10" + wide * 10))
    return rng.choice((body, b"\x81\xa6images" + body, frame[:-1] + body))


def noise(rng, frame):
    """No frame at all."""
    return rng.randbytes(rng.choice((0, 1, 5, 100, 5000)))


KINDS = (flip, cut, lengths, fields, nesting, noise)


def mutations(seed, count, frames=None):
    """Yields `count` damaged frames."""
    rng, frames = random.Random(seed), frames or FRAMES
    for number in range(count):
        yield KINDS[number % len(KINDS)](rng, rng.choice(frames))


def _places(tree):
    for key, value in tree.items():
        yield tree, key
        if isinstance(value, dict):
            yield from _places(value)
