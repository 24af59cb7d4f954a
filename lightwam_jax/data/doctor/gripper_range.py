"""The declared values of closed and open, compared with what the data hold."""

import numpy as np

from lightwam_jax.data.doctor import columns
from lightwam_jax.data.episodes import Problem

KIND = "gripper range"
ADVICE = (
    "Give config.data.gripper_closed_open the values that mean closed and open in the data, or "
    "repair the steps that leave them: the model sees what is declared as 0 and 1."
)
_OUTSIDE = 0.05  # share of the declared range that values may lie beyond it
_REACHED = 0.1  # share of it within which an end counts as reached
_FEW = 4  # so many different values are listed


def examine(episodes, data, path):
    """Returns [`Problem`] for the grippers of a `DataConfig`, at most one per dimension.

    Args:
      episodes: without errors. path: of the dataset.
    """
    width = episodes[0].action.shape[1] if episodes else 0
    found = (_compare(episodes, dim, data, path) for dim in data.gripper_dims if 0 <= dim < width)
    return [problem for problem in found if problem]


def _compare(episodes, dim, data, path):
    x = np.concatenate([e.action[:, dim] for e in episodes]).astype(np.float64)
    ends = np.array(data.gripper_closed_open, np.float64)
    span = abs(ends[1] - ends[0])
    beyond = np.maximum(ends.min() - x, x - ends.max())
    outside = beyond > _OUTSIDE * span
    reached = np.abs(x[:, None] - ends).min(0) <= _REACHED * span
    said, place = [], {"episode": "", "file": path}
    if outside.any():
        episode, frame = columns.place(episodes, columns.starts(episodes), int(beyond.argmax()))
        said.append(
            f"{int(outside.sum())} of {len(x)} steps lie outside, the farthest at "
            f"{x[beyond.argmax()]:g} in {episode.id}, frame {frame}"
        )
        place = {"episode": episode.id, "file": episode.file, "frame": frame}
    missing = [name for name, there in zip(("closed", "open"), reached) if not there]
    if missing and len(x):
        said.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} never reached")
    if not said:
        return None
    declared = f"closed={data.gripper_closed_open[0]:g}, open={data.gripper_closed_open[1]:g}"
    message = (
        f"action[{dim}] is declared a gripper with {declared} (config.data.gripper_closed_open); "
        f"observed: {_observed(x)}; {'; '.join(said)}"
    )
    return Problem.warning(KIND, message=message, **place)


def _observed(x):
    """The values there are, where they are few, else their range."""
    values, counts = np.unique(x, return_counts=True)
    if len(values) > _FEW:
        return f"{x.min():g} to {x.max():g}"
    each = zip(values, counts)
    return ", ".join(f"{value:g} in {count / len(x):.1%} of the steps" for value, count in each)
