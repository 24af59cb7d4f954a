"""Parameters as data: paths, who learns, layouts on disk and in memory, counts.

A parameter path is its keys joined by "/", such as `dit/blocks/self_attn/q/lora_a`. On disk
(canonical layout) the blocks are stacked whole, `dit/blocks/... [n,...]`; in memory they are cut
at the adapters into the runs that one scan executes, `dit/blocks_0/...`, `dit/blocks_9/...`.
LoRA leaves are stacked over the layers that have LoRA.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.models import dit, quantized

_RUN = re.compile(r"^(.*\bdit/)blocks_(\d+)/(.*)$")
_STACK = re.compile(r"^(.*\bdit/)blocks/(.*)$")

GROUPS = (  # first match names the group of a path
    ("lora", re.compile(r"/lora_[ab]$")),
    ("adapters", re.compile(r"^dit/adapters_")),
    ("video_head", re.compile(r"^dit/head/")),
    ("backbone", re.compile(r"^dit/")),
    ("action_expert", re.compile(r"^expert/")),
    ("proprio_encoder", re.compile(r"^proprio_encoder/")),
    ("other", re.compile(r"")),
)


def flatten(tree, prefix=""):
    """Nested dict -> {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, dict) else {path: value})
    return flat


def unflatten(flat):
    """{"a/b/c": leaf} -> nested dict."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def partition(params, patterns):
    """Splits a tree into (trainable, frozen) by regular expressions searched in each path.

    Raises:
      ValueError: a pattern that matches nothing (a typo would silently freeze a part).
    """
    flat = flatten(params)
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter; paths look "
                f"like {', '.join(list(flat)[:3])}"
            )
    learns = {path: any(re.search(p, path) for p in patterns) for path in flat}
    return tuple(
        unflatten({path: leaf for path, leaf in flat.items() if learns[path] is wanted})
        for wanted in (True, False)
    )


def merge(*trees):
    """Joins disjoint trees into one.

    Raises:
      ValueError: a path that is in two trees.
    """
    flat = {}
    for tree in trees:
        part = flatten(tree)
        if shared := sorted(set(flat) & set(part)):
            raise ValueError(f"parameters given twice: {shared[:5]}")
        flat.update(part)
    return unflatten(flat)


def check_same_structure(got, expected, what):
    """Compares two trees of arrays (or shapes) leaf by leaf.

    Raises:
      ValueError: lists the missing (-), unexpected (+) and misshapen (~) paths.
    """
    got, expected = (
        {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}
        for tree in (got, expected)
    )
    lines = [f"  - {path} {expected[path]}" for path in sorted(set(expected) - set(got))]
    lines += [f"  + {path} {got[path]}" for path in sorted(set(got) - set(expected))]
    lines += [
        f"  ~ {path}: {got[path]}, expected {expected[path]}"
        for path in sorted(set(got) & set(expected))
        if got[path] != expected[path]
    ]
    if lines:
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(
            f"{what} holds another model's parameters (- missing, + unexpected, "
            f"~ other shape):\n" + "\n".join(lines[:20]) + more
        )


# ---- layouts -----------------------------------------------------------------------------------


def canonical(params):
    """In-memory layout -> on-disk layout; also of any tree of the same paths (gradients, Adam
    moments, the trainable part alone). Works on numpy and jax arrays."""
    flat, runs = {}, {}
    for path, leaf in flatten(params).items():
        if match := _RUN.match(path):
            before, start, after = match.groups()
            runs.setdefault(f"{before}blocks/{after}", []).append((int(start), leaf))
        else:
            flat[path] = leaf
    for path, parts in runs.items():
        parts = [leaf for _, leaf in sorted(parts, key=lambda part: part[0])]
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in parts) else jnp
        flat[path] = parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=0)
    return unflatten(flat)


def segmented(params, config):
    """On-disk layout -> in-memory layout for a `ModelConfig`; the inverse of `canonical`."""
    cuts = dit.segments(config.num_layers, config.adapter_layers, config.lora_layers)
    lora_index = {layer: i for i, layer in enumerate(sorted(config.lora_layers))}
    flat = {}
    for path, leaf in flatten(params).items():
        match = _STACK.match(path)
        if not match:
            flat[path] = leaf
            continue
        before, after = match.groups()
        is_lora = after.endswith(("/lora_a", "/lora_b"))
        for cut in cuts:
            if is_lora and not cut.lora:
                continue
            # LoRA is stacked over the layers that have it; a run has it everywhere or nowhere.
            first = lora_index[cut.start] if is_lora else cut.start
            flat[f"{before}{cut.name}/{after}"] = leaf[first : first + cut.stop - cut.start]
    return unflatten(flat)


# ---- counts ------------------------------------------------------------------------------------


def count(tree):
    """Number of values in a tree of arrays or shapes, without scales of int8 kernels."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if not _is_scale(path[-1:]))


def count_table(params, trainable):
    """Rows (group, total, trainable) in the order of `GROUPS`, then ("total", ...).

    Args:
      params: tree of arrays or shapes; scales of int8 kernels are not counted.
      trainable: patterns of `partition`.
    """
    rows = {name: [0, 0] for name, _ in GROUPS}
    for path, leaf in flatten(params).items():
        if path.endswith("/" + quantized.SCALE):
            continue
        group = next(name for name, pattern in GROUPS if pattern.search(path))
        size = math.prod(leaf.shape)
        rows[group][0] += size
        rows[group][1] += size * any(re.search(p, path) for p in trainable)
    table = [(name, *counts) for name, counts in rows.items() if counts[0]]
    return [*table, ("total", *(sum(row[i] for row in table) for i in (1, 2)))]


def _is_scale(path):
    return jax.tree_util.keystr(path, simple=True) == quantized.SCALE
