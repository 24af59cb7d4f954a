"""LoRA: a linear whose base weights keep their path, with two low-rank factors beside them."""

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lightwam_jax.models import quantized
from lightwam_jax.models.layers import Linear, dot, torch_uniform


class LoRALinear(nn.Module):
    """`x W + b + (alpha/rank) (x A) B` over the last axis; rank 0 is a plain Linear.

    Parameters: kernel [in,out], bias [out], lora_a [in,R] (kaiming-uniform), lora_b [R,out]
    (zero, so that a fresh LoRA changes nothing). Source: wan_video_dit.py:62-91.

    The output and `x A` are named "linear" and "low_rank" for the rematerialisation policies of
    `blocks.py`: what the backward pass needs of the two products.
    """

    features: int
    rank: int = 0
    alpha: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        base = Linear(self.features, self.dtype)
        nn.share_scope(self, base)
        y = base(x)
        if not self.rank:
            return checkpoint_name(y, "linear")
        a = self.param("lora_a", torch_uniform(x.shape[-1]), (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        low = checkpoint_name(dot(x.astype(self.dtype), a.astype(self.dtype)), "low_rank")
        # Scaled here rather than behind B: R numbers per token instead of `features`.
        y = y + dot(low * (self.alpha / self.rank), b.astype(self.dtype))
        return checkpoint_name(y, "linear")


def merge_lora(params, alpha):
    """Folds every lora_a, lora_b into its kernel and drops them: exact up to rounding.

    Args:
      params: nested dict; leaves may be stacked over blocks, [n, ...]. Kernels of int8 with a
        scale become float32, with LoRA or without.
      alpha: of the LoRA; the rank is read from the shapes.
    """
    if not isinstance(params, dict):
        return params
    if quantized.SCALE in params:
        params = quantized.dequantized(params)
    if "lora_a" not in params:
        return {name: merge_lora(child, alpha) for name, child in params.items()}
    a, b = params["lora_a"], params["lora_b"]
    kernel = params["kernel"]
    delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * (alpha / a.shape[-1])
    merged = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return {"kernel": merged, "bias": params["bias"]}
