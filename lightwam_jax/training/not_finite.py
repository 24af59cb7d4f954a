"""What is known about a step whose loss or gradient was not finite."""

import jax
import numpy as np

from lightwam_jax import atomic
from lightwam_jax import config as config_lib


def report(config, workdir, saved, step, batch, row):
    """Writes `<workdir>/not_finite.json`; returns the message for the user.

    Args:
      config: `Config`. workdir: run directory. saved: directory of the state before the step.
      step: number of the step. batch: this process's part of its batch.
      row: losses and norms of the step.
    """
    samples, broken = sample_names(config, batch), []
    for name, x in batch.items():
        rows = ~np.isfinite(x.astype(np.float32)).reshape(len(x), -1).all(axis=1)
        if rows.any():
            broken.append(f"{name} of {samples[rows].tolist()}")
    file = workdir / "not_finite.json"
    if jax.process_index() == 0:
        metrics = {name: str(value) for name, value in row.items()}
        values = {"step": step, "samples": samples.tolist(), "not_finite_data": broken}
        atomic.write_json(file, values | {"metrics": metrics})
    advice = (
        "the data are finite. Choose another --workdir and a lower config.optimizer.lr, "
        "config.optimizer.clip_norm=1.0 or config.model.dtype=float32; config.train.init can be "
        "the saved state"
    )
    if broken:
        advice = f"the data are not finite: {'; '.join(broken)}. Repair them, rebuild the cache"
    return "\n  ".join(
        [
            f"step {step} is not finite: "
            + ", ".join(f"{name} {value:.4g}" for name, value in row.items()),
            f"samples of its batch: {samples.tolist()}",
            f"the state before it is saved ({saved}), what is known of the step in {file}; the "
            "same command would meet the same batch again",
            advice,
        ]
    )


def sample_names(config, batch):
    """The samples of a batch: their rows, in a mixture with the dataset ("libero 3")."""
    if "dataset" not in batch:
        return batch["index"]
    names = [dataset.name for dataset in config_lib.datasets(config)]
    return np.array([f"{names[m]} {row}" for m, row in zip(batch["dataset"], batch["index"])])
