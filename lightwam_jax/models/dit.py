"""The Wan video transformer, cut into scanned runs of blocks at the adapters.

Reference: wan_video_dit.py of the PyTorch release; docs/spec.md section 1 has every formula.
"""

from typing import NamedTuple

import einops
import flax.linen as nn
import jax.numpy as jnp

from lightwam_jax.models import layers
from lightwam_jax.models.adapters import Adapter
from lightwam_jax.models.blocks import Stream, scanned
from lightwam_jax.models.layers import Linear, layer_norm


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


class WanDiT(Stream):
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
        self.patch_embedding = Linear(self.dim, self.dtype)
        self.make_embeddings()
        self.segments = segments(self.num_layers, self.adapter_layers, self.lora_layers)
        for segment in self.segments:
            length, fields = segment.stop - segment.start, self.block_fields(segment.lora)
            setattr(self, segment.name, scanned(length, self.remat, self.scan_unroll, **fields))
        for layer in self.adapter_layers:
            adapter = Adapter(self.adapter_dim, self.adapter_scale, self.eps, self.dtype)
            setattr(self, f"adapters_{layer}", adapter)
        self.head = Head(self.latent_channels, self.eps, self.dtype)

    def block_fields(self, lora):
        """Fields of this model's blocks, with or without LoRA."""
        same = ("dim", "num_heads", "head_dim", "ffn_dim", "eps", "gate_init", "dtype")
        return dict(
            {name: getattr(self, name) for name in same},
            ranks=dict.fromkeys(self.lora_targets, self.lora_rank) if lora else {},
            alpha=self.lora_alpha,
            mode=self.attention_mask,
            implementation=self.attention,
        )

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
        return self._run(latents, t, keys_values, mask, stop_after)[:3]

    def observe(self, latents, t, keys_values, mask=None):
        """As `backbone`, for another stream: tokens, time embedding rows, and keys and values.

        The last are those of every block's self-attention, (k, v) [n,B,S,N,K].
        """
        x, _, e, own = self._run(latents, t, keys_values, mask, keep=True)
        return x, e, tuple(jnp.concatenate(parts) for parts in zip(*own))

    def _run(self, latents, t, keys_values, mask, stop_after=None, keep=False):
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
        taps, own = {}, []
        for segment in self._segments_up_to(stop_after):
            run = getattr(self, segment.name)
            x, pair = (run.observe if keep else run)(x, keys_values[segment.name], rows, rope, mask)
            own.append(pair)
            layer = segment.stop - 1
            if layer in self.adapter_layers:
                adapted = getattr(self, f"adapters_{layer}")(x)
                taps[layer] = {"backbone": x, "adapted": adapted}
                x = adapted
        return x, taps, e, own

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
