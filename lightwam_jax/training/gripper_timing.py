"""When grippers open and close: predicted against recorded, in open-loop evaluation.

Errors averaged over a chunk hide what decides a grasp: the step at which the gripper moves. Here a
gripper is in one of two states, above or below the middle of its range in the training data. A
change is a step whose state differs from that of the step before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize

# Gripper dimensions of the simulated suites. Their configs leave config.data.gripper_dims empty.
OF_SUITE = {"demo": (3,), "metaworld": (3,), "libero": (6,)}


class Gripper(NamedTuple):
    """A dimension of the actions that opens and closes.

    Attributes:
      name: the number of the dimension, in a mixture "{dataset}/{number}".
      dim: its number.
      middle: normalised value between closed and open.
      dataset: number of its dataset in a mixture, None without one.
    """

    name: str
    dim: int
    middle: float
    dataset: int | None = None


def dims(config):
    """Returns the dimensions that are grippers: config.data.gripper_dims, else its suite's."""
    return config.data.gripper_dims or OF_SUITE.get(config.evaluation.suite, ())


def of_data(config, statistics, normalizer, name="", dataset=None):
    """Returns the `Gripper`s of one dataset.

    Left out are those that never move in the training data; chunks of one step have none.

    Args:
      config: `Config` of the dataset. statistics: its dataset_stats.json.
      normalizer: `Normalizer` of its actions. name, dataset: see `Gripper`.

    Raises:
      ValueError: the suite's actions have a gripper that the data do not have.
    """
    table = normalize.table_of(statistics, "action")
    low, high = (np.asarray(table[f"global_{end}"], np.float32) for end in ("min", "max"))
    found = dims(config) if config.data.action_horizon > 1 else ()
    if wrong := [dim for dim in found if dim >= len(low)]:
        raise ValueError(
            f"action {wrong[0]} should be a gripper (config.data.gripper_dims, or of "
            f"config.evaluation.suite={config.evaluation.suite!r}), and the data have "
            f"actions 0 to {len(low) - 1}: correct one of them"
        )
    middle = normalizer.normalize((low + high) / 2)
    return [
        Gripper(f"{name}/{dim}" if name else str(dim), dim, float(middle[dim]), dataset)
        for dim in found
        if high[dim] > low[dim]
    ]


def of_run(config):
    """Returns the `Gripper`s of a run's datasets, from their caches; random data have none."""
    if config.data.source == "fake":
        return []
    found = []
    for number, (name, _, dataset) in enumerate(config_lib.datasets(config)):
        if dims(dataset):
            directory = assets_lib.assets_directory(dataset)
            statistics, _, action = assets_lib.load_normalizers(directory, dataset)
            number = number if config.data.mixture else None
            found += of_data(dataset, statistics, action, name, number)
    return found


def timing(predicted, recorded, valid, grippers, dataset=None):
    """Counts the changes of grippers in windows, to add up over batches.

    The first recorded change of a window is compared with the nearest predicted change of the same
    kind (opening or closing).

    Args:
      predicted, recorded: f32 [B,T,A], normalised. valid: bool [B,T]. grippers: `Gripper`s.
      dataset: int [B], in a mixture: the dataset of each window.

    Returns:
      counts of windows, float32: {"gripper_changing": [G] with a recorded change,
      "gripper_offsets": [G,2T-1] those with a predicted change of the same kind, by how many steps
      later it comes (-(T-1) to T-1), "gripper_still": [G] without a recorded change,
      "gripper_spurious": [G] those of them with a predicted change}.
    """
    each = [
        _timing(
            predicted[..., g.dim] > g.middle,
            recorded[..., g.dim] > g.middle,
            valid if g.dataset is None else valid & (dataset == g.dataset)[:, None],
        )
        for g in grippers
    ]
    return {name: jnp.stack([one[name] for one in each]) for name in each[0]} if each else {}


def _timing(predicted, recorded, valid):
    both = valid[:, 1:] & valid[:, :-1]

    def changes(state):  # [B,T-1]: 1 upwards, -1 downwards
        return jnp.diff(state.astype(jnp.int32), axis=1) * both

    true, ours = changes(recorded), changes(predicted)
    changing = (true != 0).any(axis=1)
    first = (true != 0).argmax(axis=1)
    like = (ours != 0) & (ours == jnp.take_along_axis(true, first[:, None], axis=1))
    steps, horizon = jnp.arange(true.shape[1]), recorded.shape[1]
    nearest = jnp.where(like, jnp.abs(steps - first[:, None]), horizon).argmin(axis=1)
    offsets = jax.nn.one_hot(nearest - first + horizon - 1, 2 * horizon - 1)
    still = both.any(axis=1) & ~changing
    counts = {
        "gripper_changing": changing,
        "gripper_still": still,
        "gripper_spurious": still & (ours != 0).any(axis=1),
    }
    return {
        "gripper_offsets": (offsets * like.any(axis=1)[:, None]).sum(axis=0),
        **{name: count.astype(jnp.float32).sum() for name, count in counts.items()},
    }


def summary(totals, grippers):
    """Returns {name of the gripper: its numbers}; means and shares of no window are left out.

    Args:
      totals: sums of what `timing` returned, numpy.

    Returns:
      per gripper {"changing", "still": numbers of windows, "found": share of the changing ones
      with a predicted change of the same kind, "offset": how many steps later it comes, mean,
      "offset_abs": the same without sign, "spurious": share of the still ones with a predicted
      change}.
    """
    found = {}
    for row, gripper in enumerate(grippers):
        offsets = np.asarray(totals["gripper_offsets"][row])
        steps = np.arange(len(offsets)) - len(offsets) // 2
        changing, still = (int(totals[f"gripper_{name}"][row]) for name in ("changing", "still"))
        numbers = {"changing": changing, "still": still}
        if changing:
            numbers["found"] = float(offsets.sum() / changing)
        if offsets.sum():
            numbers["offset"] = float(offsets @ steps / offsets.sum())
            numbers["offset_abs"] = float(offsets @ np.abs(steps) / offsets.sum())
        if still:
            numbers["spurious"] = float(totals["gripper_spurious"][row] / still)
        found[gripper.name] = numbers
    return found
