"""The losses of Light-WAM: future-video flow matching and action regression.

Formulas: docs/spec.md section 5. Every loss is a mean over the batch, so micro-batches of equal
size average to the whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightwam_jax import flow
from lightwam_jax.config import FRAMES_PER_LATENT
from lightwam_jax.models.lightwam import pool_latents


class Noise(NamedTuple):
    """The randomness of a training step: t [B] in 0..1000, noise on the pooled grid [B,F,h,w,C]."""

    t: jax.Array
    noise: jax.Array


def draw_noise(rng, latents_shape, config):
    """Draws `Noise` for latents of shape [B,F,H,W,C] under a `LossConfig`, float32."""
    b, f, h, w, c = latents_shape
    time_key, noise_key = jax.random.split(rng)
    u = jax.random.uniform(time_key, (b,))
    shape = (b, f, h // config.downsample, w // config.downsample, c)
    return Noise(flow.sample_time(u, config.shift), jax.random.normal(noise_key, shape))


def training_loss(model, params, batch, noise, config):
    """Total loss of a batch and its parts.

    Args:
      model: `LightWAM`. params: its parameters, in-memory layout.
      batch: see `data/spec.py`. noise: `draw_noise(...)`, or a key to draw it from.
      config: `LossConfig`.

    Returns:
      loss, a float32 scalar, and {"loss", "loss_video", "loss_action", "action_l1"} (before the
      lambdas; the last is the mean absolute error over the weighted steps).
    """
    if not isinstance(noise, Noise):
        noise = draw_noise(noise, batch["latents"].shape, config)
    return loss_of(forward(model, params, batch, noise, config), batch, noise, config)


def loss_of(out, batch, noise, config):
    """What `training_loss` returns, from what `forward` returned."""
    video = video_loss(out["velocity"], out["target"], noise.t, batch["image_is_pad"], config)
    weights = action_weights(batch["action_is_pad"], config)
    error = out["actions"] - batch["actions"].astype(jnp.float32)
    action = weighted_mean(jnp.square(error).mean(axis=-1), weights).mean()
    total = config.lambda_video * video + config.lambda_action * action
    l1 = weighted_mean(jnp.abs(error).mean(axis=-1), weights).mean()
    return total, {"loss": total, "loss_video": video, "loss_action": action, "action_l1": l1}


def forward(model, params, batch, noise, config):
    """Both passes -> {"velocity", "target", "noisy" [B,F,h,w,C], "actions" [B,T,A]}, float32.

    Two independent passes over the same context: pooled, noised clip for the video; the clean
    first frame at full resolution for the actions. Gradients flow through both.
    """
    latents = batch["latents"].astype(jnp.float32)
    clean = latents - latents[:, :1] if config.residual_target else latents
    clean = pool_latents(clean, config.downsample)
    # The clean frame shown is pooled from the latents themselves, also with residual targets.
    first = pool_latents(latents[:, :1], config.downsample)
    noisy = flow.add_noise(clean, noise.noise, noise.t).at[:, :1].set(first)
    text, mask, horizon = batch["context"], text_mask(batch, config), batch["actions"].shape[1]
    velocity, actions = model.apply(
        {"params": params}, noisy, noise.t, latents[:, :1], text, batch["proprio"], horizon, mask
    )
    return {
        "velocity": velocity.astype(jnp.float32),
        "actions": actions,
        "noisy": noisy,
        "target": flow.target(clean, noise.noise),
    }


def text_mask(batch, config):
    """[B,L] of the text rows that attention may see, or None for all: padding rows too."""
    return batch["context_mask"] if config.mask_text_padding else None


def video_loss(velocity, target, t, image_is_pad, config):
    """Flow-matching loss over frames 1.., weighted by w(t), without padded latent steps.

    A latent step is padded only if all four of its video frames are; a sample of padded steps
    alone contributes 0 and still counts in the batch mean (docs/spec.md section 5).
    """
    per_step = jnp.square(velocity[:, 1:] - target[:, 1:]).mean(axis=(2, 3, 4))  # [B,F-1]
    return (
        flow.weight(t, config.shift)
        * weighted_mean(per_step, latent_step_valid(image_is_pad), floor=1.0)
    ).mean()


def latent_step_valid(image_is_pad):
    """[B,video frames] bool -> [B,F-1] float32: 1 where any of the step's four frames is real."""
    groups = image_is_pad[:, 1:].reshape(image_is_pad.shape[0], -1, FRAMES_PER_LATENT)
    return (~groups.all(axis=-1)).astype(jnp.float32)


def action_weights(action_is_pad, config):
    """[B,T] weights: valid steps times the temporal profile (prefix_weight, then tail_weight)."""
    horizon = action_is_pad.shape[1]
    profile = jnp.ones(horizon)
    if config.temporal_weighting:
        profile = jnp.where(
            jnp.arange(horizon) < config.prefix_steps, config.prefix_weight, config.tail_weight
        )
    return (~action_is_pad).astype(jnp.float32) * profile


def weighted_mean(values, weights, floor=1e-6):
    """Per-sample mean of values [B,n] under weights [B,n] -> [B]; the floor guards empty ones."""
    return (values * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), floor)
