"""Open-loop validation: the policy's actions against recorded ones, on observations of others."""

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.training import gripper_timing as gripper_timing_lib
from lightwam_jax.training import losses


def open_loop_errors(model, params, batch, config, grippers=(), noise=None):
    """Action errors of the policy on recorded observations, as sums to add up over batches.

    Args:
      model: `LightWAM`. params: its parameters, in-memory layout.
      batch: see `data/spec.py`. config: `LossConfig`.
      grippers: `gripper_timing.Gripper`s whose timing is measured.
      noise: of `losses.plan_noise` for all rows, for a model that `generates`.

    Returns {"l1": [A], "mse": [A], "l1_step": [T], "l1_step_dim": [T,A], "count": [],
    "count_step": [T]} in normalised units over the steps that are not padded, and with grippers
    what `gripper_timing.timing` returns; rows with batch["valid"] False count for nothing.
    """
    latents = batch["latents"][:, :1].astype(jnp.float32)
    text, mask = batch["context"], losses.text_mask(batch, config)
    horizon = batch["actions"].shape[1]
    inputs = [latents, text, batch["proprio"], horizon, mask]
    if noise is not None:
        inputs.append(noise)
    actions, _ = model.apply({"params": params}, *inputs, method="act")
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


def noise(config, batch):
    """Returns the noise of a validation batch: the same every time. None where no head generates.

    What differs between two validations is then the parameters.
    """
    if not config.model.generates:
        return None
    key, rows = jax.random.key(config.seed), len(batch["actions"])
    return losses.plan_noise(key, batch["latents"].shape, config, (rows,))


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
