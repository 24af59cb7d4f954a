"""AdamW, schedule and clipping of the PyTorch release in optax (docs/spec.md section 6).

One parameter group: biases, norms and queries decay too, as in the release.
"""

import jax
import jax.numpy as jnp
import optax


def learning_rate(step, config, total_steps):
    """Returns the learning rate of the optimizer step that comes after `step` steps, float32.

    Linear from `lr / warmup_steps` to `lr`, then a cosine down to `lr * final_lr_ratio`, reached
    after `total_steps`. A warm-up longer than the run is cut to `total_steps - 1`.

    Args:
      step: int or int32 array of any shape, optimizer steps already taken.
      config: `OptimizerConfig`.
      total_steps: optimizer steps of the run.
    """
    warmup = min(max(config.warmup_steps, 0), total_steps - 1)
    floor = config.lr * config.final_lr_ratio
    step = jnp.minimum(jnp.asarray(step), total_steps)
    # (1 + cos(pi u)) / 2 as sin^2(pi (1 - u) / 2): the steps left are an exact integer, so that
    # float32 keeps seven digits down to the last step.
    left = (total_steps - step).astype(jnp.float32) / (total_steps - warmup)
    rate = floor + (config.lr - floor) * jnp.sin(0.5 * jnp.pi * left) ** 2
    if warmup:
        ramp = config.lr * (1 / warmup + (1 - 1 / warmup) * (step.astype(jnp.float32) / warmup))
        rate = jnp.where(step < warmup, ramp, rate)
    return rate.astype(jnp.float32)


def clip_by_global_norm(max_norm):
    """Scales gradients by `max_norm / (norm + 1e-6)` where that is below 1, as torch does."""

    def clip(grads, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def make_optimizer(config, total_steps):
    """Returns the optax transformation of an `OptimizerConfig` for a run of `total_steps`.

    Equal to torch AdamW up to float32 rounding: weight decay `lr * weight_decay` on the old
    parameter, bias-corrected moments, eps outside the square root.
    """
    parts = [clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return optax.chain(
        *parts,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: learning_rate(step, config, total_steps)),
    )


def moments(opt_state):
    """Returns {"mu", "nu"}: the two trees an optimizer state holds besides the step count."""
    return {name: optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")}


def with_moments(opt_state, saved, step):
    """Returns `opt_state` with the `moments` trees and the step count replaced."""
    return optax.tree_utils.tree_set(opt_state, mu=saved["mu"], nu=saved["nu"], count=step)


def update_ema(ema, params, decay):
    """Returns `decay * ema + (1 - decay) * params`, leaf by leaf."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
