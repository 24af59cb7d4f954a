"""Blocks of the transformers with what only depends on the weights folded into them.

What both deployed forms are made of, `deploy.py` and `deploy_flow.py`: how weights are folded, and
the blocks that compute with them. Letters as in models/layers.py; n is the number of blocks.
A linear is {"kernel": [in,out], "bias": [out]}.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import build
from lightwam_jax.models import action, layers, lora, norms
from lightwam_jax.models.layers import gelu


def fold_block(block, rows, config):
    """Returns a block's weights and those of its context; rows [6,D]: modulation of t = 0."""
    block = lora.merge_lora(jax.tree.map(lambda x: x.astype(jnp.float32), block), config.lora_alpha)
    own, cross, ffn = block["self_attn"], block["cross_attn"], block["ffn"]
    shift1, scale1, gate1, shift2, scale2, gate2 = block["modulation"][0] + rows
    gated = lambda linear, gate: jax.tree.map(lambda x: x * gate, linear)
    heads = dict(n=config.num_heads, two=2)
    halves = lambda x: einops.rearrange(x, "... (n k two) -> ... (n two k)", **heads)
    qkv = beside(jax.tree.map(halves, own["q"]), jax.tree.map(halves, own["k"]), own["v"])
    weights = {
        "qkv": after(dict(scale=1 + scale1, bias=shift1), qkv),
        "norm_qk": jnp.stack([halves(own[name]["scale"]) for name in ("norm_q", "norm_k")]),
        "o": gated(own["o"], gate1),
        "cross_q": after(block["norm3"], cross["q"]),
        "cross_norm_q": cross["norm_q"]["scale"],
        "cross_o": cross["o"],
        "up": after(dict(scale=1 + scale2, bias=shift2), ffn["0"]),
        "down": gated(ffn["2"], gate2),
    }
    context = beside(cross["k"], cross["v"]) | {"norm_k": cross["norm_k"]["scale"]}
    return jax.tree.map(lambda x: x.astype(config.dtype), (weights, context))


def fold_mlp(old, first="fc1", second="fc2"):
    """A norm and two linears as two linears [first, second]."""
    return [after(old["norm"], old[first]), old[second]]


def after(norm, linear):
    """The linear of `x * scale + bias` of a norm, as a linear of x."""
    kernel = linear["kernel"].astype(jnp.float32)
    kernel, bias = norm["scale"][:, None] * kernel, norm["bias"] @ kernel + linear["bias"]
    return {"kernel": kernel, "bias": bias}


def beside(*linears):
    """Linears of one input as one, their outputs side by side."""
    return {name: jnp.concatenate([x[name] for x in linears], -1) for name in ("kernel", "bias")}


def keys_values(weights, rows, config):
    """Raw context rows [B,L,text_dim] -> keys and values of every block, [n,B,L,N,K] each."""
    first, second = weights["text"]
    context, w = linear(second, gelu(linear(first, rows))), weights["context"]
    heads = dict(n=len(w["norm_k"]), two=2, h=config.num_heads)
    k, v = einops.rearrange(linear(w, context), "b l (n two h k) -> two n b l h k", **heads)
    scale = einops.rearrange(w["norm_k"], "n (h k) -> n 1 1 h k", h=config.num_heads)
    return _rms(k, scale, config.eps, axes=(-2, -1)).astype(v.dtype), v


def with_state(keys_values, weights, text, mask, proprio, config):
    """Returns (keys, values [n,B,L+1,N,K], mask [B,L+1] or None): the text's, then the state's row.

    keys_values: that of the deployed form. The rest: as `deploy.act` has it.
    """
    row = keys_values(weights, linear(weights["proprio"], proprio)[:, None], config)
    keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(text, row))
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    return keys, values, mask


def after_attention(w, x, own, keys, values, mask, config):
    """The rest of a block of the frame, of its queries, keys and values `own`."""
    out = attend(*own, None, config)
    x = x + linear(w["o"], out.reshape(*x.shape[:2], -1))
    x = cross_attended(w, x, keys, values, mask, config)
    # In the compute dtype, not in float32 as elsewhere: on GPUs it then is part of the product.
    h = jax.nn.gelu(linear(w["up"], x, config.eps), approximate=True)
    return x + linear(w["down"], h)


def queries_keys_values(w, qkv, rope, config):
    """The product of a block's "qkv" [B,S,3NK] -> q, k (normed, rotated) and v, [B,S,N,K] each."""
    heads = lambda a: a.reshape(*a.shape[:-1], config.num_heads, config.head_dim)
    qkv = einops.rearrange(qkv, "b s (three d) -> b s three d", three=3)
    qk = _rms_rotated(heads(qkv[:, :, :2]), heads(w["norm_qk"]), *rope, config.eps)
    qk = qk.astype(qkv.dtype)
    return qk[:, :, 0], qk[:, :, 1], heads(qkv[:, :, 2])


def cross_attended(w, x, keys, values, mask, config):
    """x [B,S,D] and what it reads of the context; keys and values [B,L,N,K]."""
    q = linear(w["cross_q"], x, config.eps)
    q = _rms(q, w["cross_norm_q"], config.eps).astype(x.dtype)
    q = q.reshape(*q.shape[:-1], config.num_heads, config.head_dim)
    out = attend(q, keys, values, mask, config)
    return x + linear(w["cross_o"], out.reshape(*x.shape[:2], -1))


def attend(q, k, v, mask, config):
    """`layers.attention` without derivatives, as a `ModelConfig` has it."""
    kernel = build.attention_implementation(config)
    return layers.attention(q, k, v, mask, kernel, differentiable=False)


def _rms_rotated(x, scale, cos, sin, eps):
    """RMSNorm of x [B,S,2,N,K] over (N,K), then rotation of the pairs (i, i + K/2), in float32."""
    cos, sin = (np.tile(a, 2).reshape(-1, 1, 1, x.shape[-1]) for a in (cos, sin))
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x).mean((-2, -1), keepdims=True) + eps)
    a, b = jnp.split(x * scale, 2, axis=-1)
    rotated = jnp.concatenate([a, b], -1) * cos + jnp.concatenate([-b, a], -1) * sin
    return rotated * inverse


def linear(w, x, eps=None):
    """The linear of x [...,in], normalised where `eps` is given."""
    x = x if eps is None else norms.normalize(x, eps)
    return layers.dot(x.astype(w["kernel"].dtype), w["kernel"]) + w["bias"]


def mlp(w, x, eps=action.EPS):
    """Both linears of `fold_mlp` on x [...,in]; its norm has `eps`."""
    return linear(w[1], gelu(linear(w[0], x, eps)))


def _rms(x, scale, eps, axes=(-1,)):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + eps) * scale
