"""The two losses of Light-WAM: future-video flow matching and action regression (SPEC section 5).

Every loss is a mean over the batch, so micro-batches of equal size average to the whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import flow
from lightwam_jax.config import FRAMES_PER_LATENT
from lightwam_jax.models.lightwam import pool_latents
from lightwam_jax.training import gripper_timing as gripper_timing_lib


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
    velocity, actions = model.apply(
        {"params": params},
        noisy,
        noise.t,
        latents[:, :1],
        batch["context"],
        batch["proprio"],
        batch["actions"].shape[1],
        _text_mask(batch, config),
    )
    return {
        "velocity": velocity.astype(jnp.float32),
        "actions": actions,
        "noisy": noisy,
        "target": flow.target(clean, noise.noise),
    }


def _text_mask(batch, config):
    """[B,L] of the text rows that attention may see, or None for all: padding rows too."""
    return batch["context_mask"] if config.mask_text_padding else None


def video_loss(velocity, target, t, image_is_pad, config):
    """Flow-matching loss over frames 1.., weighted by w(t), without padded latent steps.

    A latent step is padded only if all four of its video frames are; a sample of padded steps
    alone contributes 0 and still counts in the batch mean (SPEC section 5).
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


def open_loop_errors(model, params, batch, config, grippers=()):
    """Action errors of the policy on recorded observations, as sums to add up over batches.

    Args:
      model: `LightWAM`. params: its parameters, in-memory layout.
      batch: see `data/spec.py`. config: `LossConfig`.
      grippers: `gripper_timing.Gripper`s whose timing is measured.

    Returns {"l1": [A], "mse": [A], "l1_step": [T], "l1_step_dim": [T,A], "count": [],
    "count_step": [T]} in normalised units over the steps that are not padded, and with grippers
    what `gripper_timing.timing` returns; rows with batch["valid"] False count for nothing.
    """
    latents = batch["latents"][:, :1].astype(jnp.float32)
    actions, _ = model.apply(
        {"params": params},
        latents,
        batch["context"],
        batch["proprio"],
        batch["actions"].shape[1],
        _text_mask(batch, config),
        method="act",
    )
    valid = ~batch["action_is_pad"] & batch.get("valid", jnp.ones(len(latents), bool))[:, None]
    weight = valid.astype(jnp.float32)
    recorded = batch["actions"].astype(jnp.float32)
    error = (actions - recorded) * weight[..., None]
    return {
        "l1": jnp.abs(error).sum(axis=(0, 1)),
        "mse": jnp.square(error).sum(axis=(0, 1)),
        "l1_step": jnp.abs(error).mean(axis=-1).sum(axis=0),
        "l1_step_dim": jnp.abs(error).sum(axis=0),
        "count": weight.sum(),
        "count_step": weight.sum(axis=0),
        **gripper_timing_lib.timing(actions, recorded, valid, grippers, batch.get("dataset")),
    }


def mean_errors(sums):
    """Averages what `open_loop_errors` returned for one or more batches.

    Returns {"l1": [A], "mse": [A], "l1_step": [T], "l1_step_dim": [T,A], "steps": []}, numpy, and
    the sums of `gripper_timing.timing` as they are; `steps` is how many there were, and where
    there were none the means are 0.
    """
    total = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *jax.device_get(sums))
    count, each = np.maximum(total["count"], 1), np.maximum(total["count_step"], 1)
    return {
        "l1": total["l1"] / count,
        "mse": total["mse"] / count,
        "l1_step": total["l1_step"] / each,
        "l1_step_dim": total["l1_step_dim"] / each[:, None],
        "steps": total["count"],
        **{name: sums for name, sums in total.items() if name.startswith("gripper_")},
    }


def validation_row(means, grippers=()):
    """Returns what the training log keeps of `mean_errors`: {name: number, or list of numbers}.

    "gripper/{its name}/{what}" are of `gripper_timing.summary`.
    """
    row = {name: means[name] for name in ("l1", "mse", "l1_step", "steps")}
    row |= {"l1_mean": means["l1"].mean(), "mse_mean": means["mse"].mean()}
    timing = gripper_timing_lib.summary(means, grippers)
    return row | {
        f"gripper/{gripper}/{name}": value
        for gripper, numbers in timing.items()
        for name, value in numbers.items()
    }
