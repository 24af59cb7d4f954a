"""Weight files to checkpoint directories and back."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import jax
import numpy as np

from converters import files, lightwam, rules, wan_dit
from lightwam_jax import build, checkpoint, params


def convert(kind, source, out, told, verify=False, say=print):
    """Converts a weight file into a checkpoint directory.

    Args:
      kind: "lightwam" (a released `.pt`) or "dit" (an official Wan transformer).
      source, out: file and directory; `out` must not exist.
      told: what the file does not tell; arguments of `lightwam.model_config`.
      verify: read the directory back and compare every tensor with the file, byte for byte.

    Raises:
      FileExistsError: `out` exists. ValueError: the file is not what `kind` says.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    tensors, meta = _READERS[kind](source, told)
    table = _TABLES[kind]
    flat = rules.to_params(table, tensors, str(source))
    if kind == "lightwam":
        _check_complete(flat, meta["config"]["model"], source)
    meta["source"] = {"file": source.name, "sha256": _sha256(source), "kind": kind}
    checkpoint.save_params(out, params.unflatten(flat), meta)
    total = sum(array.size for array in flat.values())
    say(f"{source}: {len(tensors)} tensors, {total:,} values -> {out}")
    if verify:
        changed = _differences(tensors, _source_tensors(checkpoint.load_params(out)))
        if changed:
            shutil.rmtree(out)
            raise ValueError(f"{len(changed)} tensors changed on the way, {out} was removed: "
                             f"{', '.join(changed[:5])}")
        say(f"read back: all {len(tensors)} tensors identical, byte for byte")


def export(source, out, say=print):
    """Writes a checkpoint directory back as the file it came from: the way back of `convert`.

    A run of `train.py` is written as a Light-WAM `.pt`.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no checkpoint at `source`.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    policy = checkpoint.load_params(source)
    tensors = _source_tensors(policy)
    if _kind(policy) == "lightwam":
        rest = policy.meta.get("checkpoint") or {
            "step": policy.meta["step"], "torch_dtype": "torch.float32"}
        files.write_checkpoint(out, tensors, rest)
    else:
        files.write_tensors(out, tensors)
    say(f"{policy.path} -> {out}: {len(tensors)} tensors")


def _read_lightwam(source, told):
    tensors, rest = files.read_checkpoint(source)
    try:
        config = lightwam.model_config({k: v.shape for k, v in tensors.items()}, **told)
    except KeyError as error:
        raise ValueError(f"{source}: key {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return tensors, {"config": {"model": dataclasses.asdict(config)}, "checkpoint": rest,
                     "step": rest.get("step", 0)}


def _read_dit(source, told):
    tensors = files.read_tensors(source)
    prefixed = all(key.startswith("model.") for key in tensors)
    tensors = {key.removeprefix("model.") if prefixed else key: x for key, x in tensors.items()}
    try:
        fields = wan_dit.model_fields({k: v.shape for k, v in tensors.items()}, told["head_dim"])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return tensors, {"config": {"model": fields}}


_READERS = {"lightwam": _read_lightwam, "dit": _read_dit}
_TABLES = {"lightwam": lightwam.CHECKPOINT, "dit": wan_dit.RULES}


def _check_complete(flat, fields, source):
    """Nothing missing, nothing extra, every shape as the model has it."""
    config = lightwam.configs.ModelConfig(**fields)
    model = build.build_model(config)
    shapes = jax.eval_shape(
        lambda key: params.canonical(build.init_params(model, key, config)), jax.random.key(0))
    params.check_same_structure(params.unflatten(flat), shapes, str(source))


def _kind(policy):
    return policy.meta.get("source", {}).get("kind", "lightwam")


def _source_tensors(policy):
    """The tensors of a stored checkpoint under their file's names."""
    flat = {path: np.asarray(x) for path, x in params.flatten(policy.params).items()}
    fields = policy.meta["config"]["model"]
    layers = wan_dit.stacked_layers(fields["num_layers"], fields["lora_layers"])
    return rules.from_params(_TABLES[_kind(policy)], flat, layers)


def _differences(expected, got):
    """Keys whose tensor is absent on one side or differs in dtype, shape or any byte."""
    same = lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    return sorted(key for key in set(expected) | set(got)
                  if key not in expected or key not in got or not same(expected[key], got[key]))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
