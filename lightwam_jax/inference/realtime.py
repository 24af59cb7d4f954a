"""Executes action chunks that arrive late without stopping for them: docs/realtime.md.

Plain numpy and no jax, because simulator workers and robots run this next to their own loop.
"""

import collections
import logging
import math
import typing

import numpy as np

_LOG = logging.getLogger(__name__)
SPLICES = ("conserve", "index", "append", "sync")
COUNTS = ("requests", "holds", "skipped", "late", "failed", "discarded", "shortened", "deepest")
COUNTS += ("limited",)
PROBES = 5  # round trips to measure before the robot moves
_REMEMBERED = 50  # round trips that the latency is taken from
_FADE = 3  # steps at most from the old targets to the new ones
_ROUNDING = 1e-6  # steps, relative: 0.3 / 0.1 is 3 steps, not 4


class Stalled(RuntimeError):
    """No plan came in time: the robot has held still for `hold_s`."""


def trained_depth(loss, horizon):
    """Returns (steps of a chunk that training weighed at all, those that it weighed fully).

    Args:
      loss: `LossConfig`, of whose temporal weighting these follow. horizon: T.
    """
    if not loss.temporal_weighting:
        return horizon, horizon
    full = min(loss.prefix_steps, horizon)
    return (horizon if loss.tail_weight else full), full


class Latency:
    """The last round trips, from asking to having the plan, in seconds."""

    def __init__(self):
        self._seconds = collections.deque(maxlen=_REMEMBERED)

    def __len__(self):
        return len(self._seconds)

    def add(self, seconds):
        """Takes note of one more."""
        self._seconds.append(max(0.0, float(seconds)))

    @property
    def p95(self):
        """The measured value that 95 % do not exceed; 0 before there is any."""
        ordered = sorted(self._seconds)
        return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


class _Request(typing.NamedTuple):
    time: float
    step: int  # actions executed when its observation was taken
    epoch: int


class _Row(typing.NamedTuple):
    source: tuple  # (id of the request, index in its chunk)
    action: np.ndarray


class Realtime:
    """The actions of an episode, from chunks that arrive late.

    A state machine without clock, thread or network: all times are passed in, in seconds, and only
    differences between them count. One step of the control loop is

        if (number := realtime.request(now)) is not None:
            ...                                     # observe now, and ask the policy
        for each reply that came: realtime.receive(number, chunk, when), or realtime.failed(number)
        action = realtime.action(now)               # [A], or None: send nothing

    `runner.py` does that with a thread for the network.

    A chunk belongs to the step at which its observation was taken. When it arrives, `elapsed` more
    actions have been executed, and its first `elapsed` rows are not. The splice "conserve" makes up
    for what they would have done, by the kind of dimension:
      delta     what the skipped rows would have moved the robot, less what it was moved meanwhile,
                is added to the rows that follow
      absolute  from the old targets to the new ones over up to three steps, where both have rows
      gripper   the new command; one near the middle does not count as a change. Where the skipped
                rows would have opened or closed it, the chunk is executed from that row on
    Others, to compare with: "index" only skips the rows; "append" executes the chunk from its first
    row, late; "sync" asks when nothing is left and lets the robot wait. The last two execute
    `replan` steps of each chunk, however many were trained. A chunk that arrives before the next
    action is executed as it is, whatever the splice.

    Attributes:
      latency: `Latency`; before the robot moves, give it `PROBES` round trips.
      source: (number of the request, row of its chunk) of the last action; None for a hold.
      counts: {"requests", "holds": steps without a plan, "skipped": rows, "late": replies that
        something newer or a reset had overtaken, "failed", "discarded": chunks with no row left,
        "shortened": chunks executed for fewer steps than `replan`, "deepest": the most rows into a
        chunk, "limited": actions that `rate` changed}.
    """

    def __init__(
        self,
        horizon,
        dt,
        kinds,
        trained_steps=None,
        replan=None,
        splice="conserve",
        spread=1,
        *,
        full_steps=None,
        limits=None,
        rate=None,
        gripper_band=None,
        hold_s=1.0,
        on_stall=None,
        warn=_LOG.warning,
    ):
        """Args:

        horizon: T. dt: seconds per control step.
        kinds: per dimension "delta", "absolute" or "gripper", of what the robot is sent
          (`data.actions.kinds`).
        trained_steps: no row from here on is executed (`trained_depth`); default: T.
        replan: steps to execute of each chunk before the next one; default: trained_steps.
        splice: one of `SPLICES`. spread: steps over which "conserve" spreads what it adds.
        full_steps: rows that training weighed fully; going beyond is worth a warning.
        limits: (lowest, highest) [A] each: what "conserve" adds keeps delta actions within. What
          does not fit is left to the next steps.
        rate: [A], the most that an action differs from the one sent before it, also from chunk to
          chunk; None in it: no limit. "conserve" counts what was sent. Holds are not slowed down.
        gripper_band: (low, high) [A] each: a gripper's command between them keeps the last one;
          None: grippers are not told open from closed.
        hold_s: seconds without a plan until `on_stall(seconds)` is called, at each step; default:
          raises `Stalled`.
        warn: called with a text; for each cause once.
        """
        trained_steps = horizon if trained_steps is None else min(trained_steps, horizon)
        replan = trained_steps if replan is None else replan
        kinds = np.array(kinds)
        _check(horizon, dt, kinds, trained_steps, replan, splice, spread, hold_s)
        self.horizon, self.dt, self.hold_s, self.splice = horizon, dt, hold_s, splice
        if splice in ("append", "sync"):  # which execute `replan` steps, whatever was trained
            trained_steps = full_steps = horizon
        self._trained, self._replan, self._spread = trained_steps, replan, spread
        self._full = trained_steps if full_steps is None else full_steps
        self._delta, self._absolute = kinds == "delta", kinds == "absolute"
        self._grippers = np.flatnonzero(kinds == "gripper")
        open_ended = np.full((2, len(kinds)), [[-np.inf], [np.inf]])
        self._limits = open_ended if limits is None else np.asarray(limits, float)
        self._band, self._rate = gripper_band, _rates(rate, len(kinds))
        self._on_stall, self._warn, self._warned = on_stall or _stalled, warn, set()
        self.latency, self.counts = Latency(), dict.fromkeys(COUNTS, 0)
        self._flight, self._next, self._epoch = {}, 0, 0
        self.reset()

    def reset(self):
        """Begins an episode: nothing planned before it is executed, not even if it comes later."""
        self._epoch += 1
        self._floor = self._next - 1  # replies up to this number come too late
        self._queue, self._spare = collections.deque(), 0
        self._step, self._executed = 0, collections.deque(maxlen=self.horizon)
        self._last = self._waiting = self.source = None

    @property
    def ready(self):
        """True once there is something to execute or to hold."""
        return bool(self._queue) or self._last is not None

    @property
    def delay(self):
        """Steps that a plan is expected to take; one more while little has been measured."""
        steps = math.ceil(self.latency.p95 / self.dt - _ROUNDING)
        return steps + (len(self.latency) < PROBES)

    def request(self, now):
        """Returns the number of a request to make with an observation taken now, or None."""
        left = len(self._queue) - self._spare
        if left > (0 if self.splice == "sync" else self.delay):
            return None
        live = [number for number in self._flight if number > self._floor]
        if live and now - self._flight[live[-1]].time < self._patience() * (1 - _ROUNDING):
            return None
        if len(live) > 1:
            self._floor = live[0]
        for old in [number for number in self._flight if number <= self._next - _REMEMBERED]:
            del self._flight[old]  # lost
        number, self._next = self._next, self._next + 1
        self._flight[number] = _Request(now, self._step, self._epoch)
        self.counts["requests"] += 1
        return number

    def receive(self, number, chunk, now):
        """Takes a chunk [T, A]; returns whether it is executed from here on."""
        request = self._flight.pop(number, None)
        if request is None:
            self.counts["late"] += 1
            return False
        self.latency.add(now - request.time)
        if request.epoch != self._epoch or number <= self._floor:
            self.counts["late"] += 1
            return False
        if (chunk := self._checked(chunk)) is None:
            self.counts["failed"] += 1
            return False
        self._floor = number
        elapsed = 0 if self.splice == "append" else self._step - request.step
        rows = self._trained - elapsed
        self._advise(elapsed)
        if rows < 1:
            self.counts["discarded"] += 1
            return False
        self.counts["skipped"] += elapsed
        self.counts["shortened"] += rows < self._replan
        self._put(number, chunk, elapsed)
        return True

    def failed(self, number):
        """Takes note that a request got no chunk; the next `request` may ask again at once."""
        self.counts["failed"] += self._flight.pop(number, None) is not None

    def action(self, now):
        """Returns the next action f32 [A]: each planned one once; else one that holds still.

        To hold still is a delta of 0 and the last target or gripper command. None, "send nothing",
        before an episode's first chunk.
        """
        if self._queue:
            source, planned = self._queue.popleft()
            self._last, self.source = self._slowed(planned), source
            self._spare = min(self._spare, len(self._queue))
            self._executed.append(self._last)
            self._step, self._waiting = self._step + 1, None
            self.counts["deepest"] = max(self.counts["deepest"], self.source[1] + 1)
            return self._last.copy()
        self.source = None
        self._waiting = now if self._waiting is None else self._waiting
        if now - self._waiting >= self.hold_s * (1 - _ROUNDING):
            self._on_stall(now - self._waiting)
        self.counts["holds"] += self._last is not None
        return self.hold()

    def hold(self):
        """Returns the action f32 [A] that holds still; None before an episode's first action."""
        return None if self._last is None else np.where(self._delta, np.float32(0), self._last)

    def _slowed(self, action):
        """The action, as far as `rate` lets it go from the one sent before."""
        if (before := self.hold() if self.source is None else self._last) is None:
            return action
        slow = action.clip(before - self._rate, before + self._rate)
        within = np.abs(action - slow) <= _ROUNDING * self._rate
        self.counts["limited"] += not within.all()
        return np.where(within, action, slow).astype(np.float32)

    # ---- splices -------------------------------------------------------------------------------

    def _put(self, number, chunk, elapsed):
        """Makes the rows of a chunk from `elapsed` on what is executed next."""
        conserve = self.splice == "conserve" and elapsed > 0
        first = self._missed_change(chunk, elapsed) if conserve else elapsed
        plan = chunk[first : self._trained].copy()
        if self.splice in ("append", "sync"):
            plan = plan[: self._replan]
        if conserve:
            self._conserve(plan, chunk[:first], elapsed)
            self._fade(plan)
            self._keep_grippers(plan)
        if self.splice != "append":
            self._queue.clear()
        for index, action in enumerate(plan.astype(np.float32), first):
            self._queue.append(_Row((number, index), action))
        # What lies behind `replan` is executed only while the next chunk is late.
        self._spare = max(0, len(plan) - self._replan)

    def _missed_change(self, chunk, elapsed):
        """Returns the row to go on with: `elapsed`, or that of a gripper's change before it.

        A gripper takes its time, and the arm of the plan waits for it: a robot that went on where
        the plan is by now would lift what it has only begun to grasp.
        """
        first = elapsed
        for dim in self._grippers if self._band is not None else ():
            middle = (self._band[0][dim] + self._band[1][dim]) / 2
            above = chunk[: elapsed + 1, dim] > middle
            if above[-1] != (self._last[dim] > middle):
                other = np.flatnonzero(above != above[-1])
                first = min(first, other[-1] + 1 if len(other) else 0)
        return first

    def _conserve(self, plan, skipped, elapsed):
        """Adds to the deltas what the skipped rows would have moved and the executed ones did not.

        The state in which the chunk was planned is that before `skipped` and before the last
        `elapsed` actions, so this ends where the chunk would have ended.
        """
        executed = np.array(list(self._executed)[-elapsed:], float)
        owed = np.where(self._delta, skipped.sum(axis=0) - executed.sum(axis=0), 0)
        for step, row in enumerate(plan):
            lowest, highest = np.minimum(self._limits[0], row), np.maximum(self._limits[1], row)
            wanted = row + (share := owed / max(1, self._spread - step))
            plan[step] = np.clip(wanted, lowest, highest)
            owed = owed - share + (wanted - plan[step])
            if not owed.any():
                return

    def _fade(self, plan):
        """Moves absolute targets from what is still queued to the new ones."""
        old = [row.action for row in self._queue][: min(_FADE, len(plan))]
        for step, before in enumerate(old):
            new = (step + 1) / (len(old) + 1)
            faded = new * plan[step] + (1 - new) * before
            plan[step] = np.where(self._absolute, faded, plan[step])

    def _keep_grippers(self, plan):
        """Keeps a gripper as it is until the new plan clearly commands something."""
        for dim in self._grippers if self._band is not None else ():
            for row in plan:
                if not self._band[0][dim] < row[dim] < self._band[1][dim]:
                    break
                row[dim] = self._last[dim]

    # ---- the rest ------------------------------------------------------------------------------

    def _patience(self):
        """Seconds after which a second request is made beside one that has no answer yet."""
        return max(2 * self.latency.p95, self.dt) if len(self.latency) else self.hold_s

    def _checked(self, chunk):
        """The chunk as float64, or None for one that cannot be executed."""
        try:
            chunk = np.array(chunk, float)
        except (TypeError, ValueError):
            chunk = np.zeros(0)
        expected = (self.horizon, len(self._delta))
        if chunk.shape == expected and np.isfinite(chunk).all():
            return chunk
        what = "NaN or infinite actions" if chunk.shape == expected else f"shape {chunk.shape}"
        self._once("chunk", f"a chunk with {what}; expected finite numbers {list(expected)}")
        return None

    def _advise(self, elapsed):
        """Warns where a chunk is executed further than it was trained."""
        needed = elapsed + self._replan
        train = (
            f"plans come {elapsed} steps late and replan={self._replan} are to be executed: train "
            f"with config.loss.prefix_steps={needed} or more"
        )
        if elapsed >= self._trained:
            self._once(
                "none",
                f"{train}. Of the {self._trained} trained steps none is left: the robot waits for "
                "each plan, and splice='sync' does that in order",
            )
        elif needed > self._trained:
            left = self._trained - elapsed
            self._once("short", f"{train}. Now the {left} trained steps that are left are executed")
        elif needed > self._full:
            self._once("weak", f"{train}. The loss gave the steps after {self._full} little weight")

    def _once(self, cause, text):
        if cause not in self._warned:
            self._warned.add(cause)
            self._warn(text)


def _check(horizon, dt, kinds, trained_steps, replan, splice, spread, hold_s):
    unknown = sorted({*kinds.tolist()} - {"delta", "absolute", "gripper"})
    if unknown or kinds.ndim != 1 or not len(kinds):
        raise ValueError(
            f"kinds is {kinds.tolist()}; expected 'delta', 'absolute' or 'gripper' for each "
            "action dimension"
        )
    if splice not in SPLICES:
        raise ValueError(f"splice is {splice!r}; expected one of {', '.join(SPLICES)}")
    if not (dt > 0 and hold_s > 0):
        raise ValueError(f"dt={dt} and hold_s={hold_s} are seconds; expected more than 0")
    if not (1 <= replan <= horizon and trained_steps >= 1 and spread >= 1):
        raise ValueError(
            f"replan={replan}, trained_steps={trained_steps}, spread={spread}: expected at "
            f"least 1, and replan at most the chunk's {horizon}"
        )


def _rates(rate, width):
    values = [None] * width if rate is None else rate
    values = np.array([np.inf if value is None else value for value in values], float)
    if values.shape != (width,) or not (values > 0).all():
        raise ValueError(f"rate is {rate}; expected {width} numbers above 0, or None for no limit")
    return values


def _stalled(seconds):
    raise Stalled(
        f"no plan for {seconds:.2f} s; the robot is holding still. Is the policy's server there?"
    )
