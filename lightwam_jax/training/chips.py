"""Peak numbers of accelerators, by the makers' data sheets (dense bfloat16)."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peak numbers of one chip: bfloat16 FLOP/s, bytes/s of its memory and of its links, bytes.

    The links count one way: half of what the makers call bidirectional.
    """

    flops: float
    memory: float
    links: float
    capacity: float


CHIPS = {
    # docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e
    "v4": Chip(275e12, 1228e9, 300e9, 32e9),
    "v5e": Chip(197e12, 819e9, 200e9, 16e9),
    "v5p": Chip(459e12, 2765e9, 600e9, 95e9),
    "v6e": Chip(918e12, 1638e9, 400e9, 32e9),
    # NVIDIA's data sheets; SXM boards
    "a100": Chip(312e12, 2039e9, 300e9, 80e9),
    "h100": Chip(989e12, 3350e9, 450e9, 80e9),
    "h200": Chip(989e12, 4800e9, 450e9, 141e9),
}
# What JAX calls them: words that all occur in `device.device_kind`, first match first.
_KINDS = (
    (("TPU v6 lite",), "v6e"),
    (("TPU v5 lite",), "v5e"),
    (("TPU v5",), "v5p"),
    (("TPU v4",), "v4"),
    (("NVIDIA H200",), "h200"),
    (("NVIDIA H100", "HBM3"), "h100"),
    (("NVIDIA A100-SXM4-80GB",), "a100"),
)


def of_kind(device_kind):
    """Returns the `Chip` of a `device.device_kind`, or None where it is not in the table."""
    for words, name in _KINDS:
        if all(word in device_kind for word in words):
            return CHIPS[name]
    return None
