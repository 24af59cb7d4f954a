"""Bottleneck adapters: residual corrections of the token stream after chosen blocks."""

import flax.linen as nn
import jax.numpy as jnp

from lightwam_jax.models.layers import Linear, gelu, layer_norm


class Adapter(nn.Module):
    """`x + scale * up(gelu(down(norm(x))))` on tokens [B,S,D], bottleneck width E.

    `up` starts at zero, so a fresh adapter passes x through. Source: wan_video_dit.py:381.
    """

    width: int
    scale: float = 1.0
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        hidden = layer_norm(self.eps, name="norm")(x).astype(self.dtype)
        hidden = gelu(Linear(self.width, self.dtype, name="down")(hidden))
        up = Linear(x.shape[-1], self.dtype, zero_init=True, name="up")
        return x + self.scale * up(hidden)


def default_adapter_layers(num_layers):
    """Layers adapted when none are named: 55, 70, 85 and 100 % of the depth, rounded half-even."""
    return tuple(sorted({round((num_layers - 1) * p) for p in (0.55, 0.70, 0.85, 1.0)}))
