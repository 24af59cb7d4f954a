"""An episode in which plans come late, in virtual time, inside a simulator process. No jax."""

import dataclasses
import functools
import time
import zlib

import numpy as np

from lightwam_jax.evaluation import worker
from lightwam_jax.inference import realtime


@dataclasses.dataclass(frozen=True)
class Setting:
    """How late plans come, and how they are executed.

    Attributes:
      execution: splice of `Realtime`. latency: in control steps; drawn from these for each plan.
      horizon, kinds, trained_steps, full_steps, spread, limits, gripper_band: as of `Realtime`.
    """

    execution: str
    latency: tuple
    horizon: int
    kinds: tuple
    trained_steps: int
    full_steps: int
    spread: int = 1
    limits: tuple | None = None
    gripper_band: tuple | None = None

    @property
    def player(self):
        """What plays an episode like this, for `rollout.run`."""
        return functools.partial(play, setting=self)

    def realtime(self, replan_steps):
        """Returns a `Realtime` whose control step is 1 s; a long hold is counted, not an error."""
        values = dataclasses.asdict(self)
        splice, _ = values.pop("execution"), values.pop("latency")
        quiet = dict(on_stall=lambda seconds: None, warn=lambda text: None)
        return realtime.Realtime(dt=1.0, replan=replan_steps, splice=splice, **values, **quiet)


def play(env, episode, replan_steps, max_steps, expert=False, *, setting):
    """As `worker.play`, with plans that come late; its result has the counts of `Realtime`.

    The world goes on while a plan is computed: what the robot executes then, and its holds, are
    steps of the episode. Only the first plan is waited for, as `runner.py` does before the robot
    moves. What an episode draws depends on nothing but its name.
    """
    if expert:
        raise ValueError("an expert plans nothing that could come late")
    began, waited = time.monotonic(), 0.0
    observation = env.reset(episode)
    prompt, executed, coming, success, done = observation["prompt"], [], [], False, False
    rng = np.random.default_rng(zlib.crc32(episode.key.encode()))
    state = setting.realtime(replan_steps)
    for _ in range(realtime.PROBES):
        state.latency.add(rng.choice(setting.latency))
    while not done and (now := len(executed)) < max_steps:
        coming = _deliver(state, coming, now)
        if (number := state.request(now)) is not None:
            seen, asked = env.observe() if executed else observation, time.monotonic()
            chunk = yield seen
            waited += time.monotonic() - asked
            late = rng.choice(setting.latency) if executed else 0
            coming = _deliver(state, [*coming, (now + late, number, chunk)], now)
        executed.append(state.action(now))
        _, success, done = env.step(executed[-1])
    seconds = time.monotonic() - began - waited
    return worker.played(episode, success, prompt, executed, seconds, state.counts)


def _deliver(state, coming, now):
    """Gives `Realtime` the chunks (due, number, chunk) that are due; returns the others."""
    for due, number, chunk in sorted(coming, key=lambda each: each[:2]):
        if due <= now:
            state.receive(number, chunk, now)
    return [each for each in coming if each[0] > now]
