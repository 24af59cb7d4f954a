"""The umT5 text encoder of Wan: token ids to the text rows the video transformer reads.

A pre-norm T5 without biases and without attention scaling, whose every block has its own table of
relative positions. Reference: wan/modules/t5.py of Wan2.1; docs/spec.md section 10.

Letters as in layers.py; here L text tokens, D width of the residual stream, N heads, K head dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.models.layers import gelu, rms_norm


def relative_buckets(length, buckets=32, max_distance=128):
    """Bucket of (key position - query position): int32 constant [L query, L key].

    Half of the buckets are for keys after the query. In each half, small distances have a bucket
    of their own, larger ones share them logarithmically, and all beyond `max_distance` the last.
    """
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    distance, half = np.abs(relative), buckets // 2
    exact = half // 2
    # float32, as in the reference: a float64 logarithm falls on the other side of some borders.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scale = np.float32(np.log(max_distance / exact))
    coarse = exact + (np.log(ratio) / scale * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(coarse, half - 1))
    return (bucket + half * (relative > 0)).astype(np.int32)


class Linear(nn.Module):
    """`x @ kernel` over the last axis, without bias, in `dtype`."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x.astype(self.dtype) @ kernel.astype(self.dtype)


class Attention(nn.Module):
    """Self-attention over [B,L,D] with position biases [N,L,L]; the softmax is in float32."""

    heads: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, bias, mask):
        # [B,L,N*K] -> [B,L,N,K]
        q, k, v = (
            Linear(self.width, self.dtype, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in "qkv"
        )
        logits = jnp.einsum("bqnk,blnk->bnql", q, k, preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bnql,blnk->bqnk", weights, v)
        return Linear(x.shape[-1], self.dtype, name="o")(out.reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """Gated feed-forward: fc2(fc1(x) * gelu(gate(x))) on [B,L,D]."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gate = gelu(Linear(self.width, self.dtype, name="gate_0")(x))
        up = Linear(self.width, self.dtype, name="fc1")(x)
        return Linear(x.shape[-1], self.dtype, name="fc2")(up * gate)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added: scan body over [B,L,D]."""

    heads: int
    attention_dim: int
    ffn_dim: int
    buckets: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, positions, mask):
        table = nn.Embed(self.buckets, self.heads, name="pos_embedding")
        bias = jnp.moveaxis(table(positions), -1, 0)  # [L,L,N] -> [N,L,L]
        norm = rms_norm(self.eps, "norm1")
        attend = Attention(self.heads, self.attention_dim, self.dtype, name="attn")
        x = x + attend(norm(x).astype(self.dtype), bias, mask)
        norm = rms_norm(self.eps, "norm2")
        feed = FeedForward(self.ffn_dim, self.dtype, name="ffn")
        return x + feed(norm(x).astype(self.dtype)), None


class UMT5Encoder(nn.Module):
    """Token ids [B,L] to text rows [B,L,D]; the defaults are the sizes of umT5-xxl."""

    vocab: int = 256_384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10_240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids, mask=None):
        """Encodes a batch of texts.

        Args:
          ids: [B,L] int. mask: [B,L] bool, true on real tokens; None: all are real. Rows of
            padding come out as whatever the encoder makes of them: the caller zeroes them.

        Returns:
          [B,L,D] in `dtype`.
        """
        embed = nn.Embed(self.vocab, self.dim, dtype=self.dtype, name="token_embedding")
        positions = relative_buckets(ids.shape[1], self.num_buckets, self.max_distance)
        options = dict(in_axes=nn.broadcast, length=self.num_layers)
        options.update(variable_axes={"params": 0}, split_rngs={"params": True})
        blocks = nn.scan(Block, **options)(**self.block_fields(), name="blocks")
        x, _ = blocks(embed(ids), positions, mask)
        return rms_norm(self.eps, "norm")(x).astype(self.dtype)

    def block_fields(self):
        """The fields of a `Block`."""
        return dict(
            heads=self.num_heads,
            attention_dim=self.attention_dim,
            ffn_dim=self.ffn_dim,
            buckets=self.num_buckets,
            eps=self.eps,
            dtype=self.dtype,
        )
