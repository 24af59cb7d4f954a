"""The Wan 2.1 video VAE: 8x8 pixels and 4 frames become one latent vector of 16 channels.

Every convolution is causal in time and runs over the whole sequence at once: zero frames on the
left replace the cache that the official streaming code keeps between chunks, and the results are
equal. The first frame always is a latent frame of its own, so an image is a video of one frame.

Letters: B batch, T video frames, F latent frames, H W pixel grid, h w latent grid (H/8, W/8),
C channels.
Module names are the official ones (`encoder.downsamples.3.residual.6` is
`encoder/downsamples_3/residual_6`); numbers count positions in the official module lists, where
activations take a position too.
"""

import itertools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax import lax

# Per-channel mean and standard deviation of the latents, published with the weights.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class CausalConv(nn.Module):
    """Convolution [B,T,H,W,C] -> [B,T,H,W,features] that never looks at a later frame.

    The kernel may be stored with its last time tap alone ([1,h,w,C,features]: `still_params`),
    which is all that a single image meets.
    """

    features: int
    kernel_size: tuple = (3, 3, 3)  # time, height, width: odd
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1], self.features)
        if x.shape[1] == 1 and self.has_variable("params", "kernel"):
            shape = self.get_variable("params", "kernel").shape[:1] + shape[1:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        pad = [(size // 2, size // 2) for size in self.kernel_size[1:]]
        if x.shape[1] == 1:
            # Every tap but the last meets zero frames: a 2-D convolution with a third of the work.
            image, layout = x[:, 0], ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(image, kernel[-1], (1, 1), pad, dimension_numbers=layout)
            return x[:, None] + bias
        pad, layout = [(self.kernel_size[0] - 1, 0), *pad], ("NDHWC", "DHWIO", "NDHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1, 1), pad, dimension_numbers=layout) + bias


def still_params(params):
    """Returns encoder parameters that encode single images only: a third of each `CausalConv`."""
    return jax.tree.map(lambda x: x[-1:] if x.shape[:3] == (3, 3, 3) else x, params)


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the last axis; no mean, no bias. Computed in float32."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
        inverse = lax.rsqrt(jnp.maximum(square, 1e-24))  # 1 / max(|x|, 1e-12), differentiable at 0
        scale = x.shape[-1] ** 0.5 * gamma.astype(jnp.float32)
        return (x32 * inverse * scale).astype(self.dtype)


class ResBlock(nn.Module):
    """Twice norm, SiLU, causal convolution, plus the input: [B,T,H,W,C] -> [B,T,H,W,features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = nn.silu(ChannelNorm(self.dtype, name="residual_0")(x))
        y = CausalConv(self.features, dtype=self.dtype, name="residual_2")(y)
        y = nn.silu(ChannelNorm(self.dtype, name="residual_3")(y))
        y = CausalConv(self.features, dtype=self.dtype, name="residual_6")(y)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """Adds single-head self-attention over the pixels of each frame: [B,T,H,W,C] -> same."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, _, h, _, c = x.shape
        y = ChannelNorm(self.dtype, name="norm")(x)
        y = nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(y)
        # [B,T,H,W,3C] -> three times [BT, HW, one head, C]
        q, k, v = einops.rearrange(y, "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        y = jax.nn.dot_product_attention(q, k, v)
        y = einops.rearrange(y, "(b t) (h w) 1 c -> b t h w c", b=b, h=h)
        return x + nn.Dense(c, dtype=self.dtype, name="proj")(y)


class Downsample(nn.Module):
    """Halves H and W and, with `time`, the frames after the first.

    [B,1+2n,H,W,C] -> [B,1+n,H/2,W/2,C]
    """

    time: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, c = x.shape[0], x.shape[-1]
        x = einops.rearrange(x, "b t h w c -> (b t) h w c")
        # The official code pads the right and bottom edges only.
        edges = dict(strides=2, padding=((0, 1), (0, 1)))
        x = nn.Conv(c, (3, 3), **edges, dtype=self.dtype, name="resample_1")(x)
        x = einops.rearrange(x, "(b t) h w c -> b t h w c", b=b)
        if self.time:
            # Frame 0 passes untouched; windows (0,1,2), (2,3,4), ... of which an image has none.
            windows = dict(strides=(2, 1, 1), padding="VALID")
            later = nn.Conv(c, (3, 1, 1), **windows, dtype=self.dtype, name="time_conv")(x)
            x = jnp.concatenate([x[:, :1], later], axis=1)
        return x


class Upsample(nn.Module):
    """Doubles H and W and, with `time`, the frames after the first.

    [B,1+n,H,W,C] -> [B,1+2n,2H,2W,features]
    """

    time: bool
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, c = x.shape[0], x.shape[-1]
        if self.time:
            # Frame 0 passes untouched and is in no window; a later frame yields two, the even one
            # in the first half of the channels.
            later = CausalConv(2 * c, (3, 1, 1), dtype=self.dtype, name="time_conv")(x[:, 1:])
            later = einops.rearrange(later, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([x[:, :1], later], axis=1)
        x = einops.repeat(x, "b t h w c -> (b t) (h up) (w right) c", up=2, right=2)
        x = nn.Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="resample_1")(x)
        return einops.rearrange(x, "(b t) h w c -> b t h w c", b=b)


class _Half(nn.Module):
    """What encoder and decoder share. `features`: channels that come out."""

    dim: int
    dim_mult: tuple
    num_res_blocks: int
    time_downsample: tuple
    features: int
    dtype: Any = jnp.float32

    def conv1(self, x, features):
        return CausalConv(features, dtype=self.dtype, name="conv1")(x)

    def middle(self, x):
        """Residual block, attention, residual block on [B,T,H,W,C]."""
        x = ResBlock(x.shape[-1], self.dtype, name="middle_0")(x)
        x = FrameAttention(self.dtype, name="middle_1")(x)
        return ResBlock(x.shape[-1], self.dtype, name="middle_2")(x)

    def head(self, x):
        x = nn.silu(ChannelNorm(self.dtype, name="head_0")(x))
        return CausalConv(self.features, dtype=self.dtype, name="head_2")(x)


class Encoder(_Half):
    """Video [B,T,H,W,3] -> features [B,F,h,w,features]."""

    @nn.compact
    def __call__(self, x):
        return self.head(self.middle(self.levels(self.conv1(x, self.dim))))

    def levels(self, x):
        position = itertools.count()
        for level, mult in enumerate(self.dim_mult):
            if level:
                time = self.time_downsample[level - 1]
                x = Downsample(time, self.dtype, name=f"downsamples_{next(position)}")(x)
            for _ in range(self.num_res_blocks):
                x = ResBlock(self.dim * mult, self.dtype, name=f"downsamples_{next(position)}")(x)
        return x


class Decoder(_Half):
    """Features [B,F,h,w,C] -> video [B,4F-3,8h,8w,3]: the encoder's levels, each a block deeper."""

    @nn.compact
    def __call__(self, x):
        x = self.conv1(x, self.dim * self.dim_mult[-1])
        return self.head(self.levels(self.middle(x)))

    def levels(self, x):
        position = itertools.count()
        for level, mult in reversed(list(enumerate(self.dim_mult))):
            for _ in range(self.num_res_blocks + 1):
                x = ResBlock(self.dim * mult, self.dtype, name=f"upsamples_{next(position)}")(x)
            if level:
                time, name = self.time_downsample[level - 1], f"upsamples_{next(position)}"
                x = Upsample(time, x.shape[-1] // 2, self.dtype, name=name)(x)
        return x


class WanVAE(nn.Module):
    """Video in [-1, 1] <-> normalised latents. The defaults are the sizes of Wan2.1_VAE.pth.

    `encode` needs the parameters `encoder` and `conv1` only, `decode` only `decoder` and `conv2`.
    Nothing is sampled. `dtype` is the compute type; results are float32.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    time_downsample: tuple = (False, True, True)  # after levels 0, 1, 2
    latent_mean: tuple = LATENT_MEAN
    latent_std: tuple = LATENT_STD
    dtype: Any = jnp.float32

    def setup(self):
        self.build(Encoder, Decoder, self.dim, 3)

    def build(self, encoder, decoder, decoder_dim, channels):
        """The modules, for `setup`; channels: of the pixels that the decoder gives."""
        sizes = (self.dim_mult, self.num_res_blocks, self.time_downsample)
        self.encoder = encoder(self.dim, *sizes, 2 * self.z_dim, self.dtype)
        self.conv1 = nn.Dense(2 * self.z_dim, dtype=self.dtype)
        self.conv2 = nn.Dense(self.z_dim, dtype=self.dtype)
        self.decoder = decoder(decoder_dim, *sizes, channels, self.dtype)

    def __call__(self, video):
        """Reconstructs a video [B,T,H,W,3]; touches every parameter (for `init`, at any T >= 1)."""
        return self.decode(self.encode(video))

    def encode(self, video):
        """Returns the normalised posterior means of a video.

        Args:
          video: [B,T,H,W,3] in [-1, 1]; H and W multiples of 8; T = 1 (an image) or 1 + 4n. As in
            the official encoder, frames after the last full group of four have no latent.

        Returns:
          latents [B,1+(T-1)//4,H/8,W/8,z_dim] float32.
        """
        video = video[:, : 1 + (video.shape[1] - 1) // 4 * 4]
        moments = self.conv1(self.encoder(video.astype(self.dtype))).astype(jnp.float32)
        mean = moments[..., : self.z_dim]  # the other half is the log-variance
        return (mean - jnp.asarray(self.latent_mean)) / jnp.asarray(self.latent_std)

    def decode(self, latents, clip=True):
        """Returns the video of normalised latents.

        Args:
          latents: [B,F,h,w,z_dim], as `encode` returns them.
          clip: limits the result to [-1, 1].

        Returns:
          video [B,4F-3,8h,8w,3] float32.
        """
        latents = latents.astype(jnp.float32)
        z = latents * jnp.asarray(self.latent_std) + jnp.asarray(self.latent_mean)
        video = self.decoder(self.conv2(z.astype(self.dtype))).astype(jnp.float32)
        return jnp.clip(video, -1.0, 1.0) if clip else video
