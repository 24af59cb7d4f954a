"""The Wan 2.2 video VAE: 16x16 pixels and 4 frames become one latent vector of 48 channels.

It differs from the 2.1 VAE (vae.py) in four ways: pixels are folded 2x2 into channels first; the
resampling layers keep the width; every level adds a parameter-free shortcut around itself; and the
decoder is wider than the encoder. Causality and the treatment of frame 0 are the same.

Letters and module names as in vae.py; a level is `downsamples_{level}/downsamples_{position}`.
"""

import einops
import jax.numpy as jnp
from flax import linen as nn

from lightwam_jax.models import vae
from lightwam_jax.models.vae import Downsample, ResBlock, Upsample

# Per-channel mean and standard deviation of the latents, published with the weights.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def group_mean(x, features, time, space):
    """Shortcut of an encoder level: averages groups of neighbouring values into `features`.

    [B,T,H,W,C] -> [B,ceil(T/time),H/space,W/space,features]. Zero frames in front fill T up to a
    multiple of `time` and count in the mean.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = einops.rearrange(
        x, "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)", ft=time, fh=space, fw=space
    )
    return einops.reduce(x, "b t h w (c group) -> b t h w c", "mean", c=features)


def repeat_up(x, features, time, space):
    """Shortcut of a decoder level: repeats channels, then unfolds them over time and space.

    [B,T,H,W,C] -> [B,time*T-(time-1),H*space,W*space,features]: frame 0 yields one frame only.
    """
    repeats = features * time * space**2 // x.shape[-1]
    x = jnp.repeat(x, repeats, axis=-1)
    x = einops.rearrange(
        x, "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c", ft=time, fh=space, fw=space
    )
    return x[:, time - 1 :]


class Level(nn.Module):
    """Residual blocks and, but for the last level, a resampling: [B,T,H,W,C] -> features.

    `time`: are frames resampled too; None in the last level. `up`: is it a level of the decoder,
    whose last one has no shortcut.
    """

    features: int
    blocks: int
    time: bool | None
    up: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        before, last, name = x, self.time is None, "upsamples" if self.up else "downsamples"
        factors = (2 if self.time else 1, 1 if last else 2)  # of the shortcut, in time and space
        for i in range(self.blocks):
            x = ResBlock(self.features, self.dtype, name=f"{name}_{i}")(x)
        name = f"{name}_{self.blocks}"
        if not self.up:
            x = x if last else Downsample(self.time, self.dtype, name=name)(x)
            return x + group_mean(before, self.features, *factors)
        if last:
            return x
        x = Upsample(self.time, self.features, self.dtype, name=name)(x)
        return x + repeat_up(before, self.features, *factors)


class Encoder(vae.Encoder):
    """Video [B,T,H,W,3] -> features [B,F,H/16,W/16,features]."""

    def __call__(self, x):
        # The official channel order: colour, column offset, row offset.
        x = einops.rearrange(x, "b t (h q) (w r) c -> b t h w (c r q)", q=2, r=2)
        return super().__call__(x)

    def levels(self, x):
        times = (*self.time_downsample, None)
        for level, (mult, time) in enumerate(zip(self.dim_mult, times)):
            sizes = (self.dim * mult, self.num_res_blocks, time)
            x = Level(*sizes, up=False, dtype=self.dtype, name=f"downsamples_{level}")(x)
        return x


class Decoder(vae.Decoder):
    """Features [B,F,h,w,C] -> video [B,4F-3,16h,16w,3]."""

    def __call__(self, x):
        return einops.rearrange(
            super().__call__(x), "b t h w (c r q) -> b t (h q) (w r) c", q=2, r=2
        )

    def levels(self, x):
        times = (*self.time_downsample[::-1], None)
        for level, (mult, time) in enumerate(zip(self.dim_mult[::-1], times)):
            sizes = (self.dim * mult, self.num_res_blocks + 1, time)
            x = Level(*sizes, up=True, dtype=self.dtype, name=f"upsamples_{level}")(x)
        return x


class Wan22VAE(vae.WanVAE):
    """Video in [-1, 1] <-> normalised latents; the defaults are the sizes of Wan2.2_VAE.pth.

    `encode` and `decode` are those of `WanVAE`, with 16 pixels per latent cell instead of 8.
    """

    dim: int = 160
    decoder_dim: int = 256
    z_dim: int = 48
    latent_mean: tuple = LATENT_MEAN
    latent_std: tuple = LATENT_STD

    def setup(self):
        self.build(Encoder, Decoder, self.decoder_dim, 12)
