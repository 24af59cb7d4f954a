"""Normalisation of states and actions, and the statistics it comes from (`dataset_stats.json`).

The file format and the definition of every number are the reference's, so that its released
statistics load here and ours load there.
"""

import dataclasses

import numpy as np
import tqdm

from lightwam_jax import atomic

CLIP = 5.0
MODES = ("min_max", "quantile", "z_score", "z_score_reference", "constants", "none")
_COMPUTE = "python -m lightwam_jax.precompute --config CONFIG --what stats"
_FIELDS = ("min", "max", "mean", "std", "q01", "q99")
_MIN_RANGE = 1e-4  # range or deviation below which a dimension is only shifted, not scaled


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer:
    """Affine map per dimension: scale, offset f32 [D]. Works on numpy and on jax arrays."""

    scale: np.ndarray
    offset: np.ndarray
    clip: float = CLIP

    def normalize(self, x):
        """Physical [..., D] -> normalised f32 [..., D], clipped to [-clip, clip]."""
        return (x * self.scale + self.offset).clip(-self.clip, self.clip)

    def inverse(self, y):
        """Normalised [..., D] -> physical f32 [..., D]; nothing is clipped."""
        return (y - self.offset) / self.scale


def min_max(low, high):
    """Returns the `Normalizer` that maps [low, high] (f32 [D] each) to [-1, 1].

    A dimension whose range is below 1e-4 only has `low` moved to 0.
    """
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    constant = high - low < _MIN_RANGE
    extent = np.where(constant, np.float32(1), high - low)
    scale = np.where(constant, np.float32(1), np.float32(2) / extent)
    offset = np.where(constant, -low, np.float32(-1) - scale * low)
    return Normalizer(scale, offset)


def z_score(mean, std):
    """Returns the `Normalizer` to zero mean and unit variance (f32 [D] each).

    A dimension whose deviation is below 1e-4 only has its mean moved to 0.
    """
    std = np.asarray(std, np.float32)
    return _standard(mean, np.where(std < _MIN_RANGE, np.float32(1), std))


def z_score_reference(mean, std):
    """As `z_score`, but dividing by every deviation, 0 too, as the release does: std + 1e-8."""
    return _standard(mean, np.asarray(std, np.float32) + np.float32(1e-8))


def _standard(mean, deviation):
    return Normalizer(np.float32(1) / deviation, -np.asarray(mean, np.float32) / deviation)


def from_statistics(statistics, name, data):
    """Returns the `Normalizer` of "state" or "action" that a `DataConfig` asks for.

    data.normalization is one of:
      "min_max": the extremes to -1 and 1; "quantile": the 1 % and 99 % quantiles, or the extremes
        of a dimension whose quantiles coincide (`without_quantiles`);
      "constants": data.normalization_range, the same for every dimension;
      "z_score", "z_score_reference": see these functions;
      "none": physical units, not clipped either.

    Raises:
      ValueError: another mode, or an empty range.
    """
    table, mode = table_of(statistics, name), data.normalization
    if mode == "min_max":
        return min_max(table["global_min"], table["global_max"])
    if mode == "quantile":
        return min_max(*_quantile_ends(table))
    if mode == "z_score":
        return z_score(table["global_mean"], table["global_std"])
    if mode == "z_score_reference":
        return z_score_reference(table["global_mean"], table["global_std"])
    width = len(table["global_min"])
    if mode == "constants":
        ends = data.normalization_range
        if len(ends) != 2 or np.diff(ends) < _MIN_RANGE:
            raise ValueError(
                f"config.data.normalization_range is {ends}; expected (low, high), mapped to -1 "
                "and 1"
            )
        return min_max(*(np.full(width, end) for end in ends))
    if mode == "none":
        return Normalizer(np.ones(width, np.float32), np.zeros(width, np.float32), np.inf)
    raise ValueError(f"config.data.normalization is {mode!r}; expected one of {', '.join(MODES)}")


def _quantile_ends(table):
    """(low, high) f32 [D] of "quantile".

    A gripper that closes in less than 1 % of the steps has two equal quantiles: shifted but not
    scaled, its rare values would be clipped. Its extremes are taken instead.
    """
    low, high, least, most, rare = _ends(table)
    return np.where(rare, least, low), np.where(rare, most, high)


def _ends(table):
    """1 % and 99 % quantile, min, max, and where only the quantiles coincide; each [D]."""
    fields = ("q01", "q99", "min", "max")
    low, high, least, most = (np.asarray(table[f"global_{f}"], np.float32) for f in fields)
    return low, high, least, most, (high - low < _MIN_RANGE) & (most - least >= _MIN_RANGE)


def without_quantiles(statistics, name, mode):
    """Returns {dimension: (quantile, min, max)} of "state" or "action": the quantiles coincide.

    "quantile" normalises these from min to max; {} in any other mode.
    """
    if mode != "quantile":
        return {}
    low, _, least, most, rare = _ends(table_of(statistics, name))
    dims = np.flatnonzero(rare)
    return {int(dim): (float(low[dim]), float(least[dim]), float(most[dim])) for dim in dims}


def fit_statistics(episodes, horizon, transform=None):
    """Returns the statistics of `episodes` as the dictionary that dataset_stats.json holds.

    Taken over per-episode windows: state [n, 1, P], action [n, T, A] with the last action repeated
    past the end. "stepwise" arrays [T, D] keep the step of the chunk, "global" ones [D] do not.
    Episodes weigh the same whatever their length: mean is the mean of their means, std joins their
    unbiased variances with the spread of their means, q01 and q99 are the extremes of their
    quantiles.

    Args:
      episodes: `Episode`s; only their columns are read.
      horizon: T.
      transform: `ActionTransform`; the statistics are of what it makes of the actions, without
        zeroing padded deltas, as the release's are.

    Raises:
      ValueError: no episode.
    """
    if not episodes:
        raise ValueError("statistics of no episodes: point config.data.path to some")
    states, actions = [], []
    for episode in tqdm.tqdm(episodes, desc="statistics", unit="episode"):
        states.append(_moments(_windows(episode.state, 1)))
        chunks = _windows(episode.action, horizon)
        if transform is not None and not transform.is_identity:
            real = np.zeros((episode.length, horizon), bool)
            chunks = transform.forward(chunks.transpose(2, 1, 0), episode.state, real)
            chunks = chunks.transpose(2, 1, 0)
        actions.append(_moments(chunks))
    return {
        "state": {"default": _join(states)},
        "action": {"default": _join(actions)},
        "num_episodes": len(episodes),
        "num_transition": int(sum(e.length for e in episodes)),
    }


def _windows(values, horizon):
    """[n, D] -> view [D, T, n]: from every step the next T values, the last repeated past the end.

    Step last, so that it can be sorted where it lies.
    """
    repeated = np.concatenate([values, np.repeat(values[-1:], horizon - 1, axis=0)])
    return np.lib.stride_tricks.sliding_window_view(repeated.T, len(values), axis=1)


def _moments(windows):
    """Statistics of one episode over its windows [D, T, n]; each [T, D] float64."""
    x = np.ascontiguousarray(windows)  # sorting in place of a strided view is three times slower
    x = np.sort(x, axis=-1).astype(np.float64)
    n = x.shape[-1]
    # A single-step episode has no unbiased variance; it contributes the spread of its mean only.
    variance = x.var(-1, ddof=1) if n > 1 else np.zeros(x.shape[:-1])
    table = {
        "min": x[..., 0],
        "max": x[..., -1],
        "mean": x.mean(-1),
        "var": variance,
        "q01": _quantile(x, 0.01),
        "q99": _quantile(x, 0.99),
    }
    return {key: value.T for key, value in table.items()}


def _quantile(x, q):
    """Linearly interpolated quantile of [..., n], sorted along n."""
    # The reference finds the place in float32: that is 3e-6 of a value in long episodes.
    place = float(np.float32(q) * np.float32(x.shape[-1] - 1))
    below = int(place)
    above = min(below + 1, x.shape[-1] - 1)
    return x[..., below] + (x[..., above] - x[..., below]) * (place - below)


def _join(episodes):
    stack = {key: np.stack([e[key] for e in episodes]) for key in episodes[0]}  # [E, T, D]
    step_mean = stack["mean"].mean(0)
    mean = step_mean.mean(0)
    out = {
        "stepwise_min": stack["min"].min(0),
        "stepwise_max": stack["max"].max(0),
        "global_min": stack["min"].min((0, 1)),
        "global_max": stack["max"].max((0, 1)),
        "stepwise_q01": stack["q01"].min(0),
        "stepwise_q99": stack["q99"].max(0),
        "global_q01": stack["q01"].min((0, 1)),
        "global_q99": stack["q99"].max((0, 1)),
        "stepwise_mean": step_mean,
        "stepwise_std": np.sqrt((stack["var"] + (stack["mean"] - step_mean) ** 2).mean(0)),
        "global_mean": mean,
        "global_std": np.sqrt((stack["var"] + (stack["mean"] - mean) ** 2).mean((0, 1))),
    }
    return {key: value.tolist() for key, value in out.items()}


def read_statistics(path, state_dim, action_dim):
    """Returns the dictionary of `path`, checked against the model's widths.

    Raises:
      FileNotFoundError: no such file; the message says how to make it.
      ValueError: another width, a missing entry, or a number that is not finite.
    """
    statistics = atomic.read_json(path, {}, f"restore it, or run {_COMPUTE}")
    if statistics is None:
        raise FileNotFoundError(f"{path} is missing; make it with: {_COMPUTE}")
    if "made_from" in statistics:
        made_from, redo = statistics["made_from"], f"delete {path} and run {_COMPUTE}"
        atomic.check_json(made_from, {"config": dict}, f"{path}: made_from", redo)
        if not isinstance(made_from.get("data", ""), str):
            raise ValueError(f"{path}: made_from: data is no text; {redo}")
    parts = ("state", "proprio_dim", state_dim), ("action", "action_dim", action_dim)
    for name, key, width in parts:
        if name not in statistics:
            raise ValueError(
                f"{path} has no {name!r} entry (it has {', '.join(sorted(statistics))}); expected "
                "a dataset_stats.json"
            )
        try:
            table = table_of(statistics, name)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: {name!r} is no table of numbers ({error}); restore it, or run {_COMPUTE}"
            ) from error
        for field in _FIELDS:
            values = np.asarray(table.get(f"global_{field}", ()), np.float32)
            if values.shape != (width,):
                raise ValueError(
                    f"{path}: {name} global_{field} has {values.size} dimensions, "
                    f"config.model.{key} is {width}: run {_COMPUTE}, or set config.model.{key} (or "
                    f"config.data.{name}_dim, where the data are narrower than the model)"
                )
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{path}: {name} global_{field} is not finite in dimension "
                    f"{int(np.argmin(np.isfinite(values)))}: compute it again from clean data"
                )
        for low, high in (("min", "max"), ("q01", "q99")):
            least, most = (np.asarray(table[f"global_{field}"]) for field in (low, high))
            if dims := np.flatnonzero(least > most).tolist():
                raise ValueError(
                    f"{path}: {name} global_{low} is above global_{high} in dimensions {dims}: run "
                    f"{_COMPUTE}"
                )
        if (np.asarray(table["global_std"]) < 0).any():
            raise ValueError(f"{path}: {name} global_std is negative: run {_COMPUTE}")
    return statistics


def table_of(statistics, name):
    """Returns the table under "state" or "action": {"global_min": [D], "stepwise_min": [T, D]...}.

    A file of the release may hold a table per data key ("arm", "gripper"): they are joined in the
    order of the file, as its model sees them.

    Raises:
      ValueError: tables that do not hold the same entries.
    """
    tables = statistics[name]
    entries = {frozenset(table) for table in tables.values()}
    if len(entries) != 1:
        raise ValueError(
            f"the statistics of {name!r} hold tables ({', '.join(tables)}) of different entries; "
            "expected at least one, and the same in each"
        )
    joined = {
        key: np.concatenate([np.asarray(table[key]) for table in tables.values()], -1)
        for key in next(iter(tables.values()))
    }
    for key, values in joined.items():
        if values.dtype.kind not in "fiu":
            number = np.vectorize(lambda x: isinstance(x, (int, float)), otypes=[bool])(values)
            dims = np.flatnonzero(~number.reshape(-1, number.shape[-1]).all(0)).tolist()
            raise ValueError(f"{key} of {name!r} holds no number in dimensions {dims}")
    return {key: values.tolist() for key, values in joined.items()}


def describe(statistics):
    """Returns the printable table of the global statistics, constant dimensions flagged."""
    lines = [
        f"{statistics['num_episodes']} episodes, {statistics['num_transition']} steps",
        f"{'':<12}" + "".join(f"{field:>11}" for field in _FIELDS),
    ]
    for name in ("state", "action"):
        table = table_of(statistics, name)
        columns = np.array([table[f"global_{field}"] for field in _FIELDS])  # [6, D]
        for dim, row in enumerate(columns.T):
            flag = "constant" if row[1] - row[0] < _MIN_RANGE else ""
            if not np.isfinite(row).all():
                flag = "NOT FINITE"
            numbers = "".join(f"{value:>11.4f}" for value in row)
            lines.append(f"{f'{name}[{dim}]':<12}{numbers}  {flag}".rstrip())
    return "\n".join(lines)


def unsafe_dimensions(statistics, name, mode):
    """Returns the dimensions of "state" or "action" that `mode` divides by a deviation of about 0.

    None in any mode but "z_score_reference": there, a value that differs from the mean at all is
    clipped to -5 or 5.
    """
    if mode != "z_score_reference":
        return []
    std = np.asarray(table_of(statistics, name)["global_std"])
    return np.flatnonzero(std < _MIN_RANGE).tolist()


def warnings(statistics, mode):
    """Returns what to know about dimensions that `mode` does not treat like the others, as text."""
    found = []
    for name in ("state", "action"):
        for dim, (quantile, low, high) in without_quantiles(statistics, name, mode).items():
            found.append(
                f"{name}[{dim}] is {quantile:g} at its 1 % and at its 99 % quantile and ranges "
                f"from {low:g} to {high:g}: config.data.normalization='quantile' cannot scale it "
                "by quantiles and takes its min and max instead. Look whether its rare values mean "
                "something (a gripper) or are glitches to repair."
            )
        if unsafe := unsafe_dimensions(statistics, name, mode):
            found.append(
                f"{name} dimensions {unsafe} never move, and z_score_reference divides by their "
                "deviation of about 0: any other value at run time is clipped to +-5. "
                "config.data.normalization='z_score' does not scale such dimensions."
            )
    return found
