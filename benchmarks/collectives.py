"""What the devices exchange in a step: as it is written, and what the compiler made of that.

How often and how much is exchanged follows from the traced step (its jaxpr), where
`jax.shard_map` spells out every exchange. The text of the compiled program adds what the trace
cannot tell: which exchanges run while the devices compute, and what the compiler exchanges besides.

Bytes are those of the whole array: what an all-gather leaves on every device, what a
reduce-scatter or an all-reduce takes from every device.
"""

import math
import re
from typing import NamedTuple

from lightwam_jax import sharding
from lightwam_jax.training import flops

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_PRIMITIVES = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# The compiler exchanges numbers (losses, norms) and small gradients in ways of its own; arrays
# smaller than this count for nothing in the comparison.
SMALL_BYTES = sharding.MIN_SPLIT_BYTES


class Collective(NamedTuple):
    """An array that the devices along some axes of the mesh exchange, `times` times per step."""

    kind: str  # of KINDS
    dtype: str
    shape: tuple  # of the whole array
    axes: tuple
    times: int

    @property
    def bytes(self):
        return math.prod(self.shape) * _itemsize(self.dtype)

    def group(self, mesh):
        """Devices that take part on a mesh of these sizes, {axis: size}."""
        return math.prod(mesh[axis] for axis in self.axes)

    def wire_bytes(self, mesh):
        """Bytes that a device sends, all times together."""
        if self.kind == "collective-permute":
            return self.times * self.bytes
        ways = 2 if self.kind == "all-reduce" else 1
        return self.times * self.bytes * ways * (1 - 1 / self.group(mesh))


def written(jaxpr, mesh):
    """Returns the `Collective`s of a jaxpr, loops in full.

    Args:
      jaxpr: as in `jax.jit(step).trace(...).jaxpr`.
      mesh: {axis: size}; an exchange with oneself is none.
    """
    found = []
    for times, eqn in flops.equations(jaxpr):
        if kind := _PRIMITIVES.get(eqn.primitive.name):
            axes = eqn.params.get("axes", eqn.params.get("axis_name"))
            axes = axes if isinstance(axes, tuple) else (axes,)
            for x in eqn.outvars if kind == "all-gather" else eqn.invars:
                found.append(Collective(kind, str(x.aval.dtype), x.aval.shape, axes, times))
    return [c for c in found if c.group(mesh) > 1]


def totals(collectives, instructions=()):
    """Returns {kind: {"count", "gib", "overlapped"}} per step.

    `overlapped` is the share of the bytes of the compiled `instructions` behind which other work
    hides, each taken once.
    """
    table = {}
    for kind in KINDS:
        rows = [c for c in collectives if c.kind == kind]
        compiled = [i for i in instructions if i.kind == kind]
        hidden = sum(i.bytes for i in compiled if i.overlapped)
        if rows:
            table[kind] = {
                "count": sum(c.times for c in rows),
                "gib": sum(c.times * c.bytes for c in rows) / 2**30,
                "overlapped": hidden / max(1, sum(i.bytes for i in compiled)),
            }
    return table


def largest(collectives, mesh, count=8):
    """Returns lines about the largest of `collectives`."""
    return [
        f"{c.times} x {c.kind} {c.dtype}{list(c.shape)} over {c.group(mesh)}"
        for c in dict.fromkeys(sorted(collectives, key=lambda c: -c.bytes))
    ][:count]


# ---- the compiled program ----------------------------------------------------------------------

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\b({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """An array that a compiled program exchanges in one place, however often it comes there."""

    kind: str
    dtype: str  # as XLA writes it: f32, bf16
    shape: tuple
    group: int
    overlapped: bool
    name: str

    @property
    def bytes(self):
        return math.prod(self.shape) * _itemsize(self.dtype)


def instructions(hlo):
    """Returns the `Instruction`s in the text of an optimized module (`compiled.as_text()`)."""
    found, seen, computation = [], set(), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, result, kind, start = match.groups()
        arrays = _arrays(result)
        # A TPU runs an all-gather in pieces, fused with the work that hides it; the pieces carry
        # the number of their chain.
        chain = re.search(r'chain_id="(\d+)"', line)
        key = (chain[1], *arrays) if chain else name
        group = _group_size(line)
        if key in seen or group == 1:
            continue
        seen.add(key)
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # inputs come first
        if kind == "reduce-scatter":
            arrays = [(dtype, (group, *shape)) for dtype, shape in arrays]
        elif "all-reduce-scatter" in computation:  # a fusion that keeps one part of the sum
            kind = "reduce-scatter"
        hidden = bool(start or chain) or "async" in computation
        found += [Instruction(kind, *array, group, hidden, name) for array in arrays]
    return found


def compare(collectives, instructions):
    """Returns what the compiler made of the `Collective`s of a step.

    XLA may gather in bfloat16 what is only used in bfloat16, so that sizes are counted in values.

    Returns:
      {"gradient_dtypes": of the sums, "unplanned": lines about exchanges that were not written:
      arrays of at least `SMALL_BYTES` of a size that is not exchanged in this way}. A
      reduce-scatter that became an all-reduce, at twice the traffic, is among them.
    """
    sizes = {(c.kind, math.prod(c.shape)) for c in collectives}
    large = [i for i in instructions if i.bytes >= SMALL_BYTES]
    sums = ("reduce-scatter", "all-reduce")
    return {
        "gradient_dtypes": sorted({i.dtype for i in large if i.kind in sums}),
        "unplanned": [
            f"{i.kind} {i.dtype}{list(i.shape)} over {i.group}: {i.name}"
            for i in large
            if (i.kind, math.prod(i.shape)) not in sizes
        ],
    }


def _itemsize(dtype):
    """Bytes of a value of "float32", "bf16", "pred", ..."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _arrays(text):
    return [
        (dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text))
    ]


def _group_size(text):
    """Devices that exchange with each other, in any of the three notations of replica groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    if "source_target_pairs=" in text:
        return 2  # each device has one partner
    raise ValueError(f"no replica groups in {text[:200]!r}")
