"""Counts what a compiled GPU program launches, and estimates its time on an H100.

  python -m benchmarks.launches FILE      # the text of `compiled.as_text()`; a table by kind

A launch is one instruction of the program that runs a kernel or a copy: a fusion, a library call,
a product. What a loop launches counts as often as the loop runs.

Bytes are what a launch reads and writes at least: of a large array of which a fusion reads a
slice, the slice. The estimate adds up, over all launches, the largest of three times: what any
launch takes, the bytes at the speed of the memory, and the arithmetic at the speed that the
product's tiles leave of the peak. It assumes the speeds of `H100` below. It is not a measurement,
and nothing in it was fitted to one.
"""

import math
import os
import re
import sys
from typing import NamedTuple

from benchmarks import hlo

GIB = 2**30


class Speeds(NamedTuple):
    """What a GPU is assumed to sustain: FLOP/s, bytes/s, multiprocessors, seconds."""

    bfloat16: float
    float32: float
    attention: float  # of fused attention kernels
    memory: float
    multiprocessors: int
    launch_s: float
    loop_s: float  # to enter a loop


# The data sheet has 989e12, 67e12 and 3.35e12; large products and copies reach about this.
H100 = Speeds(700e12, 50e12, 330e12, 2.8e12, 132, 2e-6, 10e-6)
# Rows and columns of a product's tiles, and the share of the peak that a multiprocessor reaches.
TILES = {(128, 256): 1, (256, 128): 1, (128, 128): 0.85, (64, 128): 0.6, (128, 64): 0.6}
SPLIT_FROM = 1536  # terms of a sum from which a library splits it over idle multiprocessors,
MOST_SPLITS, SPLIT_SHARE = 4, 0.9  # into how many parts at most, and what that leaves
CONVOLUTION_SHARE = 0.55  # of the peak

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
        "opt-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
PRODUCTS = ("gemm", "convolution", "attention")


class Launch(NamedTuple):
    """What one instruction launches: how often, and of one launch bytes, FLOPs and seconds."""

    name: str
    kind: str  # of PRODUCTS, a fusion's name without numbers, or the opcode
    times: int
    bytes: int
    flops: int
    seconds: float


def summary(text):
    """Returns the numbers of a program's text, loops in full.

    {"launches", "gemm_launches", "gemm_gib", "other_gib", "estimate_ms"}: "gemm" are all launches
    that multiply matrices (convolutions and fused attention too), "other" is the rest.
    """
    found, loops = launches(text)
    gemms = [x for x in found if x.kind in PRODUCTS]
    gemm_bytes = sum(x.times * x.bytes for x in gemms)
    seconds = sum(x.times * x.seconds for x in found) + loops * H100.loop_s
    return {
        "launches": sum(x.times for x in found),
        "gemm_launches": sum(x.times for x in gemms),
        "gemm_gib": gemm_bytes / GIB,
        "other_gib": (sum(x.times * x.bytes for x in found) - gemm_bytes) / GIB,
        "estimate_ms": 1000 * seconds,
    }


def launches(text):
    """Returns the `Launch`es of a program's text, and how often it enters a loop.

    A loop whose length the text does not tell (`known_trip_count`) counts once; of the branches
    of a condition, the one with the most instructions counts.
    """
    computations, entry = hlo.parse(text)
    found, loops, waiting = [], 0, [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        around = computations[name]
        for instruction in around.values():
            inner, runs = _called(instruction, computations)
            if inner is not None:
                waiting.append((inner, times * runs))
                loops += times * (instruction.opcode == "while")
            elif instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                body = computations.get(instruction.names("calls"), {})
                found.append(_launch(instruction, around, body, times))
    return found, loops


def _called(instruction, computations):
    """The computation that an instruction runs in its place, and how often; or None and 0."""
    if instruction.opcode == "while":
        trips = re.search(r"known_trip_count\W+n\W+(\d+)", instruction.attributes)
        return instruction.names("body"), int(trips[1]) if trips else 1
    if instruction.opcode == "call":
        return instruction.names("to_apply"), 1
    if instruction.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        sides = ("true_computation", "false_computation")
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else map(instruction.names, sides)
        return max(names, key=lambda name: len(computations[name])), 1
    return None, 0


def _launch(instruction, around, body, times):
    """The `Launch` of an instruction: among those `around` it, with the `body` of a fusion."""
    size = _fusion_bytes(body) if body else _plain_bytes(instruction, around)
    inner = [x for x in body.values() if x.opcode in ("dot", "convolution")]
    product, beside = (inner[-1], body) if inner else (instruction, around)
    kind, work, speed = _product(product, beside)
    if kind is None:
        kind = re.sub(r"(\.\d+|_\d+)+$", "", instruction.name) if body else instruction.opcode
    seconds = max(H100.launch_s, size / H100.memory, work / speed)
    return Launch(instruction.name, kind, times, size, work, seconds)


# ---- bytes -------------------------------------------------------------------------------------


def _plain_bytes(instruction, around):
    """Bytes that an instruction outside of fusions reads and writes."""
    if instruction.opcode in SLICES:
        return 2 * hlo.size(instruction.result)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * hlo.size(_operand(instruction, 1, around))
    read = sum(hlo.size(around[name].result) for name in instruction.operands if name in around)
    return read + hlo.size(_computed(instruction))


def _fusion_bytes(body):
    """Bytes that a fusion reads and writes."""
    users = {}
    for inner in body.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)

    def read(name, whole):
        total = 0
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                total += read(user.name, whole)
            elif user.opcode in SLICES and user.operands[0] == name:
                total += hlo.size(user.result)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(total, whole)  # nothing of what is only written into

    parameters = [inner for inner in body.values() if inner.opcode == "parameter"]
    total = sum(read(inner.name, hlo.size(inner.result)) for inner in parameters)
    root = next(inner for inner in body.values() if inner.is_root)
    for made in [body[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while made.opcode == "bitcast":
            made = body[made.operands[0]]
        in_place = made.opcode == "dynamic-update-slice"
        total += hlo.size(_operand(made, 1, body) if in_place else made.result)
    return total


def _operand(instruction, number, around):
    """The type of an operand."""
    return around[instruction.operands[number]].result


def _computed(instruction):
    """The type of what an instruction computes, without the scratch memory of a library call."""
    if instruction.opcode != "custom-call":
        return instruction.result
    return re.sub(r", [su]8\[\d+\]\{0\}", "", instruction.result)


# ---- arithmetic --------------------------------------------------------------------------------


def _product(instruction, around):
    """(kind, FLOPs, FLOP/s) of what multiplies matrices; (None, 0, 1) of anything else."""
    called = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    target = called[1] if called and instruction.opcode == "custom-call" else instruction.opcode
    is_conv = target == "convolution" or "cudnn$conv" in target
    is_gemm = target == "dot" or "matmul" in target or "gemm" in target
    if not (is_conv or is_gemm or "fmha" in target):
        return None, 0, 1
    shape = hlo.arrays(_computed(instruction))[0][1]
    (dtype, left), (_, right) = (
        hlo.arrays(_operand(instruction, number, around))[0] for number in (0, 1)
    )
    peak = H100.float32 if dtype == "f32" else H100.bfloat16
    if is_gemm:
        axes = re.search(r'lhs_contracting_dim(?:ension)?s\W+([\d", ]*)', instruction.attributes)
        terms = math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1]))
        return "gemm", 2 * math.prod(shape) * terms, peak * _share(shape, terms)
    if is_conv:
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
        features = right[labels[1].index("o")]
        work = 2 * math.prod(shape) * math.prod(right) // features
        return "convolution", work, peak * CONVOLUTION_SHARE
    work = 4 * math.prod(left) * right[1]  # of queries and keys [B,L,N,K]
    work = work * 5 // 2 if "Backward" in target else work
    return "attention", work, H100.attention


def _share(shape, terms):
    """Share of the peak that a product of this shape and number of terms reaches."""
    rows, columns = (1, 1, *shape)[-2:]
    count = math.prod(shape) // (rows * columns)
    return max(best * _filled(count, rows, columns, terms, tile) for tile, best in TILES.items())


def _filled(count, rows, columns, terms, tile):
    """Share of multiprocessors and tiles that `count` products [rows, columns] fill."""
    tiles = count * math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
    useful = count * rows * columns / (tiles * math.prod(tile))
    splits = max(1, min(MOST_SPLITS, H100.multiprocessors // tiles)) if terms >= SPLIT_FROM else 1
    waves = math.ceil(tiles * splits / H100.multiprocessors)
    busy = tiles * splits / (waves * H100.multiprocessors)
    return useful * busy * (SPLIT_SHARE if splits > 1 else 1)


def main(path):
    """Prints a program's launches by kind, those that take the most time first."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    table = {}
    for x in launches(text)[0]:
        row = (x.times, x.times * x.bytes / GIB, x.times * x.seconds * 1000)
        table[x.kind] = tuple(map(sum, zip(table.get(x.kind, (0, 0, 0)), row)))
    print("launches       GiB   estimated ms  kind")
    for kind, (times, size, ms) in sorted(table.items(), key=lambda item: -item[1][2]):
        print(f"{times:8} {size:9.3f} {ms:14.3f}  {kind}")
    print(*(f"{name} {value:.6g}" for name, value in summary(text).items()), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isfile(sys.argv[1]):
        sys.exit("error: expected one file, which python -m benchmarks.aot --text DIR writes")
    main(sys.argv[1])
