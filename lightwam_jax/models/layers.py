"""Building blocks every model file shares: norms, linear, positions, attention, modulation.

Axis letters used in this project's comments, einsums and docstrings:

    B batch    F latent frames  H W latent grid   C latent channels   S video tokens
    L context tokens (text rows, then the proprio row)                D width
    N heads    K head dim       M mlp width       Q learned queries   T action horizon
    A action dim                P proprio dim     R LoRA rank         E adapter width   V cameras
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.models import norms, quantized


def torch_uniform(fan_in):
    """Initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linears and biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis: [..., in] -> [..., features] in `dtype`.

    Where the parameters hold an int8 kernel and its scale (`quantized.py`), the product is that of
    the integers, which bfloat16 holds exactly, and what comes out is scaled in float32.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    zero_init: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero_init else torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        y = dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.has_variable("params", quantized.SCALE):
            scale = self.param(quantized.SCALE, nn.initializers.ones, (self.features,))
            return (y.astype(jnp.float32) * scale + bias).astype(self.dtype)
        return y + bias.astype(self.dtype)


def dot(x, kernel):
    """x @ kernel over the last axis, with all other axes as one.

    The gradient of the kernel is then a plain matrix product rather than a contraction over two
    axes, which XLA's CPU backend runs more slowly.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(eps, affine=True, name=None):
    """LayerNorm with float32 statistics and float32 output; the caller casts."""
    return norms.LayerNorm(eps, affine, name=name)


def rms_norm(eps, name=None):
    """RMSNorm over the whole last axis (all heads together), float32 statistics and output."""
    return norms.RMSNorm(eps, name=name)


def gelu(x):
    """The tanh form of GELU, in float32; the only one on the used path (docs/spec.md section 1)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


# ---- positions ---------------------------------------------------------------------------------


def _frequencies(dim):
    """[dim/2] float64: 10000^(-i / (dim/2))."""
    return 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))


def sinusoid_table(positions, dim):
    """[cos | sin] features of host positions [n], float64 angles -> [n, dim] float32 constant."""
    angles = np.outer(np.asarray(positions, np.float64), _frequencies(dim))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def sinusoid(t, dim):
    """[cos | sin] features of traced timesteps t [...] in [0, 2048) -> [..., dim] float32.

    The reference takes the angle, up to 1000 radians, in float64 (wan_video_dit.py:113). Here the
    angle is counted in turns, and its whole turns are removed exactly: the frequency is cut into
    pieces short enough that their products with the integer part of t are exact in float32. What
    is left has the accuracy of float32 in one turn, on any device, without 64-bit arithmetic.
    """
    turns = _frequencies(dim) / (2 * np.pi)
    high = np.round(turns * 2**13) / 2**13  # 11 bits of t, 11 of these: exact
    middle = np.round((turns - high) * 2**26) / 2**26
    low = turns - high - middle
    t = jnp.asarray(t, jnp.float32)[..., None]
    whole = jnp.floor(t)
    high, middle, low, turns = (jnp.asarray(x, jnp.float32) for x in (high, middle, low, turns))
    coarse, fine = whole * high, whole * middle
    phase = (coarse - jnp.floor(coarse)) + (fine - jnp.floor(fine))
    phase = phase + (whole * low + (t - whole) * turns)
    angles = (2 * np.pi) * (phase - jnp.round(phase))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_table(frames, height, width, head_dim):
    """Cosines and sines of the 3-D rotary embedding of a token grid.

    The head dim splits into (K - 2 floor(K/3), floor(K/3), floor(K/3)) for frame, row, column
    (docs/spec.md section 1). Returns two float32 constants [F, H*W, K/2], angles taken in float64.

    Raises:
      ValueError: a part of the head dim is odd.
    """
    third = head_dim // 3
    parts = (head_dim - 2 * third, third, third)
    if any(part % 2 for part in parts):
        raise ValueError(
            f"head_dim={head_dim} splits into {parts} for (frame, row, column); "
            "every part must be even"
        )
    axes = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * _frequencies(part) for axis, part in zip(axes, parts)]
    angles = np.concatenate(angles, axis=1)
    angles = angles.reshape(frames, height * width, head_dim // 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def line_rope_table(count, head_dim):
    """As `rope_table`, of tokens in a line: one axis, their index, over the whole head dim.

    Returns two float32 constants [1, count, K/2].
    """
    angles = np.outer(np.arange(count), _frequencies(head_dim))[None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(x, cos, sin):
    """Rotates adjacent pairs of x [B,S,N,K] by tables [F, S/F, K/2], in float32.

    (a, b) becomes (a, b) cos + (b, a) (-sin, sin): elementwise but for the reversed pairs, and so
    is its derivative. Taking even and odd positions apart would cost copies in both.
    """
    # [S, 1, K/2, 2]: the same angles for every head
    cos, sin = (jnp.asarray(a).reshape(-1, 1, a.shape[-1], 1) for a in (cos, sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    rotated = pairs * cos + pairs[..., ::-1] * jnp.concatenate([-sin, sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


# ---- attention and modulation ------------------------------------------------------------------


def attention(q, k, v, key_mask=None, implementation="xla", differentiable=True):
    """softmax(q k^T / sqrt(K)) v for q [B,S,N,K], k and v [B,L,N,K] -> [B,S,N,K].

    key_mask [B,L] bool marks the keys that may be seen; None sees all, and then no mask exists
    anywhere, which keeps fused kernels available. The softmax is in float32. Without derivatives,
    cuDNN takes odd lengths as they are.
    """
    if implementation == "cudnn" and (differentiable or key_mask is not None):
        return even_attention(q, k, v, key_mask, implementation)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def even_attention(q, k, v, key_mask, implementation):
    """As `attention`, on lengths made even, and with a mask that has a row per query.

    JAX differentiates cuDNN's attention only so. The context of the release has 129 rows.
    """
    batch, queries, keys = *q.shape[:2], k.shape[1]
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))
    hide = {}  # from the queries, the row of zeros behind the keys
    if key_mask is not None:
        mask = jnp.pad(key_mask, ((0, 0), (0, keys % 2)))[:, None, None, :]
        hide["mask"] = jnp.broadcast_to(mask, (batch, 1, q.shape[1], k.shape[1]))
    elif keys % 2:
        hide["key_value_seq_lengths"] = jnp.full((batch,), keys, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **hide)
    return out[:, :queries]


def frame_attention(q, k, v, frames, mode, implementation="xla"):
    """Self-attention over S = F * tokens-per-frame video tokens under a frame rule, mask-free.

    mode (docs/spec.md section 1): "bidirectional" sees everything; "first_frame_causal": frame 0
    sees only frame 0, the others everything; "per_frame_causal": frame f sees frames 0..f. The
    rules are blocks of whole frames: each is a few plain attention calls instead of a mask [S,S].
    """
    per_frame = q.shape[1] // frames
    if mode == "bidirectional" or frames == 1:
        groups = [(0, frames, frames)]
    elif mode == "first_frame_causal":
        groups = [(0, 1, 1), (1, frames, frames)]
    elif mode == "per_frame_causal":
        groups = [(f, f + 1, f + 1) for f in range(frames)]
    else:
        raise ValueError(
            f"attention mask {mode!r}; expected 'bidirectional', "
            "'first_frame_causal' or 'per_frame_causal'"
        )
    out = []
    for first, last, seen in groups:
        queries, seen = q[:, first * per_frame : last * per_frame], seen * per_frame
        out.append(attention(queries, k[:, :seen], v[:, :seen], None, implementation))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def per_token(rows, frames, tokens):
    """Spreads modulation rows [B,2,D] (frame 0, the other frames) over tokens -> [B,S,D].

    With one row [B,1,D] (a pass over frame 0 only) the row broadcasts as it is. The selection
    fuses into whatever consumes it: nothing of size [S,D] per block is stored.
    """
    if rows.shape[1] == 1:
        return rows
    first = (jnp.arange(tokens) < tokens // frames)[None, :, None]
    return jnp.where(first, rows[:, :1], rows[:, 1:])
