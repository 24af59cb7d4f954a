"""Kernels as int8 with one scale per output channel: half of what they take in bfloat16.

A linear {"kernel": [...,in,out], "bias"} becomes {"kernel": int8, "kernel_scale": float32
[...,out], "bias"}, where the kernel is int8 times scale. `layers.Linear` reads both forms. A scale
belongs to how a kernel is stored: it is not counted as a parameter (`params.count`).
"""

import jax
import jax.numpy as jnp

SCALE = "kernel_scale"
LEVELS = 127  # largest magnitude of an int8 that has its negative


def quantize(kernel):
    """Rounds a kernel [...,in,out] to (int8 of its shape, scale [...,out] float32).

    The largest weight of a channel becomes 127 or -127, and no weight moves by more than half a
    scale. A channel of zeros gets the scale 1.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-2)
    scale = jnp.where(largest == 0, 1.0, largest / LEVELS)  # NaN stays to be seen
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


def dequantized(params):
    """Returns a nested dict of parameters with every int8 kernel as the float32 that it stands for.

    Kernels without a scale, and all other leaves, stay as they are.
    """
    if not isinstance(params, dict):
        return params
    params = {name: dequantized(child) for name, child in params.items()}
    if SCALE in params:
        scale = params.pop(SCALE)[..., None, :]
        params["kernel"] = params["kernel"].astype(jnp.float32) * scale
    return params


def stored(frozen, dtype):
    """Returns frozen parameters as they are kept: `config.model.frozen_dtype` says how.

    Args:
      frozen: nested dict, in-memory or canonical layout.
      dtype: "bfloat16", "float32", or "int8": of the kernels in the DiT's blocks; the rest, 2 % of
        the values at full size, is bfloat16 then.

    Raises:
      ValueError: "int8", and none of these kernels is frozen.
    """
    if dtype != "int8":
        return jax.tree.map(lambda x: x.astype(dtype), frozen)
    blocks = {k: x for k, x in frozen.get("dit", {}).items() if k.split("_")[0] == "blocks"}
    int8 = _with_int8_kernels(blocks)
    if not any(x.dtype == jnp.int8 for x in jax.tree.leaves(int8)):
        raise ValueError(
            "config.model.frozen_dtype='int8' is for kernels of the DiT's blocks that do not "
            "learn, and config.train.trainable leaves none; use 'bfloat16'"
        )
    rest = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    return rest | {"dit": rest["dit"] | int8}


def quantized_like(params, other):
    """Returns nested dict `params` with the kernels quantised that are so in `other`.

    Args:
      params, other: two of the same model; `params` without scales.
    """
    if not isinstance(params, dict):
        return params
    if SCALE in other:
        kernel, scale = quantize(params["kernel"])
        return params | {"kernel": kernel, SCALE: scale}
    return {name: quantized_like(child, other[name]) for name, child in params.items()}


def _with_int8_kernels(params):
    """All kernels as int8, all other leaves as bfloat16."""
    if not isinstance(params, dict):
        return params.astype(jnp.bfloat16)
    new = {name: _with_int8_kernels(x) for name, x in params.items() if name != "kernel"}
    if "kernel" in params:
        new["kernel"], new[SCALE] = quantize(params["kernel"])
    return new
