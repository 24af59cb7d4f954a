"""The deployed policy: the action pass, with all that only depends on the weights folded into them.

The same actions as `LightWAM.act`, from fewer and larger products (docs/spec.md section 13):

  - LoRA is merged. Blocks after the last adapter and the video head are gone.
  - Frame 0 is at t = 0, so modulation is a constant. Scale and shift go into the product that
    follows, gates into the product before, and so does the affine part of every norm.
  - q, k and v of a block are one product; keys and values of the context are one for all blocks.
    Those of the text are made once per instruction: a call adds one row, the robot's state.
  - Rotary pairs lie half a head apart instead of side by side; q and k are permuted alike.
  - A learned query is a column W_k q that tokens are multiplied with: they need no keys. Merging
    the queries is linear, and comes before the values. The action steps' positions are constants.

Letters as in models/layers.py; n is the number of blocks that are left, M of merged queries.
A linear is {"kernel": [in,out], "bias": [out]}. All weights have the compute dtype.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import build
from lightwam_jax.models import action, dit, layers, lora, norms
from lightwam_jax.models.layers import gelu


def deployed(params, config, horizon):
    """Returns the weights of the deployment form.

    Args:
      params: all of `LightWAM`, in-memory layout; arrays, or shapes under `jax.eval_shape`.
      config: their `ModelConfig`. horizon: T, steps of an action chunk.
    """
    model, old = build.build_model(config), params["dit"]
    with jax.default_matmul_precision("highest"):
        _, rows = model.apply({"params": params}, method=lambda m: m.dit.embed_time(jnp.zeros(())))
        fold = jax.jit(_fold_block, static_argnames="config")
        blocks, contexts = zip(*(fold(b, rows, config=config) for b in _blocks(old, config)))
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        adapters = [wide(old[f"adapters_{i}"]) for i in config.adapter_layers]
        weights = {
            "patch": old["patch_embedding"],
            "text": [old["text_embedding_0"], old["text_embedding_2"]],
            "proprio": params["proprio_encoder"],
            "context": _beside(*contexts) | {"norm_k": jnp.stack([c["norm_k"] for c in contexts])},
            "blocks": blocks,
            "adapters": [_fold_mlp(adapter, "down", "up") for adapter in adapters],
            "expert": _fold_expert(wide(params["expert"]), model.expert, horizon),
        }
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), weights)


def _blocks(old, config):
    """Yields the parameters of each block up to the last adapter."""
    for segment in dit.segments(config.num_layers, config.adapter_layers, config.lora_layers):
        for i in range(min(segment.stop, config.adapter_layers[-1] + 1) - segment.start):
            yield jax.tree.map(lambda x, i=i: x[i], old[segment.name])


def _fold_block(block, rows, config):
    """Returns a block's weights and those of its context; rows [6,D]: modulation of t = 0."""
    block = lora.merge_lora(jax.tree.map(lambda x: x.astype(jnp.float32), block), config.lora_alpha)
    own, cross, ffn = block["self_attn"], block["cross_attn"], block["ffn"]
    shift1, scale1, gate1, shift2, scale2, gate2 = block["modulation"][0] + rows
    gated = lambda linear, gate: jax.tree.map(lambda x: x * gate, linear)
    heads = dict(n=config.num_heads, two=2)
    halves = lambda x: einops.rearrange(x, "... (n k two) -> ... (n two k)", **heads)
    qkv = _beside(jax.tree.map(halves, own["q"]), jax.tree.map(halves, own["k"]), own["v"])
    weights = {
        "qkv": _after(dict(scale=1 + scale1, bias=shift1), qkv),
        "norm_qk": jnp.stack([halves(own[name]["scale"]) for name in ("norm_q", "norm_k")]),
        "o": gated(own["o"], gate1),
        "cross_q": _after(block["norm3"], cross["q"]),
        "cross_norm_q": cross["norm_q"]["scale"],
        "cross_o": cross["o"],
        "up": _after(dict(scale=1 + scale2, bias=shift2), ffn["0"]),
        "down": gated(ffn["2"], gate2),
    }
    context = _beside(cross["k"], cross["v"]) | {"norm_k": cross["norm_k"]["scale"]}
    return jax.tree.map(lambda x: x.astype(config.dtype), (weights, context))


def _fold_expert(old, expert, horizon):
    """Args: expert: `StateFusionActionExpert`, of whose parameters `old` are."""
    positions = jnp.asarray(layers.sinusoid_table(range(horizon), expert.step_pos_dim))
    poolers = {name.removeprefix("poolers_"): old[name] for name in old if "poolers_" in name}
    mlps = lambda name, several: [_fold_mlp(old[f"{name}_{i}"]) for i, _ in enumerate(several)]
    return {
        "poolers": {name: _fold_pooler(pooler, expert) for name, pooler in poolers.items()},
        "compressors": mlps("compressors", expert.layer_sources),
        "fused": _after(old["fused_norm"], old["fused_proj"]),
        "trunk": mlps("trunk", range(expert.trunk_blocks)),
        "steps": _mlp(_fold_mlp(old["step_pos"]), positions),
        "output": _fold_mlp(old["output"]),
    }


def _fold_pooler(old, expert):
    (wq, wk, wv), (bq, _, bv) = (jnp.split(old["in_proj"][x], 3, -1) for x in ("kernel", "bias"))
    heads = lambda x: einops.rearrange(x, "rows (n k) -> rows n k", n=expert.pool_heads)
    q, wk = heads(old["query_tokens"] @ wq + bq), heads(wk) * (len(bq) // expert.pool_heads) ** -0.5
    # What adds to a query's score for all tokens alike, the softmax takes out: shift, bias of k.
    scores = jnp.einsum("d,dnk,qnk->dnq", old["token_norm"]["scale"], wk, q)
    slots = old.get("query_slot_merge_logits", old.get("query_merge_logits"))
    new = {
        "scores": scores.reshape(len(scores), -1),
        "merge": jnp.atleast_2d(slots),
        "values": _after(old["token_norm"], {"kernel": wv, "bias": bv}),
        "out": old["out_proj"],
        "norm": old["output_norm"],
    }
    if expert.merge_dim:
        new["merged"] = _after(old["merge_norm"], old["merge_proj"])
    return new


def _fold_mlp(old, first="fc1", second="fc2"):
    return [_after(old["norm"], old[first]), old[second]]


def _after(norm, linear):
    """The linear of `x * scale + bias` of a norm, as a linear of x."""
    kernel = linear["kernel"].astype(jnp.float32)
    kernel, bias = norm["scale"][:, None] * kernel, norm["bias"] @ kernel + linear["bias"]
    return {"kernel": kernel, "bias": bias}


def _beside(*linears):
    return {name: jnp.concatenate([x[name] for x in linears], -1) for name in ("kernel", "bias")}


def keys_values(weights, rows, config):
    """Raw context rows [B,L,text_dim] -> keys and values of every block, [n,B,L,N,K] each."""
    first, second = weights["text"]
    context, w = _linear(second, gelu(_linear(first, rows))), weights["context"]
    heads = dict(n=len(w["norm_k"]), two=2, h=config.num_heads)
    k, v = einops.rearrange(_linear(w, context), "b l (n two h k) -> two n b l h k", **heads)
    scale = einops.rearrange(w["norm_k"], "n (h k) -> n 1 1 h k", h=config.num_heads)
    return _rms(k, scale, config.eps, axes=(-2, -1)).astype(v.dtype), v


def act(weights, latents, text, mask, proprio, config, taps=False):
    """Action chunk for the current frame's latents.

    Args:
      weights: from `deployed`. latents: [B,1,H,W,C]. proprio: [B,P], normalised.
      text: `keys_values` of the instructions. mask: bool [B,L] of rows that may be seen, or None.
      config: the `ModelConfig`. taps: also return the attention of the learned queries.

    Returns:
      actions [B,T,A] float32 (normalised units), and {"attention_{layer}_{source}": [B,Q,S],
      "query_importance_{layer}_{source}": [Q]}, empty without `taps`.
    """
    row = keys_values(weights, _linear(weights["proprio"], proprio)[:, None], config)
    keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(text, row))
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    rope = layers.rope_table(1, latents.shape[2] // 2, latents.shape[3] // 2, config.head_dim)
    patches = einops.rearrange(latents, "b 1 (h p) (w q) c -> b (h w) (p q c)", p=2, q=2)
    x, states = _linear(weights["patch"], patches), []
    for i, block in enumerate(weights["blocks"]):
        x = _block(block, x, keys[i], values[i], mask, rope, config)
        if i in config.adapter_layers:
            adapter, backbone = weights["adapters"][len(states)], x
            x = x + config.adapter_scale * _mlp(adapter, x, config.eps)
            states.append({"backbone": backbone, "adapted": x})
    return _expert(weights["expert"], states, config, taps)


def _block(w, x, keys, values, mask, rope, config):
    own = queries_keys_values(w, _linear(w["qkv"], x, config.eps), rope, config)
    return after_attention(w, x, own, keys, values, mask, config)


def after_attention(w, x, own, keys, values, mask, config):
    """The rest of a block of the frame, of its queries, keys and values `own`."""
    out = attend(*own, None, config)
    x = x + _linear(w["o"], out.reshape(*x.shape[:2], -1))
    x = cross_attended(w, x, keys, values, mask, config)
    # In the compute dtype, not in float32 as elsewhere: on GPUs it then is part of the product.
    h = jax.nn.gelu(_linear(w["up"], x, config.eps), approximate=True)
    return x + _linear(w["down"], h)


def queries_keys_values(w, qkv, rope, config):
    """The product of a block's "qkv" [B,S,3NK] -> q, k (normed, rotated) and v, [B,S,N,K] each."""
    heads = lambda a: a.reshape(*a.shape[:-1], config.num_heads, config.head_dim)
    qkv = einops.rearrange(qkv, "b s (three d) -> b s three d", three=3)
    qk = _rms_rotated(heads(qkv[:, :, :2]), heads(w["norm_qk"]), *rope, config.eps)
    qk = qk.astype(qkv.dtype)
    return qk[:, :, 0], qk[:, :, 1], heads(qkv[:, :, 2])


def cross_attended(w, x, keys, values, mask, config):
    """x [B,S,D] and what it reads of the context; keys and values [B,L,N,K]."""
    q = _linear(w["cross_q"], x, config.eps)
    q = _rms(q, w["cross_norm_q"], config.eps).astype(x.dtype)
    q = q.reshape(*q.shape[:-1], config.num_heads, config.head_dim)
    out = attend(q, keys, values, mask, config)
    return x + _linear(w["cross_o"], out.reshape(*x.shape[:2], -1))


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


def _expert(w, states, config, taps):
    read, compressed = {}, []
    sources = action.resolve_sources(config.sources, config.layer_sources, len(states))
    groups = {"mean": 1, "concat": config.num_queries}.get(config.pooling)
    for i, (layer, state) in enumerate(zip(config.adapter_layers, states)):
        state["delta"], pooled = state["adapted"] - state["backbone"], []
        for source in sources[i]:
            if groups:
                pooled.append(action.concatenate_groups(state[source], groups))
                continue
            one, attention, importance = _pool(w["poolers"][f"{i}_{source}"], state[source], config)
            pooled.append(one)
            read[f"attention_{layer}_{source}"] = attention
            read[f"query_importance_{layer}_{source}"] = importance
        compressed.append(_mlp(w["compressors"][i], jnp.concatenate(pooled, axis=-1)))
    trunk = _linear(w["fused"], jnp.concatenate(compressed, axis=-1), action.EPS)
    for block in w["trunk"]:
        trunk = trunk + _mlp(block, trunk)
    actions = _mlp(w["output"], trunk[:, None] + w["steps"])
    return actions.astype(jnp.float32), read if taps else {}


def _pool(w, tokens, config):
    """Tokens [B,S,D] -> [B,D or merge_dim], attention [B,Q,S] and importance [Q] of the queries."""
    tokens = norms.normalize(tokens, action.EPS).astype(tokens.dtype)
    by_head = dict(n=config.pool_heads)
    scores = einops.rearrange(layers.dot(tokens, w["scores"]), "b s (n q) -> b s n q", **by_head)
    attention = jax.nn.softmax(scores.astype(jnp.float32), axis=1)
    merge = jax.nn.softmax(w["merge"].astype(jnp.float32), axis=-1)  # [M,Q]
    merged = jnp.einsum("bsnq,mq->bmns", attention, merge)
    read = jnp.einsum("bmns,bsd->bmnd", merged.astype(tokens.dtype), tokens)
    kernel = einops.rearrange(w["values"]["kernel"], "d (n k) -> d n k", **by_head)
    read = einops.rearrange(jnp.einsum("bmnd,dnk->bmnk", read, kernel), "b m n k -> b m (n k)")
    pooled = _linear(w["out"], read + w["values"]["bias"]).reshape(tokens.shape[0], -1)
    pooled = _linear(w["merged"], pooled, action.EPS) if "merged" in w else pooled
    pooled = norms.normalize(pooled, action.EPS) * w["norm"]["scale"] + w["norm"]["bias"]
    attention = einops.reduce(attention, "b s n q -> b q s", "mean")
    return pooled.astype(tokens.dtype), attention, merge.mean(axis=0)


def _linear(w, x, eps=None):
    """The linear of x [...,in], normalised where `eps` is given."""
    x = x if eps is None else norms.normalize(x, eps)
    return layers.dot(x.astype(w["kernel"].dtype), w["kernel"]) + w["bias"]


def _mlp(w, x, eps=action.EPS):
    return _linear(w[1], gelu(_linear(w[0], x, eps)))


def _rms(x, scale, eps, axes=(-1,)):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + eps) * scale
