"""The transformer block of Wan, and runs of blocks: both streams, video and actions, have these.

Reference: wan_video_dit.py of the PyTorch release; docs/spec.md section 1 has every formula.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lightwam_jax.models import layers
from lightwam_jax.models.layers import Linear, gelu, layer_norm, rms_norm
from lightwam_jax.models.lora import LoRALinear


class Attention(nn.Module):
    """Projections, with LoRA where `ranks` names them, and RMSNorm over all heads of q and k."""

    dim: int
    num_heads: int
    head_dim: int
    ranks: dict
    alpha: float
    eps: float
    implementation: str
    dtype: jnp.dtype

    kind = ""  # of the LoRA targets

    def setup(self):
        def linear(name, features):
            rank = self.ranks.get(f"{self.kind}.{name}", 0)
            return LoRALinear(features, rank, self.alpha, self.dtype)

        self.q, self.k, self.v = (linear(name, self.num_heads * self.head_dim) for name in "qkv")
        self.o = linear("o", self.dim)
        self.norm_q, self.norm_k = rms_norm(self.eps), rms_norm(self.eps)


class SelfAttention(Attention):
    """Self-attention over tokens [B,S,D], with rotary positions."""

    mode: str

    kind = "self_attn"

    def __call__(self, x, rope, seen=None):
        """Returns what is read [B,S,D], and the tokens' own keys and values [B,S,N,K].

        seen: keys and values [B,S',N,K] of another stream, which every token reads too; None: of
        none, and frames are seen as `mode` says.
        """
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (_heads(a, self.num_heads) for a in (q, k, v))  # [B,S,N*K] -> [B,S,N,K]
        q, k = (layers.apply_rope(a, *rope).astype(self.dtype) for a in (q, k))
        if seen is None:
            out = layers.frame_attention(q, k, v, rope[0].shape[0], self.mode, self.implementation)
        else:
            both = (jnp.concatenate(pair, axis=1) for pair in zip(seen, (k, v)))
            out = layers.attention(q, *both, implementation=self.implementation)
        return self.o(checkpoint_name(_merge_heads(out), "attention")), (k, v)


class CrossAttention(Attention):
    """Attention from video tokens to the context, whose keys and values come ready-made."""

    kind = "cross_attn"

    def keys_values(self, context):
        """Context [B,L,D] -> keys, values [B,L,N,K]; independent of the video tokens."""
        k = self.norm_k(self.k(context)).astype(self.dtype)
        return _heads(k, self.num_heads), _heads(self.v(context), self.num_heads)

    def __call__(self, x, keys_values, mask):
        q = _heads(self.norm_q(self.q(x)).astype(self.dtype), self.num_heads)
        out = layers.attention(q, *keys_values, mask, self.implementation)
        return self.o(checkpoint_name(_merge_heads(out), "attention"))


class FeedForward(nn.Module):
    """Linear -> tanh-GELU -> Linear on [B,S,D]; parameter names 0 and 2 as in the Wan files."""

    width: int
    ranks: dict
    alpha: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        up = LoRALinear(self.width, self.ranks.get("ffn.0", 0), self.alpha, self.dtype, name="0")
        down = LoRALinear(x.shape[-1], self.ranks.get("ffn.2", 0), self.alpha, self.dtype, name="2")
        return down(gelu(up(x)))


class Block(nn.Module):
    """One Wan block: modulated self-attention, cross-attention, modulated feed-forward."""

    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    ranks: dict  # LoRA target -> rank
    alpha: float
    eps: float
    mode: str
    gate_init: float
    implementation: str
    dtype: jnp.dtype

    def setup(self):
        lora = dict(ranks=self.ranks, alpha=self.alpha, dtype=self.dtype)
        attention = lora | dict(
            dim=self.dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            eps=self.eps,
            implementation=self.implementation,
        )
        init = _modulation_init(self.gate_init)
        self.modulation = self.param("modulation", init, (1, 6, self.dim))
        self.norm1 = layer_norm(self.eps, affine=False)
        self.norm2 = layer_norm(self.eps, affine=False)
        self.norm3 = layer_norm(self.eps)
        self.self_attn = SelfAttention(mode=self.mode, **attention)
        self.cross_attn = CrossAttention(**attention)
        self.ffn = FeedForward(self.ffn_dim, **lora)

    def keys_values(self, carry, context):
        """Scan body: this block's cross-attention keys and values; the carry is unused."""
        return carry, self.cross_attn.keys_values(context)

    def __call__(self, x, keys_values, rows, rope, mask):
        """Scan body over tokens x [B,S,D]; rows [B,2 or 1,6,D] are the timestep's modulation."""
        return self._run(x, keys_values, rows, rope, mask)[0], None

    def observe(self, x, keys_values, rows, rope, mask):
        """As `__call__`; also gives the keys and values [B,S,N,K] of the self-attention."""
        return self._run(x, keys_values, rows, rope, mask)

    def join(self, x, keys_values, seen, rows, rope, mask):
        """As `__call__`; the tokens also read what another stream's `observe` gave: `seen`."""
        return self._run(x, keys_values, rows, rope, mask, seen)[0], None

    def _run(self, x, keys_values, rows, rope, mask, seen=None):
        frames, tokens = rope[0].shape[0], x.shape[1]
        rows = self.modulation.astype(jnp.float32)[:, None] + rows
        # six of [B,S,D], or [B,1,D] where frame 0 is all there is
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            layers.per_token(rows[:, :, i], frames, tokens) for i in range(6)
        )

        h = (self.norm1(x) * (1 + scale1) + shift1).astype(self.dtype)
        update, own = self.self_attn(h, rope, seen)
        x = (x + gate1 * update).astype(self.dtype)
        h = self.norm3(x).astype(self.dtype)
        x = x + self.cross_attn(h, keys_values, mask)
        h = (self.norm2(x) * (1 + scale2) + shift2).astype(self.dtype)
        x = (x + gate2 * self.ffn(h)).astype(self.dtype)
        return x, own


# What a block keeps for its backward pass, if not everything; the fastest first.
REMAT_POLICIES = {
    # What linears and attention give, and the statistics of norms: no product of a linear is
    # computed again, and the rest of a block follows by attention scores and elementwise work.
    "linears": jax.checkpoint_policies.save_only_these_names(
        "linear", "low_rank", "attention", "statistics"
    ),
    # The products of linears, those of LoRA's two factors beside those of the kernels.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,  # the input only
}


def scanned(length, remat, unroll, **fields):
    """One module for a run of blocks: parameters stacked [n,...], executed by lax.scan.

    Args:
      length: n. remat, unroll: as of `config.ModelConfig`. fields: of `Block`.
    """
    block, passes = Block, ("__call__", "observe", "join")
    if remat != "none":
        methods = [*passes, "keys_values"]
        policy = REMAT_POLICIES[remat]
        block = nn.remat(Block, prevent_cse=False, policy=policy, methods=methods)
    over_blocks = dict(
        variable_axes={"params": 0}, split_rngs={"params": True}, length=length, unroll=unroll
    )
    axes = {name: (0, *[nn.broadcast] * 3) for name in passes} | {"keys_values": nn.broadcast}
    axes["join"] = (0, *axes["join"])  # and what is seen, of each block
    methods = {name: dict(over_blocks, in_axes=axis) for name, axis in axes.items()}
    return nn.scan(block, methods=methods)(**fields)


class Stream(nn.Module):
    """A stream's embeddings of time and context; it has the fields dim, freq_dim and dtype."""

    def make_embeddings(self):
        """Makes the layers below; for `setup`."""
        linear = lambda: Linear(self.dim, self.dtype)
        self.text_embedding_0, self.text_embedding_2 = linear(), linear()
        # The timestep's path is tiny and feeds every block: float32 throughout.
        self.time_embedding_0, self.time_embedding_2 = Linear(self.dim), Linear(self.dim)
        self.time_projection = Linear(6 * self.dim)

    def embed_time(self, t):
        """Timesteps [...] -> (embedding [...,D], modulation [...,6,D]), float32."""
        features = layers.sinusoid(t, self.freq_dim)
        e = self.time_embedding_2(jax.nn.silu(self.time_embedding_0(features)))
        m = self.time_projection(jax.nn.silu(e))
        return e, m.reshape(*m.shape[:-1], 6, self.dim)

    def embed_context(self, context):
        """Raw text (and proprio) rows [B,L,text_dim] -> [B,L,D]."""
        return self.text_embedding_2(gelu(self.text_embedding_0(context)))


def _modulation_init(gate):
    """Initialiser of a block's six rows: N(0, 1/D), as Wan's; rows 2 and 5, the gates, + `gate`."""

    def init(key, shape, dtype=jnp.float32):
        table = nn.initializers.normal(shape[-1] ** -0.5)(key, shape, dtype)
        return table.at[..., [2, 5], :].add(gate)

    return init


def _heads(x, n):
    return einops.rearrange(x, "b s (n k) -> b s n k", n=n)


def _merge_heads(x):
    return einops.rearrange(x, "b s n k -> b s (n k)")
