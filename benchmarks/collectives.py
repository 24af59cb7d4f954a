"""What the devices exchange: as planned from the parameters, and as found in a compiled program.

Bytes are those of the whole array: what an all-gather leaves on every device, what a
reduce-scatter or an all-reduce takes from every device.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import jax

from lightwam_jax import sharding

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Reductions of numbers (losses, norms) and of gradients too small to split are not planned one by
# one; arrays smaller than this count for nothing in the comparison.
SMALL_BYTES = sharding.MIN_SPLIT_BYTES


class Collective(NamedTuple):
    """One array that devices exchange, `times` times per program.

    Attributes:
      kind: of `KINDS`. dtype, shape: of the whole array. group: devices that take part.
      overlapped: other work runs meanwhile. where: the program's name for it, or the plan's.
    """

    kind: str
    dtype: str
    shape: tuple
    group: int
    times: int
    overlapped: bool
    where: str

    @property
    def bytes(self):
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def wire_bytes(self):
        """Bytes that a device sends, all times together."""
        if self.kind == "collective-permute":
            return self.times * self.bytes
        ways = 2 if self.kind == "all-reduce" else 1
        return self.times * self.bytes * ways * (self.group - 1) / self.group


# ---- the plan ----------------------------------------------------------------------------------


def planned(config, state, shardings):
    """Returns the `Collective`s that a training step needs, by the rules of `sharding.py`.

    Args:
      config: `Config`. state: shapes of a `TrainState`. shardings: its shardings.
    """
    plan = []
    data, fsdp = (shardings.step.mesh.shape[axis] for axis in sharding.AXES)
    last = config.model.adapter_layers[-1]
    # A block's weights are gathered when it runs, and once more for its gradient unless all
    # that the gradient needs was kept.
    runs = config.optimizer.accum_steps * (1 if config.model.remat == "none" else 2)

    for path, leaf, axis in _leaves(state.frozen, shardings.frozen):
        if axis is None or fsdp == 1:
            continue
        stack = re.search(r"blocks_(\d+)/(.*)", path)
        if not stack:
            plan.append(_of(leaf, leaf.shape, "all-gather", fsdp, 1, path))
            continue
        shared = stack[2].startswith(("cross_attn/k/", "cross_attn/v/"))  # by both passes
        passes = 1 if shared or int(stack[1]) > last else 2
        times = leaf.shape[0] * passes * runs
        plan.append(_of(leaf, leaf.shape[1:], "all-gather", fsdp, times, path))

    for path, leaf, axis in _leaves(state.trainable, shardings.trainable):
        if axis is None or fsdp == 1:
            plan.append(_of(leaf, leaf.shape, "all-reduce", data * fsdp, 1, path))
            continue
        plan.append(_of(leaf, leaf.shape, "all-gather", fsdp, 1, path))
        plan.append(_of(leaf, leaf.shape, "reduce-scatter", fsdp, 1, path))
        part = tuple(n // fsdp if i == axis else n for i, n in enumerate(leaf.shape))
        plan.append(_of(leaf, part, "all-reduce", data, 1, path))
    return [c for c in plan if c.group > 1]


def _leaves(tree, shardings):
    pairs = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), place in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name, leaf, sharding.split_axis(place.spec)


def _of(leaf, shape, kind, group, times, where):
    dtype = {"float32": "f32", "bfloat16": "bf16"}[str(leaf.dtype)]
    return Collective(kind, dtype, tuple(shape), group, times, False, where)


# ---- the program -------------------------------------------------------------------------------

_ITEMSIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_OPERATION = re.compile(rf"(?:^|\s)({'|'.join(KINDS)})(-start)?\(")


def found(hlo):
    """Returns the `Collective`s of a compiled program, loops in full.

    Args:
      hlo: text of the optimized module (`compiled.as_text()`).

    Raises:
      ValueError: a loop around a collective whose length the text does not tell.
    """
    computations, entry = _computations(hlo)
    callers = _callers(computations)
    times = _executions(callers, entry)
    result, seen = [], set()
    for name, lines in computations.items():
        for instruction, text in lines:
            match = _OPERATION.search(text)
            if not match or not times(name):
                continue
            # A TPU runs an all-gather in pieces, fused with the work that hides it; the pieces
            # carry the number of their chain.
            chain = re.search(r'chain_id="(\d+)"', text)
            key = (tuple(sorted(callers[name])), chain[1]) if chain else instruction
            if key in seen:
                continue
            seen.add(key)
            kind, start = match[1], bool(match[2])
            arrays = _arrays(text[: match.start(1)])
            if start and kind != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # inputs come first
            group = _group_size(text)
            if kind == "reduce-scatter":
                arrays = [(dtype, (group, *shape)) for dtype, shape in arrays]
            elif "all-reduce-scatter" in name:  # a fusion that keeps one part of the sum
                kind = "reduce-scatter"
            over = start or bool(chain) or "async" in name
            result += [
                Collective(kind, dtype, shape, group, times(name), over, instruction)
                for dtype, shape in arrays
                if group > 1
            ]
    if math.isinf(sum(c.times for c in result)):
        raise ValueError("a loop around a collective has no length in the program's text")
    return result


def _computations(hlo):
    """Returns {computation: [(instruction, its text)]} and the name of the entry."""
    computations, current, entry = {}, None, None
    for line in hlo.splitlines():
        if line.startswith((" ", "\t")):
            match = _INSTRUCTION.match(line)
            if match and current is not None:
                current.append((match[1], match[2]))
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("no ENTRY in the text; expected an optimized HLO module")
    return computations, entry


def _calls(text):
    """Yields (computation, times) of the computations that an instruction runs."""
    for match in _CALLED.finditer(text):
        times = 1
        if " while(" in text and match[0].startswith("body="):
            known = re.search(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)', text)
            times = int(known[1]) if known else None
        for name in match[1].strip("{}").split(","):
            yield name.strip().lstrip("%"), times


def _callers(computations):
    """Returns {computation: [(computation that runs it, how often per run)]}."""
    callers = collections.defaultdict(list)
    for name, lines in computations.items():
        for _, text in lines:
            for called, times in _calls(text):
                if times is None:
                    condition = re.search(r"condition=%?([\w.\-]+)", text)[1]
                    times = _length(computations[condition])
                callers[called].append((name, times))
    return callers


def _executions(callers, entry):
    """Returns count(computation): how often it runs per run of the program."""

    @functools.cache
    def count(name):
        return int(name == entry) + sum(times * count(by) for by, times in callers[name])

    return count


def _length(condition):
    """Length of a loop that counts from 0 up to a constant: the one its condition compares with."""
    constants = [
        int(m[1])
        for _, text in condition
        if (m := re.match(r"[su]32\[\]\S* constant\((\d+)\)", text))
    ]
    return constants[0] if len(constants) == 1 else math.inf


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


# ---- both --------------------------------------------------------------------------------------


def totals(collectives):
    """Returns {kind: {"count", "gib", "overlapped"}} per program; the share that is overlapped."""
    table = {}
    for kind in KINDS:
        rows = [c for c in collectives if c.kind == kind]
        if rows:
            size = sum(c.times * c.bytes for c in rows)
            hidden = sum(c.times * c.bytes for c in rows if c.overlapped)
            table[kind] = {
                "count": sum(c.times for c in rows),
                "gib": size / 2**30,
                "overlapped": hidden / size,
            }
    return table


def compare(plan, program):
    """Returns what a program exchanges that was not planned, and the totals side by side.

    XLA may gather in bfloat16 what is only used in bfloat16, sum over both axes at once, and turn a
    reduce-scatter into an all-reduce: all of these are within the plan except the last, which is
    twice the traffic and shows in the totals.

    Returns:
      {"planned_gib", "found_gib": {"weights", "gradients"}, "largest_planned_mib",
      "largest_found_mib", "unplanned": [lines]}: `unplanned` are arrays of at least `SMALL_BYTES`
      of a size or a kind that the plan has not, or that are exchanged more often than it says.
    """
    sizes = collections.defaultdict(int)
    for c in plan:
        sizes[_purpose(c), math.prod(c.shape)] += c.times
    extra, used = [], collections.defaultdict(int)
    for c in program:
        if c.bytes < SMALL_BYTES:
            continue
        key = (_purpose(c), math.prod(c.shape))
        used[key] += c.times
        if key not in sizes:
            extra.append(f"{c.times} x {c.kind} {c.dtype}{list(c.shape)} over {c.group}: {c.where}")
    extra += [
        f"{used[key]} x {key[0]} of {key[1]} values, planned {sizes[key]}"
        for key in used
        if key in sizes and used[key] > sizes[key]
    ]

    def gib(rows):
        return {
            name: sum(c.times * c.bytes for c in rows if _purpose(c) == name) / 2**30
            for name in ("weights", "gradients")
        }

    def largest(rows):
        return max((c.bytes for c in rows), default=0) / 2**20

    return {
        "planned_gib": gib(plan),
        "found_gib": gib(program),
        "largest_planned_mib": largest(plan),
        "largest_found_mib": largest(program),
        "gradient_dtypes": sorted(
            {c.dtype for c in program if _purpose(c) == "gradients" and c.bytes >= SMALL_BYTES}
        ),
        "unplanned": extra,
    }


def _purpose(c):
    return {"all-gather": "weights", "reduce-scatter": "gradients", "all-reduce": "gradients"}.get(
        c.kind, c.kind
    )
