"""The losses of Light-WAM: future-video flow matching and action regression, or flow matching.

Formulas: docs/spec.md section 5, and 16 for a head that generates. Every loss is a mean over the
batch, so micro-batches of equal size average to the whole.
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


class FlowNoise(NamedTuple):
    """As `Noise`, and that of the actions: their own t [B] and noise [B,T,A]."""

    t: jax.Array
    noise: jax.Array
    action_t: jax.Array
    action_noise: jax.Array


def draw(rng, batch, config):
    """Draws what a step needs for a batch under a `Config`: `Noise`, or `FlowNoise`."""
    noise = draw_noise(rng, batch["latents"].shape, config.loss)
    if not config.model.generates:
        return noise
    # Keys of their own, so that the video's draws are those of a run without them.
    time_key, noise_key = jax.random.split(jax.random.fold_in(rng, 1))
    shape = batch["actions"].shape
    t = flow.sample_time(jax.random.uniform(time_key, shape[:1]), config.model.flow_shift)
    return FlowNoise(*noise, t, jax.random.normal(noise_key, shape))


def plan_noise(rng, latents_shape, config, rows=()):
    """Draws what `LightWAM.act` starts from under a `Config` whose head generates.

    Args:
      latents_shape: [B,F,H,W,C] of the observation; its B and F do not matter.
      rows: leading axes of the noise.

    Returns:
      [*rows,T,A], float32; for a model that imagines, [*rows,F,h,w,C] of the video and that.
    """
    data, factor = config.data, config.loss.downsample
    actions = jax.random.normal(rng, (*rows, data.action_horizon, config.model.action_dim))
    if not config.model.imagines:
        return actions
    *_, h, w, c = latents_shape
    shape = (*rows, data.latent_frames, h // factor, w // factor, c)
    return jax.random.normal(jax.random.fold_in(rng, 1), shape), actions


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
      batch: see `data/spec.py`. noise: from `draw`.
      config: `LossConfig`.

    Returns:
      loss, a float32 scalar, and {"loss", "loss_video", "loss_action", "action_l1"} (before the
      lambdas; the last is the mean absolute error over the weighted steps, of the actions or of
      their velocity).
    """
    return loss_of(forward(model, params, batch, noise, config), batch, noise, config)


def loss_of(out, batch, noise, config):
    """What `training_loss` returns, from what `forward` returned."""
    video = video_loss(out["velocity"], out["target"], noise.t, batch["image_is_pad"], config)
    weights = action_weights(batch["action_is_pad"], config)
    error = out["actions"] - out.get("action_target", batch["actions"].astype(jnp.float32))
    action = weighted_mean(jnp.square(error).mean(axis=-1), weights)
    action = (action * out.get("action_weight", 1.0)).mean()
    total = config.lambda_video * video + config.lambda_action * action
    l1 = weighted_mean(jnp.abs(error).mean(axis=-1), weights).mean()
    return total, {"loss": total, "loss_video": video, "loss_action": action, "action_l1": l1}


def forward(model, params, batch, noise, config):
    """Both passes -> {"velocity", "target", "noisy" [B,F,h,w,C], "actions" [B,T,A]}, float32.

    Two independent passes over the same context: pooled, noised clip for the video; the clean
    first frame at full resolution for the actions. Gradients flow through both. With `FlowNoise`
    "actions" is the velocity of the noised actions; beside it are "action_target" [B,T,A] and
    "action_weight" [B], by which a sample counts.
    """
    latents = batch["latents"].astype(jnp.float32)
    clean = latents - latents[:, :1] if config.residual_target else latents
    clean = pool_latents(clean, config.downsample)
    # The clean frame shown is pooled from the latents themselves, also with residual targets.
    first = pool_latents(latents[:, :1], config.downsample)
    noisy = flow.add_noise(clean, noise.noise, noise.t).at[:, :1].set(first)
    text, mask, horizon = batch["context"], text_mask(batch, config), batch["actions"].shape[1]
    inputs = [noisy, noise.t, latents[:, :1], text, batch["proprio"], horizon, mask]
    of_actions = {}
    if isinstance(noise, FlowNoise):
        recorded, t = batch["actions"].astype(jnp.float32), noise.action_t
        inputs.append((flow.add_noise(recorded, noise.action_noise, t), t))
        of_actions["action_target"] = flow.target(recorded, noise.action_noise)
        of_actions["action_weight"] = flow.weight(t, model.expert.shift)
    velocity, actions = model.apply({"params": params}, *inputs)
    return {
        "velocity": velocity.astype(jnp.float32),
        "actions": actions,
        "noisy": noisy,
        "target": flow.target(clean, noise.noise),
        **of_actions,
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
