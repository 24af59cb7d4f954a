"""The doctor's look at the numbers: each dimension of states and actions over all steps."""

import dataclasses

import numpy as np

from lightwam_jax.data import actions, normalize
from lightwam_jax.data.episodes import Problem

_STILL = 1e-4  # a smaller range is constant to normalize.py: it is shifted, not scaled
_RARE = 1e-3  # a gripper that closes once in an episode moves in about 1 of 100 steps
_NARROW = 1e-2  # min_max makes one number of 98 % of the values that fill less of the range
_SIGMA = 5.0  # the normalised values are clipped there
_MANY = 1e-3  # share of steps beyond it; of a Gaussian's, 6e-7 are
_FAR = 20.0  # sigma: one such value is a glitch, or a switch that is hardly ever thrown
_STUCK_STEPS, _STUCK_OTHERS, _STUCK_SHARE = 10, 8, 0.95


@dataclasses.dataclass(frozen=True)
class Column:
    """One dimension of state or action over all steps of the episodes without errors.

    Every step counts the same, units are physical. `beyond`: share further than 5 sigma from the
    mean; `moves`: share of steps that differ from the one before; `clipped`: share that
    normalisation clips (actions only); `flag`: "", "constant", "near-constant" or "outliers".
    """

    name: str
    dim: int
    min: float
    max: float
    mean: float
    std: float
    q01: float
    q99: float
    beyond: float
    moves: float
    flag: str
    clipped: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int [k] between edges [k + 1]; `guessed`: only looks like a gripper."""

    label: str
    edges: np.ndarray
    counts: np.ndarray
    guessed: bool = False


def starts(episodes):
    """Returns the number [E] of the first step of each episode among the steps of all."""
    lengths = np.array([e.length for e in episodes])
    return np.cumsum(lengths) - lengths


def place(episodes, starts, step):
    """Returns (episode, frame) of a step among the steps of all episodes."""
    number = int(np.searchsorted(starts, step, "right")) - 1
    return episodes[number], int(step - starts[number])


def examine(episodes, name, path):
    """Returns ([`Column`], [`Problem`]) of "state" or "action"; `path` is that of the dataset."""
    if not episodes:
        return [], []
    begins, columns, problems = starts(episodes), [], []
    for dim in range(getattr(episodes[0], name).shape[1]):
        x = _values(episodes, name, dim)
        column, wrong = _column(episodes, begins, x, name, dim, path)
        columns.append(column)
        problems += wrong
        if column.flag != "constant":
            problems += _stuck(episodes, begins, x, f"{name}[{dim}]")
    return columns, problems


def _values(episodes, name, dim):
    """One dimension of all steps, f64 [N]."""
    return np.concatenate([getattr(e, name)[:, dim] for e in episodes]).astype(np.float64)


def _column(episodes, begins, x, name, dim, path):
    """Returns (`Column`, problems) of the values x [N] of a dimension."""
    label, mean, std, low, high = f"{name}[{dim}]", x.mean(), x.std(), x.min(), x.max()
    q01, q99 = np.quantile(x, (0.01, 0.99))
    moved = np.diff(x, prepend=x[0]) != 0
    moved[begins] = False  # from one episode to the next is no movement
    moves = float(moved.sum() / max(1, len(x) - len(episodes)))
    distance = np.abs(x - mean) / (std or 1.0)
    beyond, far = float((distance > _SIGMA).mean()), int(distance.argmax())
    episode, frame = place(episodes, begins, far)
    flag, problems = "", []
    if high - low < _STILL:
        flag, beyond = "constant", 0.0
        message = f"{label} is {low:.6g} throughout"
        if high != low:
            message = (
                f"{label} stays between {low:.6g} and {high:.6g}; normalisation does not scale a "
                f"range below {_STILL:g}"
            )
        problems.append(Problem.warning("constant dimension", "", path, message))
    elif moves < _RARE or q99 - q01 < _NARROW * (high - low):
        flag = "near-constant"
        message = f"{label} moves in {moves:.2%} of the steps"
        if moves >= _RARE:
            message = (
                f"98 % of {label} lie within {(q99 - q01) / (high - low):.2%} of its range "
                f"{low:.6g} to {high:.6g}; the farthest value is {x[far]:.6g} in {episode.id}, "
                f"frame {frame}"
            )
        problems.append(Problem.warning("near-constant dimension", "", path, message))
    elif beyond > _MANY or distance[far] > _FAR:
        flag = "outliers"
        message = (
            f"{label} is {x[far]:.6g}, {distance[far]:.0f} sigma from the mean {mean:.6g}; "
            f"{beyond:.3%} of the steps are beyond {_SIGMA:g}"
        )
        problems.append(
            Problem.warning("far from the mean", episode.id, episode.file, message, frame)
        )
    numbers = map(float, (low, high, mean, std, q01, q99))
    return Column(name, dim, *numbers, beyond, moves, flag), problems


def _stuck(episodes, begins, x, label):
    """Warnings about episodes in which a dimension stands still that moves in nearly all others."""
    still = np.maximum.reduceat(x, begins) == np.minimum.reduceat(x, begins)
    long = np.array([e.length >= _STUCK_STEPS for e in episodes])
    stuck, others = np.flatnonzero(still & long), int(long.sum()) - 1
    moving = int((~still & long).sum())
    if others < _STUCK_OTHERS or moving < _STUCK_SHARE * others:
        return []
    elsewhere = f"from beginning to end; it moves in {moving} of the {others} other episodes"
    return [
        Problem.warning(
            "stuck dimension",
            episodes[i].id,
            episodes[i].file,
            f"{label} is {x[begins[i]]:.6g} {elsewhere}",
        )
        for i in stuck
    ]


def normalized(episodes, columns, config):
    """Returns (columns with `clipped`, `Histogram` of the normalised actions or None)."""
    transform = actions.from_config(config)
    if not episodes or set(config.data.action_as) - {"absolute"}:
        return columns, None
    values = np.concatenate([e.action for e in episodes])[:, None]
    values = transform.forward(values, None, np.zeros((len(values), 1), bool))[:, 0]
    table = {
        "global_min": values.min(0),
        "global_max": values.max(0),
        "global_mean": values.mean(0, np.float64),
        "global_std": values.std(0, dtype=np.float64),
        "global_q01": np.quantile(values, 0.01, axis=0),
        "global_q99": np.quantile(values, 0.99, axis=0),
    }
    statistics = {"action": {"all": {field: value.tolist() for field, value in table.items()}}}
    normalizer = normalize.from_statistics(statistics, "action", config.data)
    values = normalizer.normalize(values)
    clipped = (np.abs(values) >= normalizer.clip).mean(0)
    columns = [
        dataclasses.replace(c, clipped=float(clipped[c.dim])) if c.name == "action" else c
        for c in columns
    ]
    counts, edges = np.histogram(values, 80)
    return columns, Histogram("normalised action", edges, counts)


def clipped(columns, data):
    """Returns warnings about dimensions of which normalisation clips more than a few values."""
    problems = []
    for column in columns:
        if (column.clipped or 0) > _MANY:
            message = (
                f"config.data.normalization={data.normalization!r} clips {column.clipped:.2%} of "
                f"{column.name}[{column.dim}], whose values are {column.min:g} to {column.max:g} "
                f"(1 % to 99 %: {column.q01:g} to {column.q99:g}): the policy cannot give them back"
            )
            problems.append(Problem.warning("clipped values", "", data.path, message))
    return problems


def grippers(episodes, columns, dims):
    """Returns `Histogram`s of the gripper dimensions `dims`; () means those that look like one."""
    out = []
    for column in columns:
        if column.name != "action" or (dims and column.dim not in dims):
            continue
        x = _values(episodes, "action", column.dim)
        counts, edges = np.histogram(x, 40)
        ends = counts[:4].sum(), counts[-4:].sum()
        two_sided = min(ends) >= 0.05 * len(x) and sum(ends) >= 0.8 * len(x)
        if dims or (two_sided and column.flag != "constant"):
            out.append(Histogram(f"action[{column.dim}]", edges, counts, not dims))
    return tuple(out)
