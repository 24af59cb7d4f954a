"""Learned-query pooling and the state-fusion action expert (docs/spec.md section 2).

The expert reads the token states at the adapters, pools each with a few learned queries, fuses
the layers, and regresses the whole action chunk in one pass.
Source: state_fusion_action_expert.py of the PyTorch release.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.models import layers
from lightwam_jax.models.layers import Linear, gelu, layer_norm

EPS = 1e-5  # PyTorch's LayerNorm default, unlike the backbone's 1e-6
SOURCES = ("backbone", "adapted", "delta")


class QueryPooler(nn.Module):
    """Pools tokens [B,S,D] with Q learned queries into one vector [B,D] (or [B,merge_dim]).

    Also returns the attention weights [B,Q,S], averaged over heads, and the importance of each
    query [Q] (they sum to 1): summary attention = sum_q importance_q * weights_q.

    With `query_anchor` each query and head starts on a run of tokens of its own, and each merged
    slot on queries of its own; not in the paper, for models that learn to see from scratch.
    """

    num_queries: int
    num_heads: int
    query_init: float = 0.02
    merge_dim: int = 0
    merge_slots: int = 2
    query_anchor: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        dim = tokens.shape[-1]
        kv = layer_norm(EPS, name="token_norm")(tokens).astype(self.dtype)
        init = nn.initializers.normal(self.query_init)
        queries = self.param("query_tokens", init, (self.num_queries, dim))
        in_proj = FusedProjection(name="in_proj")
        # queries carry no batch: [Q,D] -> [1,Q,N,K]; tokens [B,S,D] -> [B,S,N,K]
        q = self._heads(in_proj(queries[None].astype(self.dtype), 0, dim))
        k = self._heads(in_proj(kv, 1, dim))
        v = self._heads(in_proj(kv, 2, dim))
        logits = jnp.einsum("oqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32)
        logits = logits * (dim // self.num_heads) ** -0.5
        if self.query_anchor:
            shape, init = (self.num_heads, self.num_queries), nn.initializers.constant
            anchor = self.param("query_anchor_logits", init(self.query_anchor), shape)
            logits += anchor[..., None] * own_runs(*shape, tokens.shape[1])
        weights = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("bnqs,bsnk->bqnk", weights.astype(self.dtype), v)
        out = einops.rearrange(out, "b q n k -> b q (n k)")
        pooled = Linear(dim, self.dtype, name="out_proj")(out)

        if self.merge_dim:
            shape, init = (self.merge_slots, self.num_queries), _share_out(self.query_anchor)
            slots = self.param("query_slot_merge_logits", init, shape)
            merge = jax.nn.softmax(slots.astype(jnp.float32), axis=-1)
            # [M,Q] x [B,Q,D] -> [B, M*D]
            pooled = jnp.einsum("mq,bqd->bmd", merge.astype(self.dtype), pooled)
            pooled = layer_norm(EPS, name="merge_norm")(pooled.reshape(pooled.shape[0], -1))
            pooled = Linear(self.merge_dim, self.dtype, name="merge_proj")(pooled)
            importance = merge.mean(axis=0)
        else:
            logits = self.param("query_merge_logits", nn.initializers.zeros, (self.num_queries,))
            importance = jax.nn.softmax(logits.astype(jnp.float32))
            pooled = jnp.einsum("q,bqd->bd", importance.astype(self.dtype), pooled)
        pooled = layer_norm(EPS, name="output_norm")(pooled).astype(self.dtype)
        return pooled, (weights.mean(axis=1), importance)

    def _heads(self, x):
        return einops.rearrange(x, "b s (n k) -> b s n k", n=self.num_heads)


def own_runs(heads, queries, tokens):
    """Bool [N,Q,S]: which tokens are those of a query's head, in runs of S/(N*Q) neighbours."""
    runs = np.arange(tokens) * (heads * queries) // tokens
    owners = np.arange(heads * queries).reshape(queries, heads).T  # a query's heads lie together
    return runs == owners[..., None]


def _share_out(logit):
    """Initial logits [M,Q]: `logit` where a slot and a query belong together, in turns, else 0."""

    def init(key, shape):
        del key
        slot, query = np.ogrid[: shape[0], : shape[1]]
        together = (query % shape[0] == slot) | (slot % shape[1] == query)
        return jnp.asarray(logit * together, jnp.float32)

    return init


class FusedProjection(nn.Module):
    """Query, key and value projections in one kernel [D,3D], as torch's MultiheadAttention."""

    @nn.compact
    def __call__(self, x, part, dim):
        # xavier-uniform over the fused matrix
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (dim, 3 * dim))
        bias = self.param("bias", nn.initializers.zeros, (3 * dim,))
        cut = slice(part * dim, (part + 1) * dim)
        return x @ kernel[:, cut].astype(x.dtype) + bias[cut].astype(x.dtype)


class NormMLP(nn.Module):
    """LayerNorm -> Linear -> tanh-GELU -> Linear over the last axis."""

    hidden: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = layer_norm(EPS, name="norm")(x).astype(self.dtype)
        h = gelu(Linear(self.hidden, self.dtype, name="fc1")(h))
        return Linear(self.features, self.dtype, name="fc2")(h)


class StateFusionActionExpert(nn.Module):
    """Token states at the adapter layers -> action chunk. Fields: see `config.ModelConfig`.

    `layer_sources[i]` names which states of the i-th adapter layer are read: "backbone" (block
    output), "adapted" (after the adapter), "delta" (adapted - backbone); order matters.
    """

    layer_sources: tuple
    action_dim: int
    pooling: str
    num_queries: int
    pool_heads: int
    query_init: float
    merge_dim: int
    merge_slots: int
    query_anchor: float
    per_layer_dim: int
    trunk_dim: int
    trunk_blocks: int
    step_pos_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, states, horizon):
        """states: one {"backbone", "adapted"[, "delta"]: [B,S,D]} per adapter layer, ascending.

        Returns actions [B,horizon,A] float32 and taps: `pooled_{i}_{source}` [B,D],
        `compressed_{i}` [B,per_layer_dim], `fused` [B,trunk_dim], `step_pos` [T,trunk_dim],
        `attention_{i}_{source}` [B,Q,S], `query_importance_{i}_{source}` [Q].
        """
        if len(states) != len(self.layer_sources):
            expected = len(self.layer_sources)
            raise ValueError(f"expected the states of {expected} adapter layers, got {len(states)}")
        taps, compressed = {}, []
        for i, (state, sources) in enumerate(zip(states, self.layer_sources)):
            pooled = [self._pool(_state(state, name), f"{i}_{name}", taps) for name in sources]
            compress = self._mlp(self.per_layer_dim, self.per_layer_dim, f"compressors_{i}")
            summary = compress(jnp.concatenate(pooled, axis=-1))
            taps[f"compressed_{i}"] = summary
            compressed.append(summary)

        fused = layer_norm(EPS, name="fused_norm")(jnp.concatenate(compressed, axis=-1))
        state = taps["fused"] = Linear(self.trunk_dim, self.dtype, name="fused_proj")(fused)
        for i in range(self.trunk_blocks):
            state = state + self._mlp(self.trunk_dim, self.trunk_dim, f"trunk_{i}")(state)

        positions = layers.sinusoid_table(range(horizon), self.step_pos_dim)
        steps = self._mlp(self.trunk_dim, self.trunk_dim, "step_pos")(positions)
        taps["step_pos"] = steps
        # [B,1,trunk] + [1,T,trunk]
        tokens = state[:, None] + steps[None]
        actions = self._mlp(self.trunk_dim, self.action_dim, "output")(tokens)
        return actions.astype(jnp.float32), taps

    def _mlp(self, hidden, features, name):
        return NormMLP(hidden, features, self.dtype, name=name)

    def _pool(self, tokens, name, taps):
        if self.pooling == "mean":
            pooled = tokens.mean(axis=1)
        elif self.pooling == "concat":
            pooled = concatenate_groups(tokens, self.num_queries)
        else:
            sizes = (self.num_queries, self.pool_heads, self.query_init, self.merge_dim)
            sizes = (*sizes, self.merge_slots, self.query_anchor, self.dtype)
            pooled, attention = QueryPooler(*sizes, name=f"poolers_{name}")(tokens)
            taps[f"attention_{name}"], taps[f"query_importance_{name}"] = attention
        taps[f"pooled_{name}"] = pooled
        return pooled


def concatenate_groups(tokens, groups):
    """Tokens [B,S,D] -> [B,groups*D]: means of runs of S/groups neighbours, in their order.

    With groups = S nothing is averaged. Not in the paper: what queries are compared with.

    Raises:
      ValueError: S is not a multiple of `groups`.
    """
    batch, count, dim = tokens.shape
    if count % groups:
        raise ValueError(
            f"{count} tokens cannot be concatenated in config.model.num_queries="
            f"{groups} groups of equal size; choose a divisor of {count}"
        )
    runs = tokens.reshape(batch, groups, count // groups, dim).mean(axis=2)
    return runs.reshape(batch, groups * dim)


def resolve_sources(sources, layer_sources, num_layers):
    """Per-layer source names from the config's two fields, checked.

    Raises:
      ValueError: a name that is none of "backbone", "adapted", "delta", or a wrong count.
    """
    chosen = tuple(tuple(s) for s in layer_sources) or (tuple(sources),) * num_layers
    if len(chosen) != num_layers:
        raise ValueError(f"layer_sources has {len(chosen)} entries for {num_layers} adapters")
    unknown = sorted({name for names in chosen for name in names} - set(SOURCES))
    if unknown or not all(chosen):
        raise ValueError(
            f"state sources {unknown or 'are empty for a layer'}; expected some of "
            f"{SOURCES} for every adapter layer"
        )
    return chosen


def _state(state, source):
    if source == "delta" and "delta" not in state:
        return state["adapted"] - state["backbone"]
    return state[source]
