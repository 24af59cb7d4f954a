"""Random crops and colours of the video a run with config.data.encode_online trains on.

On the device and in training only. What is drawn is drawn once for a window, so that its frames
still show one scene: a crop per camera, factors for the whole canvas.
"""

import typing

import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # brightness of red, green and blue (ITU-R BT.601)


class Draws(typing.NamedTuple):
    """What is random about B windows with R camera regions. None: that change is off.

    Attributes:
      crop: f32 [B, R, 3]: side of the crop as a share of the region's, then its top and left corner
        as shares of the room there is.
      brightness, contrast, saturation: factors f32 [B].
    """

    crop: jax.Array | None = None
    brightness: jax.Array | None = None
    contrast: jax.Array | None = None
    saturation: jax.Array | None = None


def check(data):
    """Checks the `AugmentConfig` of a `DataConfig`.

    Raises:
      ValueError: any of it without data.encode_online.
    """
    config = data.augment
    changes = config.brightness, config.contrast, config.saturation
    if not data.encode_online and (config.crop < 1 or any(changes)):
        raise ValueError(
            "config.data.augment changes pixels, and this run reads cached latents: set "
            "config.data.encode_online=True, or leave config.data.augment as it was"
        )


def draw(key, rows, regions, config):
    """Returns the `Draws` of `rows` windows with that many `regions` under an `AugmentConfig`."""
    keys = jax.random.split(key, 4)
    crop = None
    if config.crop < 1:
        low = jnp.array([config.crop, 0, 0])
        crop = jax.random.uniform(keys[0], (rows, regions, 3), minval=low)
    factors = (
        jax.random.uniform(k, (rows,), minval=max(0, 1 - most), maxval=1 + most) if most else None
        for k, most in zip(keys[1:], (config.brightness, config.contrast, config.saturation))
    )
    return Draws(crop, *factors)


def apply(video, draws, layouts, dataset):
    """Returns videos changed as drawn.

    Args:
      video: uint8 [B, T, H, W, 3].
      draws: `Draws` of the B windows.
      layouts: for each dataset the regions of its cameras, ((top, left, height, width), ...).
      dataset: int32 [B], the dataset of each window.

    Returns:
      float32 [B, T, H, W, 3] in 0..1.
    """
    x = original = jnp.asarray(video).astype(jnp.float32) / 255
    if draws.crop is not None:
        for regions in dict.fromkeys(layouts):
            here = jnp.array([layout == regions for layout in layouts])[dataset]
            cropped = _cropped(original, draws.crop, regions)
            x = jnp.where(here[:, None, None, None, None], cropped, x)
    # In torchvision's order and with its clipping.
    if draws.brightness is not None:
        x = _blend(x, 0, draws.brightness)
    if draws.contrast is not None:
        x = _blend(x, _grey(x).mean((1, 2, 3, 4), keepdims=True), draws.contrast)
    if draws.saturation is not None:
        x = _blend(x, _grey(x), draws.saturation)
    return x


def _cropped(x, crops, regions):
    """[B, T, H, W, 3] -> each region filled with the part of it that `crops` [B, R, 3] say."""
    for crop, (top, left, height, width) in zip(crops.swapaxes(0, 1), regions):
        place = (..., slice(top, top + height), slice(left, left + width), slice(None))
        x = x.at[place].set(jax.vmap(_crop)(x[place], crop))
    return x


def _crop(frames, crop):
    """[T, h, w, 3] -> the part that `crop` [3] says, at the size of the whole, bilinear."""
    side, corner = crop[0], crop[1:]
    zoom = 1 / side
    offset = corner * (1 - side) * jnp.array(frames.shape[1:3]) * zoom  # pixels of the zoomed one
    return jax.image.scale_and_translate(
        frames, frames.shape, (1, 2), jnp.stack([zoom, zoom]), -offset, "linear", antialias=False
    )


def _grey(x):
    return (x * jnp.array(_LUMA)).sum(axis=-1, keepdims=True)


def _blend(x, other, factor):
    """other + factor * (x - other), one factor per row [B], clipped to 0..1."""
    return (other + factor[:, None, None, None, None] * (x - other)).clip(0, 1)
