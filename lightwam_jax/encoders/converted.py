"""Opening weights that the converters wrote, and running a module on many rows.

The meta item of such weights holds the fields of the module: {"config": {"vae": {"version":
"wan21", "dim": 96, ...}}} or {"config": {"text_encoder": {"vocab": 256384, ...}}}.
"""

import dataclasses
import hashlib
import json

import numpy as np

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage


def open_converted(directory, section, key, kind):
    """Opens converted weights: (checkpoint directory, meta item, the section of its config).

    Args:
      directory: the value of config.`key`.
      section: what the config in the meta item must have: "vae" or "text_encoder".
      kind: the converter that makes such weights.

    Raises:
      FileNotFoundError: nothing there. ValueError: it holds something else.
    """
    make = command(kind)
    if not directory:
        raise ValueError(f"config.{key} is empty; give the directory that {make} wrote")
    try:
        path = checkpoint.find_checkpoint(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config.{key}={str(directory)!r} holds no converted weights; make them with: {make}"
        ) from error
    meta = storage.read_meta(path)
    sections = meta["config"] or {}
    if section not in sections:
        raise ValueError(
            f"config.{key}={str(directory)!r} holds weights of "
            f"{', '.join(sections) or 'something unnamed'}, expected {section}: {make}"
        )
    return path, meta, dict(sections[section])


def command(kind):
    """Returns the command that converts weights: kind "vae" or "t5"."""
    return f"python -m converters {kind} --in FILE --out DIR (docs/weights.md)"


def make_module(kind, fields, path, **given):
    """Returns the module `kind` with the fields of a meta item; `given` are set besides."""
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - names)
    if unknown:
        raise ValueError(
            f"{path} was converted by another version: {kind.__name__} has no field "
            f"{', '.join(unknown)}; convert again"
        )
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return kind(**{**fields, **given})


def checksum(*values):
    """Returns 16 hexadecimal digits that depend on JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def in_parts(function, rows, most):
    """function(rows) in parts of at most `most` (a power of two) rows, on the host.

    Parts are filled up to a power of two with repeated rows: few sizes are ever compiled.
    """
    out = []
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        size = 1 << (len(part) - 1).bit_length()
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        out.append(np.asarray(function(filled))[: len(part)])
    return np.concatenate(out)
