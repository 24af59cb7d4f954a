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

from lightwam_jax import build
from lightwam_jax.inference import folded
from lightwam_jax.models import action, dit, layers, norms

keys_values = folded.keys_values  # of the text, made once per instruction


def deployed(params, config, horizon):
    """Returns the weights of the deployment form.

    Args:
      params: all of `LightWAM`, in-memory layout; arrays, or shapes under `jax.eval_shape`.
      config: their `ModelConfig`. horizon: T, steps of an action chunk.
    """
    model, old = build.build_model(config), params["dit"]
    with jax.default_matmul_precision("highest"):
        _, rows = model.apply({"params": params}, method=lambda m: m.dit.embed_time(jnp.zeros(())))
        fold = jax.jit(folded.fold_block, static_argnames="config")
        blocks, contexts = zip(*(fold(b, rows, config=config) for b in _blocks(old, config)))
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        adapters = [wide(old[f"adapters_{i}"]) for i in config.adapter_layers]
        weights = {
            "patch": old["patch_embedding"],
            "text": [old["text_embedding_0"], old["text_embedding_2"]],
            "proprio": params["proprio_encoder"],
            "context": folded.beside(*contexts)
            | {"norm_k": jnp.stack([c["norm_k"] for c in contexts])},
            "blocks": blocks,
            "adapters": [folded.fold_mlp(adapter, "down", "up") for adapter in adapters],
            "expert": _fold_expert(wide(params["expert"]), model.expert, horizon),
        }
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), weights)


def _blocks(old, config):
    """Yields the parameters of each block up to the last adapter."""
    for segment in dit.segments(config.num_layers, config.adapter_layers, config.lora_layers):
        for i in range(min(segment.stop, config.adapter_layers[-1] + 1) - segment.start):
            yield jax.tree.map(lambda x, i=i: x[i], old[segment.name])


def _fold_expert(old, expert, horizon):
    """Args: expert: `StateFusionActionExpert`, of whose parameters `old` are."""
    positions = jnp.asarray(layers.sinusoid_table(range(horizon), expert.step_pos_dim))
    poolers = {name.removeprefix("poolers_"): old[name] for name in old if "poolers_" in name}
    mlps = lambda name, several: [
        folded.fold_mlp(old[f"{name}_{i}"]) for i, _ in enumerate(several)
    ]
    return {
        "poolers": {name: _fold_pooler(pooler, expert) for name, pooler in poolers.items()},
        "compressors": mlps("compressors", expert.layer_sources),
        "fused": folded.after(old["fused_norm"], old["fused_proj"]),
        "trunk": mlps("trunk", range(expert.trunk_blocks)),
        "steps": folded.mlp(folded.fold_mlp(old["step_pos"]), positions),
        "output": folded.fold_mlp(old["output"]),
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
        "values": folded.after(old["token_norm"], {"kernel": wv, "bias": bv}),
        "out": old["out_proj"],
        "norm": old["output_norm"],
    }
    if expert.query_anchor:
        new["anchor"] = old["query_anchor_logits"]
    if expert.merge_dim:
        new["merged"] = folded.after(old["merge_norm"], old["merge_proj"])
    return new


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
    keys, values, mask = folded.with_state(keys_values, weights, text, mask, proprio, config)
    rope = layers.rope_table(1, latents.shape[2] // 2, latents.shape[3] // 2, config.head_dim)
    patches = einops.rearrange(latents, "b 1 (h p) (w q) c -> b (h w) (p q c)", p=2, q=2)
    x, states = folded.linear(weights["patch"], patches), []
    for i, block in enumerate(weights["blocks"]):
        x = _block(block, x, keys[i], values[i], mask, rope, config)
        if i in config.adapter_layers:
            adapter, backbone = weights["adapters"][len(states)], x
            x = x + config.adapter_scale * folded.mlp(adapter, x, config.eps)
            states.append({"backbone": backbone, "adapted": x})
    return _expert(weights["expert"], states, config, taps)


def _block(w, x, keys, values, mask, rope, config):
    own = folded.queries_keys_values(w, folded.linear(w["qkv"], x, config.eps), rope, config)
    return folded.after_attention(w, x, own, keys, values, mask, config)


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
        compressed.append(folded.mlp(w["compressors"][i], jnp.concatenate(pooled, axis=-1)))
    trunk = folded.linear(w["fused"], jnp.concatenate(compressed, axis=-1), action.EPS)
    for block in w["trunk"]:
        trunk = trunk + folded.mlp(block, trunk)
    actions = folded.mlp(w["output"], trunk[:, None] + w["steps"])
    return actions.astype(jnp.float32), read if taps else {}


def _pool(w, tokens, config):
    """Tokens [B,S,D] -> [B,D or merge_dim], attention [B,Q,S] and importance [Q] of the queries."""
    tokens = norms.normalize(tokens, action.EPS).astype(tokens.dtype)
    by_head = dict(n=config.pool_heads)
    scores = einops.rearrange(layers.dot(tokens, w["scores"]), "b s (n q) -> b s n q", **by_head)
    scores = scores.astype(jnp.float32)
    if "anchor" in w:
        runs = action.own_runs(*w["anchor"].shape, tokens.shape[1])
        scores += einops.rearrange(w["anchor"][..., None] * runs, "n q s -> s n q")
    attention = jax.nn.softmax(scores, axis=1)
    merge = jax.nn.softmax(w["merge"].astype(jnp.float32), axis=-1)  # [M,Q]
    merged = jnp.einsum("bsnq,mq->bmns", attention, merge)
    read = jnp.einsum("bmns,bsd->bmnd", merged.astype(tokens.dtype), tokens)
    kernel = einops.rearrange(w["values"]["kernel"], "d (n k) -> d n k", **by_head)
    read = einops.rearrange(jnp.einsum("bmnd,dnk->bmnk", read, kernel), "b m n k -> b m (n k)")
    pooled = folded.linear(w["out"], read + w["values"]["bias"]).reshape(tokens.shape[0], -1)
    pooled = folded.linear(w["merged"], pooled, action.EPS) if "merged" in w else pooled
    pooled = norms.normalize(pooled, action.EPS) * w["norm"]["scale"] + w["norm"]["bias"]
    attention = einops.reduce(attention, "b s n q -> b q s", "mean")
    return pooled.astype(tokens.dtype), attention, merge.mean(axis=0)
