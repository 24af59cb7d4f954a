"""What every codec and every text encoder provides, and the pixels that codecs read."""

import typing

import numpy as np

from lightwam_jax.config import FRAMES_PER_LATENT

STRIDES = {"pca": 8, "wan21": 8, "wan22": 16}  # config.data.codec -> pixels per latent cell
STRIDE = STRIDES["pca"]


class Codec(typing.Protocol):
    """Video to latents and back: used by the cache, the policy and the figures.

    Canvases are uint8, or float32 in 0..1 where they were resampled: see `cameras.canvas`.

    Attributes:
      kind: of `STRIDES`.
      latent_channels: C.
      stride: pixels per latent cell.
      id: changes whenever the latents would.
      arrays: pytree of the weights that `encode_with` needs.
      image_arrays: those that it needs for single images; may be fewer.
    """

    kind: str
    latent_channels: int
    stride: int
    id: str
    arrays: dict
    image_arrays: dict

    def encode(self, video):
        """Canvases [B, T, H, W, 3], T = 1 + 4k -> latents f32 [B, 1 + k, H/stride, W/stride, C].

        Raises:
          ValueError: see `check_video`.
        """
        ...

    def decode(self, latents):
        """Latents [B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3], on the host."""
        ...

    def encode_with(self, arrays, video):
        """`encode` as a pure function of arrays, to be traced."""
        ...

    def save(self, directory):
        """Writes codec.json and the weights; `encoders.load_codec` reads them."""
        ...


class TextEncoder(typing.Protocol):
    """Prompts to rows of text features.

    Attributes: dim, the width of a row; id, which tells encoders (and their weights) apart.
    """

    dim: int
    id: str

    def encode(self, prompts, text_len):
        """Returns (context f32 [n, L, dim], zero past the text; mask bool [n, L], true on it)."""
        ...


def check_video(video, stride=STRIDE):
    """Raises ValueError unless `video` is canvases [B, 1 + 4k, H, W, 3] that a codec can encode.

    uint8, or float32 about 0..1; sides multiples of stride.
    """
    if video.dtype not in (np.uint8, np.float32) or video.ndim != 5 or video.shape[-1] != 3:
        raise ValueError(
            f"video is {video.dtype} {list(video.shape)}; expected uint8, or float32 in 0..1, "
            "[B, T, H, W, 3]"
        )
    if video.dtype == np.float32 and not (-1 < video.min(initial=0) <= video.max(initial=1) < 2):
        raise ValueError(
            f"video is float32 from {video.min()} to {video.max()}; expected 0..1 "
            "(images in 0..255 are uint8)"
        )
    _, t, h, w, _ = video.shape
    if (t - 1) % FRAMES_PER_LATENT or h % stride or w % stride:
        raise ValueError(
            f"video of {t} frames of {h}x{w}; expected 1 + a multiple of {FRAMES_PER_LATENT} "
            f"frames and sides that are multiples of {stride}: change config.data.num_frames or "
            "config.data.canvas"
        )


def check_latents(latents, channels):
    """Raises ValueError unless `latents` are [B, F, h, w, channels]."""
    if latents.ndim != 5 or latents.shape[-1] != channels:
        raise ValueError(
            f"latents have shape {list(latents.shape)}; expected [B, F, h, w, {channels}]"
        )


# Canvases are uint8 in 0..255 or float32 in 0..1. These convert either; numpy or traced jax arrays.


def to_float(canvas):
    """Returns a canvas as float32 in 0..1, as codecs see it."""
    return canvas.astype(np.float32) / np.float32(255) if canvas.dtype == np.uint8 else canvas


def in_255(canvas):
    """Returns a canvas as float32 in 0..255, the unit of the PCA components."""
    return canvas.astype(np.float32) if canvas.dtype == np.uint8 else canvas * np.float32(255)


def to_uint8(canvas):
    """Returns a numpy canvas as uint8 in 0..255, for eyes and transport; uint8 comes back as is."""
    if canvas.dtype == np.uint8:
        return canvas
    return np.clip(np.rint(canvas * np.float32(255)), 0, 255).astype(np.uint8)
