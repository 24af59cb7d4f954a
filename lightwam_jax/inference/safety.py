"""What stands between a plan and the robot: finite, of the right shape, within limits, or nothing.

    guard = Guard(limits, horizon=8)
    chunk, changed = guard.check(chunk, state)

numpy only: a robot's computer may check again what a server checked. Limits come from the training
statistics, or from a file that this makes and tests on recorded actions:

    python -m lightwam_jax.inference.safety --workdir runs/x --out limits.json
"""

import dataclasses
import json

import numpy as np

from lightwam_jax.inference.arrays import WireError

KINDS = ("clamped", "limited", "snapped")  # what `Guard.check` counts
_WIDENED = 0.1  # share of the training range that the default clamp leaves on either side
_FACTOR = 1.5  # of the 99.9 % quantile: the proposed limits
_TOUCHED = 0.001  # largest share of held-out chunks that proposed limits may touch
_SWITCH = 0.4, 0.6  # of a gripper with hysteresis: closes below, opens above


@dataclasses.dataclass(frozen=True, eq=False)
class Limits:
    """Limits per action dimension, physical units; infinite: none.

    Attributes:
      low, high: f32 [A]. rate: f32 [A], the largest change from one step to the next; low and high
        go before it.
      start: int [A], the state that an absolute dimension starts from, for the rate of the first
        step; -1: unknown.
    """

    low: np.ndarray
    high: np.ndarray
    rate: np.ndarray
    start: np.ndarray

    @classmethod
    def none(cls, width):
        """Returns limits that change nothing."""
        wide = np.full(width, np.inf, np.float32)
        return cls(-wide, wide, wide, np.full(width, -1))

    def as_dict(self):
        """Returns {"low", "high", "rate"}: lists, with None where there is no limit."""
        plain = lambda row: [float(x) if np.isfinite(x) else None for x in row]
        return {name: plain(getattr(self, name)) for name in ("low", "high", "rate")}


@dataclasses.dataclass(frozen=True)
class Gripper:
    """How commands of grippers are cleaned.

    Attributes:
      dims: action dimensions. closed_open: their values.
      mode: "off"; "snap": fully closed or open, whichever is nearer; "hysteresis": the same, but
        within a chunk it changes sides only beyond 0.4 and 0.6 of the way.
      closed_within: a command as near to closed as that becomes closed, physical units; for
        grippers that are told a position. 0: off.
    """

    dims: tuple = ()
    closed_open: tuple = (0.0, 1.0)
    mode: str = "off"
    closed_within: float = 0.0


class Guard:
    """Checks plans; equal plans and states give equal results, nothing is remembered."""

    def __init__(self, limits, horizon, gripper=None, refuse=False):
        """Args:

        limits: `Limits`. horizon: steps of a plan. gripper: `Gripper`.
        refuse: what would be changed is an error instead.

        Raises:
          ValueError: unknown mode, or limits that exclude every action.
        """
        self.limits, self._horizon, self._refuse = limits, horizon, refuse
        self.gripper = gripper or Gripper()
        if self.gripper.mode not in ("off", "snap", "hysteresis"):
            raise ValueError(
                f"gripper mode {self.gripper.mode!r} is unknown; expected off, snap or hysteresis"
            )
        empty = np.flatnonzero(~(limits.low <= limits.high) | ~(limits.rate > 0))
        if len(empty):
            raise ValueError(
                f"the limits of dimensions {empty.tolist()} exclude every action: expected low <= "
                "high and rate > 0"
            )

    def check(self, chunk, state=None):
        """Returns what may be sent to the robot.

        Args:
          chunk: [T,A], physical units. state: [P] it was planned from; only for rates of the first
            step.

        Returns:
          (f32 [T,A], {"clamped", "limited", "snapped": int [A], values changed}).

        Raises:
          WireError: "not_finite": nothing is repaired; "limits": another shape, or, with `refuse`,
            a plan that would have to be changed.
        """
        chunk = np.asarray(chunk)
        wanted = self._horizon, len(self.limits.low)
        if chunk.shape != wanted:
            raise WireError(
                "limits", f"the plan has shape {list(chunk.shape)}; expected {list(wanted)}"
            )
        with np.errstate(over="ignore"):
            plan = np.array(chunk, np.float32)
        finite = np.isfinite(plan)
        if not finite.all():
            rows, dims = (np.flatnonzero(~finite.all(axis)).tolist() for axis in (1, 0))
            raise WireError(
                "not_finite",
                f"the plan has NaN or infinite actions in dimensions {dims}, steps {rows[:10]}; "
                "nothing of it was sent",
            )
        if state is not None and not np.isfinite(np.asarray(state, np.float32)).all():
            raise WireError("not_finite", "the state has NaN or infinite values")
        changed = {}
        for kind, change in zip(
            ("snapped", "clamped", "limited"), (self._snap, self._clamp, self._limit_rate)
        ):
            new = change(plan, state)
            changed[kind] = (new != plan).sum(axis=0)
            plan = new
        if self._refuse and any(count.any() for count in changed.values()):
            what = {k: np.flatnonzero(n).tolist() for k, n in changed.items() if n.any()}
            raise WireError("limits", f"the plan breaks its limits in dimensions: {what}")
        return plan, changed

    def _snap(self, plan, state):
        gripper, plan = self.gripper, plan.copy()
        closed, opened = map(np.float32, gripper.closed_open)
        for dim in gripper.dims:
            column = plan[:, dim]
            share = (column - closed) / (opened - closed)
            if gripper.mode == "snap":
                column = np.where(share < 0.5, closed, opened)
            elif gripper.mode == "hysteresis":
                column = np.where(_sides(share), opened, closed)
            if gripper.closed_within:
                column = np.where(abs(column - closed) <= gripper.closed_within, closed, column)
            plan[:, dim] = column
        return plan

    def _clamp(self, plan, state):
        return plan.clip(self.limits.low, self.limits.high)

    def _limit_rate(self, plan, state):
        rate, start = self.limits.rate, self.limits.start
        if not np.isfinite(rate).any():
            return plan
        before, first = plan[0].copy(), start >= 0
        if state is not None and first.any():
            before[first] = np.asarray(state, np.float32)[start[first]]
        rows = []
        for row in plan:  # a difference within rounding of the rate is no change
            within = np.abs(row - before) <= rate + np.float32(1e-6) * (np.abs(before) + rate)
            slow = row.clip(before - rate, before + rate)
            # A robot that stands beyond its limits is brought back at once, not at that rate.
            before = np.where(within, row, self._clamp(slow, state))
            rows.append(before)
        return np.stack(rows)


def _sides(share):
    """[T] how far open -> [T] bool, open; starts at the nearer side."""
    is_open, sides = share[0] >= 0.5, []
    for value in share:
        is_open = value > _SWITCH[0] if is_open else value > _SWITCH[1]
        sides.append(is_open)
    return np.array(sides)


def from_statistics(action, state, data, widened=_WIDENED):
    """Returns the `Limits` of the training: its range, widened on either side; no rates.

    Statistics are of actions as the model sees them: grippers 0 to 1, targets as differences. Here
    they become the robot's again; a target lies as far from a recorded state as differences go.
    The rate of a first step needs the state it starts from: known of differences, and where
    config.data.action_kinds says "absolute" and action_state_dims names the state.

    Args:
      action, state: tables of `normalize.table_of`. data: `DataConfig`.
      widened: share of the range.
    """
    low, high = (np.array(action[f"global_{end}"], np.float64) for end in ("min", "max"))
    width = len(low)
    start = np.full(width, -1)
    for dim in data.gripper_dims:
        closed, opened = data.gripper_closed_open
        ends = [closed + end * (opened - closed) for end in (low[dim], high[dim])]
        low[dim], high[dim] = min(ends), max(ends)
    states = len(state["global_min"])
    for dim, source in enumerate(data.action_state_dims):  # of targets the model sees as they are
        if "absolute" in data.action_kinds[dim : dim + 1] and 0 <= source < states:
            start[dim] = source
    for dim, kind in enumerate(data.action_as):
        if kind != "absolute":
            start[dim] = source = (data.action_state_dims or range(width))[dim]
            low[dim] = state["global_min"][source] + min(low[dim], 0)
            high[dim] = state["global_max"][source] + max(high[dim], 0)
    margin = widened * (high - low)
    low, high = (low - margin).astype(np.float32), (high + margin).astype(np.float32)
    return Limits(low, high, np.full(width, np.inf, np.float32), start)


def from_file(path, otherwise):
    """Returns the `Limits` of a JSON file.

    Args:
      path: {"low", "high", "rate": [A]}; null, and what is not there: see `otherwise`; "none": no
        limit in that dimension.
      otherwise: `Limits`.

    Raises:
      ValueError: another form; names the entry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            given = json.load(file)
    except ValueError as error:  # also of its encoding
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(given, dict):
        raise _not_limits(path, "the file", "a map of low, high and rate", given)
    for name in given:
        if name not in ("low", "high", "rate", "made_from"):
            raise ValueError(f"{path}: the key {name!r}; expected low, high, rate and made_from")
    made, width = {}, len(otherwise.low)
    for name, no in (("low", -np.inf), ("high", np.inf), ("rate", np.inf)):
        row = given.get(name)
        row = [None] * width if row is None else row
        if not isinstance(row, list) or len(row) != width:
            raise _not_limits(path, name, f"a list of {width}, one for each action dimension", row)
        for dim, value in enumerate(row):
            if value not in (None, "none") and not _is_number(value):
                raise _not_limits(path, f"{name}[{dim}]", 'a number, null or "none"', value)
        old = getattr(otherwise, name)
        made[name] = np.array(
            [old[i] if x is None else no if x == "none" else x for i, x in enumerate(row)],
            np.float32,
        )
    return dataclasses.replace(otherwise, **made)


def _is_number(value):
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= float(np.finfo(np.float32).max)  # false for NaN too


def _not_limits(path, key, expected, came):
    size = f", {len(came)} of them" if isinstance(came, list) else ""
    return ValueError(f"{path}: {key} is {came!r:.80}{size}; expected {expected}")


# ---- calibration -------------------------------------------------------------------------------


def propose(chunks, limits):
    """Returns `Limits` with rates, from recorded plans: 1.5 x the 99.9 % quantile of the changes.

    Args:
      chunks: f32 [N,T,A], physical units. limits: `Limits`, whose clamp is kept.
    """
    changes = np.abs(np.diff(chunks, axis=1)).reshape(-1, chunks.shape[-1])
    rate = _FACTOR * np.quantile(changes, 0.999, axis=0)
    rate[rate == 0] = np.inf  # a dimension that rests has shown no limit
    return dataclasses.replace(limits, rate=rate.astype(np.float32))


def touched(chunks, states, guard):
    """Returns (share of the plans that a guard changes, [A] share by dimension).

    Args:
      chunks: f32 [N,T,A]. states: f32 [N,P]. guard: `Guard`.
    """
    hit = [
        np.any([n > 0 for n in guard.check(chunk, state)[1].values()], axis=0)
        for chunk, state in zip(chunks, states)
    ]
    return float(np.any(hit, axis=1).mean()), np.mean(hit, axis=0)


def recorded_plans(episodes, horizon):
    """Returns (chunks f32 [N,T,A], states f32 [N,P]) of recorded episodes, physical units.

    Past the end of an episode its last action is repeated.
    """
    chunks, states = [], []
    for episode in episodes:
        steps = np.arange(episode.length)[:, None] + np.arange(horizon)
        chunks.append(np.asarray(episode.action, np.float32)[steps.clip(max=episode.length - 1)])
        states.append(np.asarray(episode.state, np.float32))
    return np.concatenate(chunks), np.concatenate(states)


def calibrate(config, statistics, training, held_out):
    """Returns (`Limits`, share of held-out plans they touch, that share by dimension).

    Rates come from the training's episodes, and are tried on those that were held out.

    Args:
      config: `Config`. statistics: of its assets. training, held_out: `Episode`s.

    Raises:
      ValueError: none are held out.
    """
    from lightwam_jax.data import normalize

    if not held_out:
        raise ValueError("no episodes are held out to try limits on: set config.data.val_fraction")
    horizon = config.data.action_horizon
    tables = (normalize.table_of(statistics, name) for name in ("action", "state"))
    limits = from_statistics(*tables, config.data)
    limits = propose(recorded_plans(training, horizon)[0], limits)
    limits.rate[list(config.data.gripper_dims)] = np.inf  # they jump
    return limits, *touched(*recorded_plans(held_out, horizon), Guard(limits, horizon))


def main(argv):
    """Proposes limits for a run's policy, tries them, and writes them if they hold."""
    from lightwam_jax import atomic, command_line
    from lightwam_jax import config as config_lib
    from lightwam_jax.checkpoint import run
    from lightwam_jax.data import assets
    from lightwam_jax.data import episodes as episodes_lib

    given = flags.FLAGS
    try:
        stored = run.load_params(given.workdir)
        config = config_lib.of_embodiment(stored.config, given.embodiment)
        statistics = assets.load_normalizers(stored.assets, config)[0]
        split = episodes_lib.split(episodes_lib.load_episodes(config), config.data.val_fraction)
    except (OSError, ValueError) as error:
        command_line.fail(error)
    limits, share, by_dimension = calibrate(config, statistics, *split)
    print(f"{'dimension':<12}{'low':>10}{'high':>10}{'rate':>10}{'touched':>10}")
    for dim, row in enumerate(zip(limits.low, limits.high, limits.rate)):
        print(f"{dim:<12}" + "".join(f"{x:>10.4g}" for x in row) + f"{by_dimension[dim]:>10.3%}")
    print(f"{share:.3%} of the held-out plans would be changed")
    if share > _TOUCHED:
        raise app.UsageError(f"more than {_TOUCHED:.1%}: these limits are not written")
    atomic.write_json(given.out, limits.as_dict())
    print(f"wrote {given.out}; serve with --limits={given.out}")


if __name__ == "__main__":
    from absl import app, flags

    from lightwam_jax import command_line

    flags.DEFINE_string("workdir", None, "Run directory of train.py.")
    flags.DEFINE_string("embodiment", "", "Whose units, where a mixture had several.")
    flags.DEFINE_string("out", "limits.json", "File to write.")
    flags.mark_flag_as_required("workdir")
    command_line.run(main, again="run the same command again")
