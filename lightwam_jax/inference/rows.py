"""Rows of a policy's batch: how many there are, and the noise that a plan of each starts from."""

import zlib

import jax
import numpy as np

from lightwam_jax.inference.batching import PADDED_SIZES
from lightwam_jax.training import losses

_CONSTANT = 42  # the seed that Fast-WAM's scripts give every call


def padded_size(rows):
    """Returns the smallest padded batch size that holds `rows`."""
    if rows > PADDED_SIZES[-1]:
        raise ValueError(f"{rows} rows at once; expected at most {PADDED_SIZES[-1]}")
    return next(size for size in PADDED_SIZES if size >= rows)


def pad(array, rows):
    """Repeats the first row until there are `rows`; rows of a batch do not see each other."""
    if len(array) == rows:
        return array
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def noise_seeds(images, state, seed=0):
    """Returns uint32 [B] from which `noise` draws: a checksum of what each row shows.

    Two calls, and two rows of a call, start from different noise as long as anything differs in
    what their cameras and their states show; and the plan of an observation is the same whatever
    batch, process or computer it is made in.

    Args:
      images: {camera: uint8 [B,h,w,3]}. state: float32 [B,P]. seed: of the policy.
    """
    seeds = np.empty(len(state), np.uint32)
    for row in range(len(state)):
        check = zlib.crc32(np.ascontiguousarray(state[row]).tobytes(), seed)
        for camera in sorted(images):
            check = zlib.crc32(np.ascontiguousarray(images[camera][row]), check)
        seeds[row] = check
    return seeds


def noise(seeds, latents_shape, config):
    """Returns `losses.plan_noise` of a `Config` with a row per seed.

    latents_shape: [B,1,H,W,C] of the observations.
    """
    if config.model.flow_noise == "constant":
        seeds = jax.numpy.full_like(seeds, _CONSTANT)
    draw = lambda seed: losses.plan_noise(jax.random.key(seed), latents_shape, config)
    return jax.vmap(draw)(seeds)
