"""Action errors of a policy on recorded observations it was not trained on."""

import json
import pathlib

import jax
import numpy as np

from lightwam_jax.evaluation import report
from lightwam_jax.training import losses


def evaluate(policy, batches):
    """Returns the errors over validation batches.

    Args:
      policy: `Policy`.
      batches: of `data.loader.val_batches`.

    Returns:
      {"l1", "mse": [A], "l1_step": [T]} in normalised units, "l1_physical" [A], "samples" int.

    Raises:
      ValueError: no batch, or nothing but padding in them.
    """
    sums = jax.jit(lambda params, batch: losses.open_loop_errors(policy.model, params, batch))
    total, samples = {}, 0
    for batch in batches:
        for name, value in jax.device_get(sums(policy.params, batch)).items():
            total[name] = total.get(name, 0) + value.astype(np.float64)
        samples += int(np.sum(batch["valid"]))
    if not total or not total["count"]:
        raise ValueError("there is nothing to evaluate: the validation split is empty; set config.data.val_fraction "
                         "and run python -m lightwam_jax.precompute --config CONFIG --what latents")
    l1 = total["l1"] / total["count"]
    return {"l1": l1, "mse": total["mse"] / total["count"],
            "l1_step": total["l1_step"] / np.maximum(total["count_step"], 1),
            "l1_physical": l1 / np.abs(policy.assets.action.scale), "samples": samples}


def write(directory, errors):
    """Writes open_loop.json and open_loop.png into `directory` and returns the printable table."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plain = {name: np.asarray(value).tolist() for name, value in errors.items()}
    (directory / "open_loop.json").write_text(json.dumps(plain, indent=2) + "\n")
    steps = np.arange(len(errors["l1_step"]))
    report.curve_chart(directory / "open_loop.png", {"mean over dimensions": (steps, errors["l1_step"])},
                       "L1 error, normalised", xlabel="step of the chunk")
    lines = [f"{errors['samples']} samples", f"{'dimension':<10}{'L1':>10}{'MSE':>10}{'L1, physical units':>22}"]
    lines += [f"{i:<10}{l1:>10.4f}{mse:>10.4f}{physical:>22.4f}" for i, (l1, mse, physical) in enumerate(
        zip(errors["l1"], errors["mse"], errors["l1_physical"]))]
    return "\n".join([*lines, f"{'mean':<10}{errors['l1'].mean():>10.4f}{errors['mse'].mean():>10.4f}"])
