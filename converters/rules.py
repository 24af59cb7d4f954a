"""The two-way table engine: one row moves a tensor from a PyTorch file to our tree and back.

A row is `Rule(source, target, transform)`. Source keys ("blocks.{block}.ffn.0.weight") and target
paths ("dit/blocks/ffn/0/kernel") are templates; a field in braces stands for a number if it is one
of `NUMBERS`, for any one name otherwise. A field of the source that the target lacks is a stacking
index: its tensors become one array [n, ...] in ascending order. Both directions come from the same
row, and every key must be claimed by exactly one row.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

NUMBERS = ("block", "lora", "layer", "i", "j")  # fields that stand for digits only
_FIELD = re.compile(r"\{(\w+)\}")


class Transform(NamedTuple):
    """A change of layout and its inverse, on one (unstacked) array."""

    forward: Callable
    inverse: Callable


SAME = Transform(lambda x: x, lambda x: x)
KERNEL = Transform(lambda x: x.T, lambda x: x.T)  # torch [out, in] <-> [in, out]


class Rule(NamedTuple):
    """A row of a table."""

    source: str
    target: str
    transform: Transform = SAME


def linear_rows(source, target, transform=KERNEL):
    """Rows of a layer with weight and bias; `transform` is its kernel's (of a convolution, say)."""
    return [Rule(f"{source}.weight", f"{target}/kernel", transform),
            Rule(f"{source}.bias", f"{target}/bias")]


def norm_rows(source, target):
    """Rows of a LayerNorm."""
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


class Match(NamedTuple):
    """Where a source key goes: the target path and its place in the stack (None: not stacked)."""

    rule: Rule
    target: str
    index: int | None


def match_sources(rules, keys, what="file"):
    """Assigns every source key to its row -> {key: Match}.

    Raises:
      ValueError: keys that no row claims, listed, or a key that several claim.
    """
    claimed, unknown = _claims(rules, keys, "source")
    if unknown:
        raise ValueError(f"{what} has {len(unknown)} keys this converter does not know: "
                         f"{some_of(unknown)}; is it a file of another model, or do its keys have "
                         "a prefix?")
    found = {}
    for key, (rule, fields) in claimed.items():
        stacking = _stacking_field(rule)
        index = int(fields[stacking]) if stacking else None
        found[key] = Match(rule, rule.target.format(**fields), index)
    return found


def match_targets(rules, paths, layers):
    """Assigns every target path to its row -> {path: (row, its source keys, is it a stack)}.

    Args:
      layers: as for `from_params`.

    Raises:
      ValueError: paths that no row claims, listed, or a path that several claim.
    """
    claimed, unknown = _claims(rules, paths, "target")
    if unknown:
        raise ValueError(f"no row of the table writes {some_of(unknown)}")
    found = {}
    for path, (rule, fields) in claimed.items():
        stacking = _stacking_field(rule)
        places = [{stacking: index} for index in layers[stacking]] if stacking else [{}]
        keys = [rule.source.format(**fields, **place) for place in places]
        found[path] = rule, keys, stacking is not None
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
    tensors = {}
    for path, (rule, keys, stacked) in match_targets(rules, params, layers).items():
        parts = params[path] if stacked else [params[path]]
        if len(parts) != len(keys):
            raise ValueError(f"{path} stacks {len(parts)} layers, expected {len(keys)}: "
                             f"{some_of(keys)}")
        for key, part in zip(keys, parts):
            tensors[key] = np.ascontiguousarray(rule.transform.inverse(part))
    return tensors


def target_shapes(rules, shapes, what="file"):
    """{source key: shape} -> {target path: shape} without any array."""
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
    out = {}
    for path, (rule, keys, stacked) in match_targets(rules, shapes, layers).items():
        part = shapes[path][1:] if stacked else shapes[path]
        out.update(dict.fromkeys(keys, _shape_after(rule.transform.inverse, part)))
    return out


def some_of(names, most=8):
    """The first names in order, for a message."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _claims(rules, names, side):
    """({name: (row, fields)}, [names of no row]) by one template of the rows.

    Args:
      side: "source" or "target".

    Raises:
      ValueError: a name that several rows claim.
    """
    patterns = [(rule, _pattern(getattr(rule, side))) for rule in rules]
    claimed, unknown = {}, []
    for name in names:
        hits = [(rule, m.groupdict()) for rule, pattern in patterns
                if (m := pattern.fullmatch(name))]
        if len(hits) > 1:
            raise ValueError(f"{name} is claimed by {len(hits)} rows of the table: "
                             f"{[getattr(rule, side) for rule, _ in hits]}")
        if hits:
            claimed[name] = hits[0]
        else:
            unknown.append(name)
    return claimed, unknown


def _pattern(template):
    """Template -> compiled regular expression with a group per field."""
    literal, *rest = _FIELD.split(template)  # literal, field, literal, field, ...
    pattern = re.escape(literal)
    for name, literal in zip(rest[::2], rest[1::2]):
        kind = r"\d+" if name in NUMBERS else r"[^./]+"
        pattern += f"(?P<{name}>{kind}){re.escape(literal)}"
    return re.compile(pattern)


def _stacking_field(rule):
    """The field that the source has and the target lacks, or None."""
    kept = _FIELD.findall(rule.target)
    return next((name for name in _FIELD.findall(rule.source) if name not in kept), None)


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
