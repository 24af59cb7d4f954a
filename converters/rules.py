"""The two-way table engine: one row moves a tensor from a PyTorch file to our tree and back.

A row is `Rule(source, target, transform)`. Source keys ("blocks.{block}.ffn.0.weight") and target
paths ("dit/blocks/ffn/0/kernel") are templates; a field in braces stands for one name. A field of
the source that the target lacks is a stacking index: its tensors become one array [n, ...] in
ascending order. Both directions come from the same row, and every key must be claimed by exactly
one row.
"""

import re
from typing import Callable, NamedTuple

import jax
import numpy as np


class Transform(NamedTuple):
    """A change of layout and its inverse, on one (unstacked) array."""

    forward: Callable
    inverse: Callable


SAME = Transform(lambda x: x, lambda x: x)
KERNEL = Transform(lambda x: x.T, lambda x: x.T)  # torch [out, in] <-> [in, out]


class Rule(NamedTuple):
    source: str
    target: str
    transform: Transform = SAME


class Match(NamedTuple):
    """Where a source key goes: the target path and its place in the stack (None: not stacked)."""

    rule: Rule
    target: str
    index: int | None


def match_sources(rules, keys, what="file"):
    """Assigns every source key to its row -> {key: Match}.

    Raises:
      ValueError: keys that no row claims, listed.
    """
    patterns = [(rule, *_pattern(rule.source)) for rule in rules]
    found, unknown = {}, []
    for key in keys:
        hits = [(rule, m.groupdict()) for rule, pattern, _ in patterns if (m := pattern.match(key))]
        if len(hits) > 1:
            raise ValueError(f"{key} is claimed by {len(hits)} rows of the table: "
                             f"{[rule.source for rule, _ in hits]}")
        if not hits:
            unknown.append(key)
            continue
        rule, fields = hits[0]
        stacking = [name for name in fields if "{" + name + "}" not in rule.target]
        index = int(fields[stacking[0]]) if stacking else None
        found[key] = Match(rule, rule.target.format(**fields), index)
    if unknown:
        raise ValueError(f"{what} has {len(unknown)} keys this converter does not know: "
                         f"{_some(unknown)}; is it a file of another model?")
    return found


def to_params(rules, tensors, what="file"):
    """Source tensors -> {target path: array}, stacked where the table stacks.

    Args:
      tensors: mapping of source key to array; every key is used.

    Raises:
      ValueError: unknown keys, or a stack whose parts differ in shape.
    """
    matches = match_sources(rules, tensors.keys(), what)
    stacks, params = {}, {}
    for key, match in matches.items():
        if match.index is None:
            params[match.target] = np.ascontiguousarray(match.rule.transform.forward(tensors[key]))
        else:
            stacks.setdefault(match.target, []).append((match.index, key, match.rule))
    for target, parts in stacks.items():
        params[target] = _stack(target, sorted(parts), tensors, what)
    return params


def from_params(rules, params, layers):
    """{target path: array} -> source tensors: the inverse of `to_params`.

    Args:
      layers: for each stacking field, the indices its arrays are stacked over, for example
        {"block": range(30), "lora": (0, 1, ...)}.

    Raises:
      ValueError: paths that no row claims, or a stack of another length than its indices.
    """
    patterns = [(rule, *_pattern(rule.target)) for rule in rules]
    tensors, unknown = {}, []
    for path, array in params.items():
        hit = next(((rule, m.groupdict()) for rule, pattern, _ in patterns
                    if (m := pattern.match(path))), None)
        if hit is None:
            unknown.append(path)
            continue
        rule, fields = hit
        stacking = [name for name in _pattern(rule.source)[1] if name not in fields]
        if not stacking:
            tensors[rule.source.format(**fields)] = np.ascontiguousarray(
                rule.transform.inverse(array))
            continue
        indices = list(layers[stacking[0]])
        if len(indices) != len(array):
            raise ValueError(f"{path} stacks {len(array)} layers, expected {len(indices)}: "
                             f"{indices}")
        for index, part in zip(indices, array):
            key = rule.source.format(**fields, **{stacking[0]: index})
            tensors[key] = np.ascontiguousarray(rule.transform.inverse(part))
    if unknown:
        raise ValueError(f"no row of the table writes {_some(unknown)}")
    return tensors


def target_shapes(rules, shapes, what="file"):
    """{source key: shape} -> {target path: shape} without any array, in both senses of a check."""
    matches = match_sources(rules, shapes.keys(), what)
    out, stacked = {}, {}
    for key, match in matches.items():
        shape = _shape_after(match.rule.transform.forward, shapes[key])
        if match.index is None:
            out[match.target] = shape
        else:
            stacked.setdefault(match.target, {})[match.index] = shape
    for target, parts in stacked.items():
        if len(set(parts.values())) > 1:
            raise ValueError(f"{what}: layers of {target} differ in shape: {parts}")
        out[target] = (len(parts), *next(iter(parts.values())))
    return out


def source_shapes(rules, shapes, layers):
    """{target path: shape} -> {source key: shape}: the inverse of `target_shapes`."""
    patterns = [(rule, *_pattern(rule.target)) for rule in rules]
    out = {}
    for path, shape in shapes.items():
        rule, fields = next((rule, m.groupdict()) for rule, pattern, _ in patterns
                            if (m := pattern.match(path)))
        stacking = [name for name in _pattern(rule.source)[1] if name not in fields]
        for index in layers[stacking[0]] if stacking else [None]:
            extra = {stacking[0]: index} if stacking else {}
            part = tuple(shape[1:]) if stacking else tuple(shape)
            out[rule.source.format(**fields, **extra)] = _shape_after(rule.transform.inverse, part)
    return out


def _stack(target, parts, tensors, what):
    """One preallocated array filled part by part: never two copies of the whole stack."""
    _, first_key, rule = parts[0]
    first = rule.transform.forward(tensors[first_key])
    out = np.empty((len(parts), *first.shape), first.dtype)
    for place, (_, key, rule) in enumerate(parts):
        part = rule.transform.forward(tensors[key])
        if part.shape != first.shape or part.dtype != first.dtype:
            raise ValueError(f"{what}: {key} is {part.dtype}{part.shape}, but {first_key}, which "
                             f"stacks into the same {target}, is {first.dtype}{first.shape}")
        out[place] = part
    return out


def _shape_after(function, shape):
    return tuple(jax.eval_shape(function, jax.ShapeDtypeStruct(tuple(shape), np.float32)).shape)


def _pattern(template):
    """Template -> (compiled regular expression, field names)."""
    names = re.findall(r"\{(\w+)\}", template)
    parts = re.split(r"\{\w+\}", template)
    pattern = re.escape(parts[0])
    for name, part in zip(names, parts[1:]):
        pattern += rf"(?P<{name}>[^./]+)" + re.escape(part)
    return re.compile(f"^{pattern}$"), names


def _some(names, most=8):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
