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

from lightwam_jax.checkpoint.streamed import StreamedArray, rows_per_part

NUMBERS = ("block", "lora", "layer", "i", "j")  # fields that stand for digits only
_FIELD = re.compile(r"\{(\w+)\}")


class Transform(NamedTuple):
    """A change of layout and its inverse, on one (unstacked) array."""

    forward: Callable
    inverse: Callable


SAME = Transform(lambda x: x, lambda x: x)
KERNEL = Transform(lambda x: x.T, lambda x: x.T)  # torch [out, in] <-> [in, out]


class UnknownLayout(ValueError):
    """A file whose keys are those of no layout that we know."""


class LightwamCheckpoint(ValueError):
    """A Light-WAM checkpoint where another file was expected."""


class Untold(ValueError):
    """Flags are missing that say what a file does not tell."""


class Rule(NamedTuple):
    """A row of a table."""

    source: str
    target: str
    transform: Transform = SAME


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple
    dtype: np.dtype


class InMemory:
    """Tensors that are there already, behind the interface of the file readers.

    Attributes:
      name: for messages. entries: {key: Entry} in file order.
    """

    def __init__(self, tensors, name="file"):
        self._tensors, self.name = tensors, name
        self.entries = {key: Entry(x.shape, x.dtype) for key, x in tensors.items()}

    def read(self, key, start=None, stop=None):
        """The tensor, or its rows start..stop-1, as a numpy array."""
        return self._tensors[key][start:stop] if start is not None else self._tensors[key]


class Renamed:
    """Tensors under other keys, {key of the source: new key}; else as `InMemory`."""

    def __init__(self, source, names):
        self.name, self._source = source.name, source
        self.entries = {names[key]: x for key, x in source.entries.items()}
        self._key = {new: key for key, new in names.items()}

    def read(self, key, start=None, stop=None):
        """As `InMemory.read`."""
        return self._source.read(self._key[key], start, stop)


class Joined:
    """The tensors of several sources (shards of one model); else as `InMemory`."""

    def __init__(self, sources, name):
        self.name, self.entries, self._source = name, {}, {}
        for source in sources:
            for key, entry in source.entries.items():
                if key in self._source:
                    raise ValueError(
                        f"{source.name} and {self._source[key].name} of {name} both hold {key}; "
                        "delete the one that does not belong"
                    )
                self.entries[key], self._source[key] = entry, source

    def read(self, key, start=None, stop=None):
        """As `InMemory.read`."""
        return self._source[key].read(key, start, stop)


def linear_rows(source, target, transform=KERNEL):
    """Rows of a layer with weight and bias; `transform` is its kernel's (of a convolution, say)."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", transform),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


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
        raise ValueError(
            f"{what} has {len(unknown)} keys this converter does not know: {some_of(unknown)}; "
            "is it a file of another model, or do its keys have a prefix?"
        )
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


def to_streams(rules, source, advance=lambda count: None):
    """Source tensors -> {target path: `StreamedArray`}, stacked where the table stacks.

    Args:
      source: tensors to read (`files.InMemory` or a file's reader); every key is used.
      advance: called with the number of bytes of each part that was read.

    Raises:
      ValueError: unknown keys, or a stack whose parts differ in shape or dtype.
    """
    stacks, out = {}, {}
    for key, match in match_sources(rules, source.entries, source.name).items():
        if match.index is None:
            out[match.target] = _single(source, key, match.rule.transform, advance)
        else:
            stacks.setdefault(match.target, []).append((match.index, key, match.rule.transform))
    for target, parts in stacks.items():
        out[target] = _stack(source, target, sorted(parts, key=lambda part: part[0]), advance)
    return out


def to_params(rules, tensors, what="file"):
    """{source key: array} -> {target path: array}: `to_streams` in memory."""
    streams = to_streams(rules, InMemory(tensors, what))
    return {path: stream.whole() for path, stream in streams.items()}


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
            raise ValueError(
                f"{path} stacks {len(parts)} layers, expected {len(keys)}: {some_of(keys)}"
            )
        for key, part in zip(keys, parts):
            tensors[key] = np.ascontiguousarray(rule.transform.inverse(part))
    return tensors


def target_shapes(rules, shapes, what="file"):
    """{source key: shape} -> {target path: shape} without any array."""
    out, stacked = {}, {}
    for key, match in match_sources(rules, shapes, what).items():
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


def shapes_of(arrays):
    """{name: shape} of arrays, or of anything that has a shape."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def known(rules, keys):
    """How many of the keys a row of the table has as its source."""
    return len(_claims(rules, keys, "source")[0])


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
        found = ((rule, pattern.fullmatch(name)) for rule, pattern in patterns)
        hits = [(rule, match.groupdict()) for rule, match in found if match]
        if len(hits) > 1:
            templates = [getattr(rule, side) for rule, _ in hits]
            raise ValueError(f"{name} is claimed by {len(hits)} rows of the table: {templates}")
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


def _single(source, key, transform, advance):
    """A tensor that goes into no stack; one that keeps its layout is read in pieces."""
    shape, dtype = source.entries[key]
    target = _shape_after(transform.forward, shape)
    rows = rows_per_part(target, dtype) if transform is SAME else target[0]

    def parts():
        for start in range(0, target[0], rows):
            if transform is SAME:
                part = source.read(key, start, min(start + rows, target[0]))
            else:
                part = transform.forward(source.read(key))
            advance(part.nbytes)
            yield part

    return StreamedArray(target, dtype, rows, parts)


def _stack(source, target, layers, advance):
    """Tensors [...] of several layers, in order, as one array [n, ...]."""
    _, first, transform = layers[0]
    shape, dtype = source.entries[first]
    for _, key, _ in layers:
        if (entry := source.entries[key]) != (shape, dtype):
            raise ValueError(
                f"{source.name}: {key} is {entry.dtype}{list(entry.shape)}, but {first}, which "
                f"stacks into the same {target}, is {dtype}{list(shape)}"
            )
    shape = (len(layers), *_shape_after(transform.forward, shape))
    rows = rows_per_part(shape, dtype)

    def parts():
        for start in range(0, len(layers), rows):
            some = layers[start : start + rows]
            part = np.empty((len(some), *shape[1:]), dtype)
            for place, (_, key, change) in enumerate(some):
                part[place] = change.forward(source.read(key))
            advance(part.nbytes)
            yield part

    return StreamedArray(shape, dtype, rows, parts)


def _shape_after(function, shape):
    return tuple(jax.eval_shape(function, jax.ShapeDtypeStruct(tuple(shape), np.float32)).shape)
