"""Runs a robot's control loop while a policy plans in another thread: docs/realtime.md.

    realtime = Realtime(horizon=8, dt=0.1, kinds=("delta",) * 3 + ("gripper",), replan=4)
    with Runner(realtime, client, observe, step) as runner:
        runner.run()  # until stop(), or until step returns True

No jax here: this runs on the robot's computer, the policy perhaps elsewhere.
"""

import contextlib
import logging
import queue
import threading
import time
import typing

import numpy as np

from lightwam_jax.inference import realtime as realtime_lib

_LOG = logging.getLogger(__name__)
_LOOK = 0.02  # seconds between two looks whether to stop, while the latency is measured
_LEAVE = 2.0  # seconds that `close` waits for a request; the thread is left to a client that hangs


class _Reply(typing.NamedTuple):
    number: int
    chunk: np.ndarray | None
    error: Exception | None
    time: float


class Runner:
    """A control loop: asks, executes, holds; `Realtime` decides what, a thread waits for plans.

    Attributes:
      realtime: `Realtime`, with what was counted.
      overruns: steps that took longer than dt.
      error: the last exception of `infer`; a request that failed is made again.
    """

    def __init__(self, realtime, policy, observe, step, start_timeout_s=60.0, clock=time.monotonic):
        """Args:

        realtime: `Realtime`.
        policy: with a method `infer(observation)`, as our client and openpi's, or a function of the
          observation; gives a chunk [T,A], or a dict with it as "actions". Called in a thread, one
          call at a time; a timeout is its own affair.
        observe: called without arguments at the moment of asking, in the thread of `run`; gives
          what `policy` reads, each time in arrays of its own.
        step: executes an action f32 [A]; returns True, itself, to end the run.
        start_timeout_s: for the first plan; the robot does not move before it.
        """
        self.realtime, self.overruns, self.error = realtime, 0, None
        self._infer = getattr(policy, "infer", policy)
        self._observe, self._step = observe, step
        self._clock, self._start_timeout = clock, start_timeout_s
        self._requests, self._replies = queue.SimpleQueue(), queue.SimpleQueue()
        self._busy = self._measured = self._over = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="policy", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def stop(self):
        """Ends `run` after the present step; from any thread or signal handler."""
        self._stop.set()

    def close(self):
        """Stops, and ends the thread; a request that is on its way is not used any more."""
        self.stop()
        self._requests.put(None)
        self._thread.join(_LEAVE)

    def run(self, steps=None):
        """Runs one episode; returns the number of control steps.

        The first run measures the latency. Each waits for a plan before the robot moves, and
        executes none that was asked for before it. Whatever ends it but `step` itself, the robot is
        told to hold still.

        Args:
          steps: control steps at most; None: until `stop`, or until `step` returns True.

        Raises:
          Stalled: no plan for `hold_s`; its cause is what `infer` raised last, if it did.
          TimeoutError: no first plan. Whatever `observe` and `step` raise, and `infer` while the
            latency is measured.
        """
        self._measure()
        self.realtime.reset()
        self._over = False
        try:
            self._first_plan()
            due, done = self._clock(), 0
            while not (self._over or self._stop.is_set() or done == steps):
                self._tick()
                done, due = done + 1, due + self.realtime.dt
                if (left := due - self._clock()) > 0:
                    self._stop.wait(left)
                else:  # late: nothing is hurried through afterwards
                    self.overruns, due = self.overruns + 1, self._clock()
            return done
        finally:
            still = self.realtime.hold()
            if not self._over and still is not None:
                self._step(still)

    def _tick(self):
        now = self._clock()
        self._deliver()
        self._ask(now)
        try:
            action = self.realtime.action(now)
        except realtime_lib.Stalled as stalled:
            raise stalled from self.error
        if action is not None:
            self._over = True  # also where `step` raises: it is not called again
            ended = self._step(action)
            self._over = isinstance(ended, (bool, np.bool_)) and bool(ended)

    def _ask(self, now):
        # One call at a time: what would wait behind another would be asked with an old observation.
        if self._busy or (number := self.realtime.request(now)) is None:
            return
        self._busy = True
        self._requests.put((number, self._observe()))

    def _deliver(self):
        while not self._replies.empty():
            reply, self._busy = self._replies.get(), False
            if reply.error is None:
                self.realtime.receive(reply.number, reply.chunk, reply.time)
                continue
            if repr(reply.error) != repr(self.error):
                _LOG.warning("the policy gave no plan: %r", reply.error)
            self.error = reply.error
            self.realtime.failed(reply.number)

    def _measure(self):
        """Round trips before the robot moves; the first one may load and compile, and is left out.

        They are made like every other: with an observation, through the thread. `stop` ends them.
        """
        for probe in range(0 if self._measured else realtime_lib.PROBES + 1):
            began, reply = self._clock(), None
            self._requests.put((None, self._observe()))
            while reply is None and not self._stop.is_set():
                if self._clock() - began > self._start_timeout:
                    raise self._too_late()
                with contextlib.suppress(queue.Empty):
                    reply = self._replies.get(timeout=_LOOK)
            if self._stop.is_set():
                return
            if reply.error is not None:
                raise reply.error
            if probe:
                self.realtime.latency.add(reply.time - began)
        self._measured = True

    def _first_plan(self):
        deadline = self._clock() + self._start_timeout
        while not (self.realtime.ready or self._stop.is_set()):
            if (now := self._clock()) > deadline:
                raise self._too_late() from self.error
            self._ask(now)
            self._stop.wait(self.realtime.dt)
            self._deliver()

    def _too_late(self):
        return TimeoutError(f"the policy gave no plan within {self._start_timeout} s")

    def _serve(self):
        """The thread: one request after the other, until None."""
        while (request := self._requests.get()) is not None:
            number, observation = request
            try:
                found = self._infer(observation)
                chunk, error = found["actions"] if isinstance(found, dict) else found, None
            except Exception as caught:  # of any client; `run` goes on, and says so
                chunk, error = None, caught
            self._replies.put(_Reply(number, chunk, error, self._clock()))
