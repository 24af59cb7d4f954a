"""One episode per fault of a network, with the real server, the real client and a real clock.

`evaluate.py --mode realtime --real` runs it. Between client and server stands a proxy that delays
replies, cuts the connection, or falls silent; the simulator is the robot, stepped at its own rate.
Unlike `realtime.py` this measures no success rate: it looks at what reaches the robot.
"""

import asyncio
import contextlib
import dataclasses
import math
import socket
import threading
import time
import typing

import numpy as np

from lightwam_jax import atomic
from lightwam_jax.evaluation import realtime as realtime_lib
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference import client as client_lib
from lightwam_jax.inference import realtime, runner, serving_options
from lightwam_jax.inference import server as server_lib
from lightwam_jax.inference import service as service_lib

HOLD_S = 1.0  # of `Realtime`
_CHUNK = 2**16  # bytes that the proxy forwards at once
_SLACK = 0.5  # ticks by which a command may be late beyond its own: of the system's clock


class Fault(typing.NamedTuple):
    """What a network does to the replies.

    Attributes:
      delay_s, jitter_s: of every reply; the second is drawn between 0 and this.
      after_s: seconds of motion after which the connection ends; inf: it does not.
      silent: it ends without a word (half-open), else closed. for_good: later ones are silent too.
    """

    name: str
    delay_s: float = 0.0
    jitter_s: float = 0.0
    after_s: float = math.inf
    silent: bool = False
    for_good: bool = False


def faults(dt):
    """Returns the `Fault`s to run, for a control step of `dt` seconds."""
    return (
        Fault("none"),
        Fault("delay", delay_s=1.5 * dt),
        Fault("jitter", jitter_s=3 * dt),
        Fault("cut", after_s=5 * dt),
        Fault("half-open", after_s=5 * dt, silent=True),
        Fault("gone", after_s=5 * dt, silent=True, for_good=True),
    )


@dataclasses.dataclass
class Outcome:
    """What came of an episode.

    Attributes:
      fault: name. solved: whether the episode was, before it ended or stalled.
      steps, holds: commands that were planned, and that held still.
      late, failed: replies that something overtook, requests without a plan.
      connections: that the client opened.
      worst_gap: between two commands, in control steps. stalled_s: seconds without a plan until
        that was reported; None: it was not.
      wrong: what must not happen, in words. slow: what came later than it should have; on a machine
        that does something else too this says little.
    """

    fault: str
    solved: bool = False
    steps: int = 0
    holds: int = 0
    late: int = 0
    failed: int = 0
    connections: int = 0
    worst_gap: float = 0.0
    stalled_s: float | None = None
    wrong: list = dataclasses.field(default_factory=list)
    slow: list = dataclasses.field(default_factory=list)


class Proxy:
    """Stands between client and server.

    Attributes:
      port: to connect to. connections: how many came.
    """

    def __init__(self, target, fault, seed=0):
        """Args: target: port of the server on this machine. fault: `Fault`. seed: of the jitter."""
        self._target, self._fault, self._rng = target, fault, np.random.default_rng(seed)
        self._ends, self._closed = math.inf, threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port, self._open = self._listening.getsockname()[1], []
        self.connections = 0
        self._spawn(self._accept)

    def moving(self):
        """Takes the time from which `after_s` counts."""
        if math.isinf(self._ends):
            self._ends = time.monotonic() + self._fault.after_s

    def close(self):
        """Ends everything."""
        self._closed.set()
        for each in (self._listening, *self._open):
            _shut(each)

    def _spawn(self, function, *arguments):
        threading.Thread(target=function, args=arguments, name="proxy", daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                robot, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [robot, server]
                self.connections += 1
                later = time.monotonic() > self._ends
                self._spawn(self._forward, robot, server, lambda: False)
                self._spawn(self._forward, server, robot, lambda later=later: self._over(later))

    def _over(self, later):
        """Waits as the fault has it, and returns whether the connection has ended.

        Args: later: it was opened after the others ended.
        """
        fault = self._fault
        self._closed.wait(fault.delay_s + fault.jitter_s * self._rng.random())
        return time.monotonic() > self._ends and (fault.for_good or not later)

    def _forward(self, source, sink, over):
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if over():
                    if self._fault.silent:
                        self._closed.wait()
                    break
                sink.sendall(data)
        for each in (source, sink):
            _shut(each)


def _shut(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class Robot:
    """An environment as `Runner` sees it; notes what it is sent."""

    def __init__(self, env, episode, state, outcome, max_steps, on_first_step):
        """Args: state: `Realtime`. outcome: `Outcome`, filled here. max_steps: of `Runner.run`."""
        self._env, self._state, self._outcome = env, state, outcome
        self._first, self._most = on_first_step, max_steps
        self._seen, self._asked, self._used = env.reset(episode), {}, {}
        self._newest, self._still_since, self.times = -1, None, []

    def observe(self):
        """Returns an observation, and notes for which request it is."""
        number = self._state.counts["requests"] - 1
        if number >= 0:
            self._asked[number] = self._outcome.steps
        return self._env.observe() if self._outcome.steps else self._seen

    def step(self, action):
        """Executes an action; returns whether the episode is over."""
        now, source = time.monotonic(), self._state.source
        if not self.times:
            self._first()
        if len(self.times) == self._most:  # what `Runner` leaves the robot with, and no step
            return True
        self.times.append(now)
        if source is None:
            self._outcome.holds += 1
            self._still_since = now if self._still_since is None else self._still_since
        else:
            self._still_since = None
            self._check(*source)
            self._outcome.steps += 1
        _, success, done = self._env.step(np.asarray(action, np.float32))
        self._outcome.solved = bool(success)
        return bool(done or success)

    def _check(self, number, row):
        wrong, elapsed = self._outcome.wrong, self._outcome.steps - self._asked[number]
        if row in self._used.setdefault(number, []):
            wrong.append(f"row {row} of plan {number} was executed twice")
        if number < self._newest:
            wrong.append(f"plan {number} was executed after plan {self._newest}")
        if row > elapsed:
            wrong.append(f"row {row} of plan {number}, {elapsed} steps after its observation")
        self._newest = max(self._newest, number)
        self._used[number].append(row)

    def still_s(self):
        """Seconds since which it holds still."""
        return 0.0 if self._still_since is None else time.monotonic() - self._still_since


def run(policy_port, env, episode, setting, replan_steps, dt, fault, max_steps):
    """Returns the `Outcome` of an episode.

    Args:
      policy_port: of a policy server on this machine. env: environment. episode: `EpisodeSpec`.
      setting: `realtime_episode.Setting`. dt: seconds per control step. fault: `Fault`.
    """
    outcome, values = Outcome(fault.name), dataclasses.asdict(setting)
    splice, _ = values.pop("execution"), values.pop("latency")
    how = dict(replan=replan_steps, splice=splice, hold_s=HOLD_S, warn=lambda text: None)
    state = realtime.Realtime(dt=dt, **how, **values)
    with contextlib.closing(Proxy(policy_port, fault)) as proxy:
        robot = Robot(env, episode, state, outcome, max_steps, proxy.moving)
        # Shorter than `hold_s`: time is left to find the server again.
        waits = dict(timeout_s=HOLD_S / 2, retry_s=HOLD_S / 2)
        url = f"ws://127.0.0.1:{proxy.port}"
        with (
            client_lib.Client(url, connect_s=60, **waits) as client,
            runner.Runner(state, client, robot.observe, robot.step) as loop,
        ):
            try:
                loop.run(max_steps)
            except realtime.Stalled:
                outcome.stalled_s = robot.still_s()
    outcome.late, outcome.failed = state.counts["late"], state.counts["failed"]
    outcome.connections = proxy.connections
    gaps = np.diff(robot.times) / dt
    outcome.worst_gap = float(gaps.max()) if len(gaps) else 0.0
    if outcome.worst_gap > 1 + _SLACK:
        outcome.slow.append(f"{outcome.worst_gap:.1f} control steps between two commands")
    if outcome.stalled_s is not None and outcome.stalled_s > HOLD_S + (1 + _SLACK) * dt:
        outcome.slow.append(f"a stall was reported after {outcome.stalled_s:.2f} s")
    if fault.for_good and outcome.stalled_s is None and not outcome.solved:
        outcome.wrong.append("the server was gone, and no stall was reported")
    return outcome


@contextlib.contextmanager
def served(policy):
    """Gives the port of a policy server in this process."""
    service = service_lib.Service(serving_options.Options(max_batch=1))
    loop, server = asyncio.new_event_loop(), server_lib.Server(service)
    threading.Thread(target=loop.run_forever, name="server", daemon=True).start()
    do = lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    do(server.listen("127.0.0.1", 0))
    try:
        service.start(policy)
        loop.call_soon_threadsafe(server.ready)
        yield server.port
    finally:
        do(server.drain())
        loop.call_soon_threadsafe(loop.stop)


def evaluate(policy, suite, out, kinds=(), spread=1):
    """Runs the first episode of a suite under each fault; writes realtime_real.json into `out`.

    Args:
      policy: `Policy` trained for the suite. suite: of `envs.SUITES`. out: pathlib.Path.
      kinds, spread: as of `realtime.setting_of`.

    Returns:
      [`Outcome`].
    """
    suite_run, e = suites_lib.of_config(policy.config, suite), policy.config.evaluation
    setting = realtime_lib.setting_of(policy, "conserve", (0,), kinds, spread)
    env, episode, dt = suite_run.env.make(), suite_run.episodes[0], 1 / suite_run.fps
    with served(policy.deployed()) as port:
        found = [
            run(port, env, episode, setting, e.replan_steps, dt, fault, e.max_steps)
            for fault in faults(dt)
        ]
    out.mkdir(parents=True, exist_ok=True)
    content = {"episode": episode.key, "fps": suite_run.fps, "hold_s": HOLD_S}
    content["faults"] = [dataclasses.asdict(outcome) for outcome in found]
    atomic.write_json(out / "realtime_real.json", content)
    return found


def text_table(outcomes):
    """Returns `Outcome`s as lines with columns, and under them what was wrong or slow."""
    head = ("fault", "solved", "steps", "holds", "late", "failed", "connections")
    rows = [(*head, "worst gap", "stall")]
    for each in outcomes:
        stall = "-" if each.stalled_s is None else f"{each.stalled_s:.2f} s"
        counts = map(str, (each.steps, each.holds, each.late, each.failed, each.connections))
        solved = "yes" if each.solved else "no"
        rows.append((each.fault, solved, *counts, f"{each.worst_gap:.2f} steps", stall))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for kind in ("wrong", "slow"):
        lines += [f"{kind}: {o.fault}: {text}" for o in outcomes for text in getattr(o, kind)]
    return "\n".join(lines)
