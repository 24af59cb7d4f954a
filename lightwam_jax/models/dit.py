"""The Wan video transformer, cut into scanned runs of blocks at the adapters.

Reference: wan_video_dit.py of the PyTorch release; docs/spec.md section 1 has every formula.
"""

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lightwam_jax.models import layers
from lightwam_jax.models.adapters import Adapter
from lightwam_jax.models.layers import Linear, gelu, layer_norm, rms_norm
from lightwam_jax.models.lora import LoRALinear


class Segment(NamedTuple):
    """Blocks [start, stop): a run that one scan executes; with LoRA in all of them or in none."""

    start: int
    stop: int
    lora: bool

    @property
    def name(self):
        return f"blocks_{self.start}"


def segments(num_layers, adapter_layers, lora_layers):
    """Cuts blocks 0..num_layers-1 after every adapter and wherever LoRA starts or ends.

    Raises:
      ValueError: an adapter or LoRA layer that does not exist.
    """
    for kind, chosen in (("adapter", adapter_layers), ("LoRA", lora_layers)):
        beyond = [i for i in chosen if not 0 <= i < num_layers]
        if beyond:
            raise ValueError(
                f"{kind} layers {beyond} do not exist: the model has {num_layers} blocks, "
                "numbered from 0"
            )
    runs, start = [], 0
    for i in range(num_layers):
        last = i == num_layers - 1
        if last or i in adapter_layers or (i in lora_layers) != (i + 1 in lora_layers):
            runs.append(Segment(start, i + 1, i in lora_layers))
            start = i + 1
    return tuple(runs)


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
    """Self-attention over video tokens [B,S,D], with rotary positions."""

    mode: str

    kind = "self_attn"

    def __call__(self, x, rope):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (_heads(a, self.num_heads) for a in (q, k, v))  # [B,S,N*K] -> [B,S,N,K]
        q, k = (layers.apply_rope(a, *rope).astype(self.dtype) for a in (q, k))
        out = layers.frame_attention(q, k, v, rope[0].shape[0], self.mode, self.implementation)
        return self.o(checkpoint_name(_merge_heads(out), "attention"))


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
        frames, tokens = rope[0].shape[0], x.shape[1]
        rows = self.modulation.astype(jnp.float32)[:, None] + rows
        # six of [B,S,D], or [B,1,D] where frame 0 is all there is
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            layers.per_token(rows[:, :, i], frames, tokens) for i in range(6)
        )

        h = (self.norm1(x) * (1 + scale1) + shift1).astype(self.dtype)
        x = (x + gate1 * self.self_attn(h, rope)).astype(self.dtype)
        h = self.norm3(x).astype(self.dtype)
        x = x + self.cross_attn(h, keys_values, mask)
        h = (self.norm2(x) * (1 + scale2) + shift2).astype(self.dtype)
        x = (x + gate2 * self.ffn(h)).astype(self.dtype)
        return x, None


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


class WanDiT(nn.Module):
    """Wan video transformer with LoRA, adapters and taps. Fields: see `config.ModelConfig`."""

    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    text_dim: int
    freq_dim: int
    latent_channels: int
    eps: float
    attention_mask: str
    gate_init: float
    lora_rank: int
    lora_alpha: float
    lora_layers: tuple
    lora_targets: tuple
    adapter_layers: tuple
    adapter_dim: int
    adapter_scale: float
    attention: str
    remat: str
    scan_unroll: int
    dtype: jnp.dtype

    def setup(self):
        linear = lambda features: Linear(features, self.dtype)
        self.patch_embedding = linear(self.dim)
        self.text_embedding_0, self.text_embedding_2 = linear(self.dim), linear(self.dim)
        # The timestep's path is tiny and feeds every block: float32 throughout.
        self.time_embedding_0, self.time_embedding_2 = Linear(self.dim), Linear(self.dim)
        self.time_projection = Linear(6 * self.dim)
        self.segments = segments(self.num_layers, self.adapter_layers, self.lora_layers)
        for segment in self.segments:
            setattr(self, segment.name, self._scanned_blocks(segment))
        for layer in self.adapter_layers:
            adapter = Adapter(self.adapter_dim, self.adapter_scale, self.eps, self.dtype)
            setattr(self, f"adapters_{layer}", adapter)
        self.head = Head(self.latent_channels, self.eps, self.dtype)

    def block_fields(self, lora):
        """Constructor arguments of this model's blocks, with or without LoRA."""
        same = ("dim", "num_heads", "head_dim", "ffn_dim", "eps", "gate_init", "dtype")
        return dict(
            {name: getattr(self, name) for name in same},
            ranks=dict.fromkeys(self.lora_targets, self.lora_rank) if lora else {},
            alpha=self.lora_alpha,
            mode=self.attention_mask,
            implementation=self.attention,
        )

    def _scanned_blocks(self, segment):
        """One module for a run of blocks: parameters stacked [n,...], executed by lax.scan."""
        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block,
                prevent_cse=False,
                policy=REMAT_POLICIES[self.remat],
                methods=["__call__", "keys_values"],
            )
        over_blocks = dict(
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=segment.stop - segment.start,
            unroll=self.scan_unroll,
        )
        methods = {
            "__call__": dict(over_blocks, in_axes=(0, *[nn.broadcast] * 3)),
            "keys_values": dict(over_blocks, in_axes=nn.broadcast),
        }
        return nn.scan(block, methods=methods)(**self.block_fields(segment.lora))

    def embed_time(self, t):
        """Timesteps [...] -> (embedding [...,D], modulation [...,6,D]), float32."""
        features = layers.sinusoid(t, self.freq_dim)
        e = self.time_embedding_2(jax.nn.silu(self.time_embedding_0(features)))
        m = self.time_projection(jax.nn.silu(e))
        return e, m.reshape(*m.shape[:-1], 6, self.dim)

    def embed_context(self, context):
        """Raw text (and proprio) rows [B,L,text_dim] -> [B,L,D]."""
        return self.text_embedding_2(gelu(self.text_embedding_0(context)))

    def keys_values(self, context, stop_after=None):
        """Cross-attention keys and values of every block, from embedded context [B,L,D].

        They depend on the context and the weights alone: computed once, used by both passes of
        a training step and by every denoising step. Returns {segment name: (k, v) [n,B,L,N,K]}.
        """
        return {
            s.name: getattr(self, s.name).keys_values(None, context)[1]
            for s in self._segments_up_to(stop_after)
        }

    def backbone(self, latents, t, keys_values, mask=None, stop_after=None):
        """Runs the blocks over one grid of latents.

        Args:
          latents: [B,F,H,W,C], H and W even.
          t: timesteps [B] in 0..1000 of frames 1.. (frame 0 is always at 0), or None where
            frame 0 is all there is.
          keys_values: from `keys_values`.
          mask: [B,L] bool of context rows that may be seen, or None for all.
          stop_after: last block to run (an adapter layer), or None for all.

        Returns:
          tokens [B,S,D]; taps {adapter layer: {"backbone", "adapted"} [B,S,D]}, the block's
          output before and after its adapter; time embedding rows [B or 1, 2 or 1, D].

        Raises:
          ValueError: an odd latent height or width.
        """
        _, frames, height, width, _ = latents.shape
        if height % 2 or width % 2:
            raise ValueError(
                f"latent grid {height}x{width} must be even in both directions: a patch is 2x2 "
                "(the sides of config.data.canvas must be multiples of two latent cells)"
            )
        rope = layers.rope_table(frames, height // 2, width // 2, self.head_dim)
        times = jnp.zeros((1, 1)) if t is None else jnp.stack([jnp.zeros_like(t), t], axis=1)
        e, rows = self.embed_time(times)

        patches = einops.rearrange(latents, "b f (h p) (w q) c -> b (f h w) (p q c)", p=2, q=2)
        x = self.patch_embedding(patches)
        taps = {}
        for segment in self._segments_up_to(stop_after):
            x, _ = getattr(self, segment.name)(x, keys_values[segment.name], rows, rope, mask)
            layer = segment.stop - 1
            if layer in self.adapter_layers:
                adapted = getattr(self, f"adapters_{layer}")(x)
                taps[layer] = {"backbone": x, "adapted": adapted}
                x = adapted
        return x, taps, e

    def velocity(self, latents, t, keys_values, mask=None):
        """Predicted flow velocity of latents [B,F,H,W,C] at timesteps t [B], float32."""
        x, _, e = self.backbone(latents, t, keys_values, mask)
        return self.read_velocity(x, e, latents.shape)

    def read_velocity(self, tokens, e, shape):
        """Tokens [B,S,D] after all blocks -> velocity of latents of `shape` [B,F,H,W,C]."""
        _, frames, height, width, _ = shape
        patches = self.head(tokens, e, frames)
        sizes = dict(f=frames, h=height // 2, w=width // 2, p=2, q=2)
        return einops.rearrange(patches, "b (f h w) (p q c) -> b f (h p) (w q) c", **sizes)

    def _segments_up_to(self, stop_after):
        return [s for s in self.segments if stop_after is None or s.start <= stop_after]


class Head(nn.Module):
    """Video head: norm, modulation by the time embedding itself, linear to 2x2 patches."""

    channels: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, e, frames):
        dim = x.shape[-1]
        table = self.param("modulation", nn.initializers.normal(dim**-0.5), (1, 2, dim))
        shift, scale = (
            layers.per_token(table[:, i : i + 1].astype(jnp.float32) + e, frames, x.shape[1])
            for i in range(2)
        )
        h = layer_norm(self.eps, affine=False, name="norm")(x) * (1 + scale) + shift
        return Linear(4 * self.channels, name="head")(h)


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
