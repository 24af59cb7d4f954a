"""Reads frozen dataclasses from nested dicts, and names what does not fit their annotations."""

import dataclasses
import difflib
import math
import re
import typing

# Config keys that had another name before version 0.2.0, and what has their place now.
RENAMED = {
    "data.pixels": "data.encode_online",
    "data.member": "data.dataset",
    "data.fields.colour": "data.fields.channel_order",
    "data.source=demo": "data.source=lerobot, recorded by lightwam_jax.envs.record",
    "evaluation.replan": "evaluation.replan_steps",
    "demo": "the flags of lightwam_jax.envs.record",
}

# Keys that came later, with the value that keeps the meaning of a config saved without them.
ADDED = {
    "data.action_kinds": (),
    "data.tolerance_s": 0.0,
    "model.action_head": "state_fusion",
    "model.flow_dim": 0,
    "model.flow_ffn_dim": 0,
    "model.flow_steps": 10,
    "model.flow_shift": 5.0,
    "model.flow_init": "random",
    "model.flow_reads": "first_frame",
    "model.flow_noise": "fresh",
    "model.query_anchor": 0.0,
    "train.wandb": "",
}


class ConfigError(ValueError):
    """A mistake in a command's flags or config; its message is all that a person needs to see."""


def section(cls, tree, path):
    """Returns the dataclass `cls` of a nested dict, checked key by key; `path` is for errors.

    Raises:
      ValueError: unknown or missing key, or a value that its annotation does not allow.
    """
    for key in tree:
        check_known(key, cls, path)
    hints = typing.get_type_hints(cls)
    missing = sorted(set(hints) - set(tree))
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; docs/config.md has every key with its default"
        )
    return cls(**{key: _value(kind, tree[key], f"{path}.{key}") for key, kind in hints.items()})


def check_known(key, cls, where):
    """Raises ValueError, with what was meant, where `key` is no field of the dataclass `cls`."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    path = re.sub(r"^config\.(data\.mixture\.[^.]+(?=\.))?", "", f"{where}.{key}")
    if new := RENAMED.get(path) or RENAMED.get(f"data{path}"):
        advice = f"since version 0.2.0 it is {new}"
    raise ValueError(f"{where}.{key} is not a config key; {advice}")


def _value(kind, value, path):
    """`value` as the annotation `kind` of a key has it; the one place where values are checked."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return section(kind, value, path)
    if origin is typing.Literal:
        if type(value) is not type(inner[0]) or value not in inner:
            choices = ", ".join(map(repr, inner))
            new = RENAMED.get(f"{path.removeprefix('config.')}={value}")
            hint = f"; since version 0.2.0 it is {new}" if new else ""
            raise ValueError(f"{path} is {value!r}; expected one of {choices}{hint}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(value) != len(kinds):
            raise ValueError(f"{path} is {value!r}; expected {len(kinds)} values")
        return tuple(_value(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or kind
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}); expected {plain.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; expected a finite number")
    return value


def refuse_old(tree, made_in, redo="train it again"):
    """Raises ValueError where a nested dict has keys of configs from before version 0.2.0.

    Args:
      tree: a config that was saved. made_in: its place. redo: what to do about it.
    """
    old = [f"{key} is now {new}" for key, new in RENAMED.items() if _has(tree, key.split("."))]
    if old:
        raise ValueError(
            f"{made_in} was made before version 0.2.0, when config keys had other names "
            f"({'; '.join(old)}): {redo}, or use the version it was made with"
        )


def with_added(tree):
    """Returns a nested dict, a config that was saved, with the keys of `ADDED` that it lacks."""
    for key, value in ADDED.items():
        part, name = key.split(".")
        if part in tree:
            tree = tree | {part: {name: value} | tree[part]}
    return tree


def _has(tree, keys):
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def check_path(keys, cls, where="config"):
    """Raises ValueError where `keys` (of --config.a.b) lead to no key of the dataclass `cls`."""
    for key in keys:
        if cls is dict:
            return  # which may have any key
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"{where} is a value and has no keys; set {where} itself")
        check_known(key, cls, where)
        where, cls = f"{where}.{key}", typing.get_type_hints(cls)[key]
