"""LayerNorm and RMSNorm whose derivatives keep the input and its statistics, nothing of its size.

What JAX derives by itself keeps float32 arrays of the input's size and reads them in several
passes; these read the input and the gradient twice. Statistics and outputs are float32, and the
caller casts. The statistics are named "statistics" for the rematerialisation policies of
`blocks.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, [...,D] -> [...,D] float32; with scale and bias if `affine`."""

    eps: float
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        width, scale, bias = x.shape[-1:], None, None
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, width)
            bias = self.param("bias", nn.initializers.zeros, width)
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, [...,D] -> [...,D] float32, with scale."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:]), self.eps)


def normalize(x, eps):
    """LayerNorm without its affine part, over the last axis: float32 statistics and output.

    bfloat16 values are read once: that their mean may be large against their deviation costs
    fewer digits in float32 than the values have lost already. float32 values are read twice.
    """
    once, x = x.dtype == jnp.bfloat16, x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    if once:
        variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
        return (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
    x = x - mean
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
    """(x - mean) / sqrt(variance + eps) * scale + bias; scale and bias [D], or both None."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = checkpoint_name(wide.mean(axis=-1, keepdims=True), "statistics")
    variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + eps), "statistics")
    y = (wide - mean) * inverse
    if scale is not None:
        y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y, (x, mean, inverse, scale, bias)


def _layer_norm_backward(eps, kept, g):
    x, mean, inverse, scale, bias = kept
    y = (x.astype(jnp.float32) - mean) * inverse
    d_scale = d_bias = None
    if scale is not None:
        d_scale, d_bias = _over_rows(g * y, scale.dtype), _over_rows(g, bias.dtype)
        g = g * scale.astype(jnp.float32)
    along_y = (g * y).mean(axis=-1, keepdims=True)
    d_x = inverse * (g - g.mean(axis=-1, keepdims=True) - y * along_y)
    return d_x.astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, eps):
    """x / sqrt(mean square + eps) * scale, scale [D]."""
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).mean(axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(square + eps), "statistics")
    return wide * inverse * scale.astype(jnp.float32), (x, inverse, scale)


def _rms_norm_backward(eps, kept, g):
    x, inverse, scale = kept
    y = x.astype(jnp.float32) * inverse
    d_scale = _over_rows(g * y, scale.dtype)
    g = g * scale.astype(jnp.float32)
    d_x = inverse * (g - y * (g * y).mean(axis=-1, keepdims=True))
    return d_x.astype(x.dtype), d_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _over_rows(x, dtype):
    """The sum of [...,D] over all but the last axis."""
    return x.reshape(-1, x.shape[-1]).sum(axis=0).astype(dtype)
