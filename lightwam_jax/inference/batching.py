"""One thread that asks the policy, for everyone: requests that wait together become one batch.

As soon as the device is free it takes what has come, oldest first, at most one request of each
session and as many as `max_batch`. Nobody waits for others to come: a fixed wait of 2 ms would
triple the latency of a single robot.
"""

import asyncio
import collections
import concurrent.futures
import queue
import threading
import time
import typing

import numpy as np

PADDED_SIZES = (1, 2, 4, 8, 16, 32, 64)  # batch sizes that are ever compiled

_LATELY_S = 1.0  # a session that asked within it may ask again; only with max_wait_s


class Observation(typing.NamedTuple):
    """One robot's moment.

    Attributes:
      images: {camera: uint8 [h,w,3]}, as config.data expects them. state: f32 [P].
      prompt: str, its spaces single.
    """

    images: dict
    state: np.ndarray
    prompt: str

    @property
    def sizes(self):
        """((height, width) of each camera): observations of the same sizes go into one batch."""
        return tuple(image.shape[:2] for image in self.images.values())


class Planned(typing.NamedTuple):
    """What the policy planned for one observation.

    Attributes:
      actions: f32 [T,A], physical units. taps: {name: its row} of `Policy.act`; {} if not asked.
      queue_s, infer_s: seconds in the queue and on the device, until the actions were on the host.
      batch: observations that were planned together.
    """

    actions: np.ndarray
    taps: dict
    queue_s: float
    infer_s: float
    batch: int


class Overloaded(Exception):
    """The queue is full."""


class Expired(Exception):
    """The observation was too old before the device got to it."""


class _Request(typing.NamedTuple):
    observation: typing.Any
    session: typing.Any
    expires: float
    since: float
    future: concurrent.futures.Future


class Batcher:
    """Asks a policy from one thread of its own.

    Images of one batch have one size: others wait for the next.

    Attributes:
      policy: with `act(images, state, prompts)`, and what `Policy.act` takes besides, if asked for.
    """

    def __init__(
        self, policy, max_batch=8, exact=False, max_wait_s=0.0, most_queued=None, taps=False
    ):
        """Starts the thread; `close` ends it.

        Args:
          max_batch: most observations of one call.
          exact: pad every call to max_batch rows, so that the load does not change a bit.
          max_wait_s: wait so long for more, while fewer requests wait than sessions asked within
            the last second.
          most_queued: of requests; default 4 * max_batch.
          taps: ask the policy for what its queries look at, too.
        """
        self.policy, self._max_batch, self._taps = policy, max_batch, taps
        self._how = ({"return_taps": True} if taps else {}) | ({"rows": max_batch} if exact else {})
        self._max_wait = max_wait_s
        self._most = 4 * max_batch if most_queued is None else most_queued
        self._queue, self._changed = collections.deque(), threading.Condition()
        self._asked = {}  # session -> when it asked last
        self._closing, self._busy_since = False, None
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def depth(self):
        """Requests that wait."""
        return len(self._queue)

    @property
    def busy_s(self):
        """Seconds since the present call of the policy began; 0 while there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, observation, session=None, expires=float("inf")):
        """Returns a `concurrent.futures.Future` of a `Planned`.

        Args:
          observation: `Observation`. session: whose it is; None: nobody's in particular.
          expires: `time.monotonic()` after which it is not asked any more.

        The future raises `Expired`, or what the policy raised. A cancelled one is dropped.

        Raises:
          Overloaded: too many wait. RuntimeError: closed.
        """
        future = concurrent.futures.Future()
        now = time.monotonic()
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            if len(self._queue) >= self._most:
                raise Overloaded(f"{len(self._queue)} requests wait already")
            if self._max_wait and session is not None:
                self._asked[session] = now
            session = future if session is None else session
            self._queue.append(_Request(observation, session, expires, now, future))
            self._changed.notify()
        return future

    def close(self, timeout=None):
        """Lets the thread end after what is queued; waits for it at most `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    # ---- in the thread -------------------------------------------------------------------------

    def _work(self):
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                self._wait_for_more()
                batch = self._take()
            batch = [request for request in batch if _still_wanted(request)]
            if batch:
                self._answer(batch)

    def _wait_for_more(self):
        end = time.monotonic() + self._max_wait
        while self._max_wait:
            now = time.monotonic()
            self._asked = {s: at for s, at in self._asked.items() if at > now - _LATELY_S}
            expected = min(len(self._asked), self._max_batch)
            if now >= end or len(self._queue) >= expected or self._closing:
                return
            self._changed.wait(min(end - now, _LATELY_S / 10))

    def _take(self):
        """The oldest request, and what can go with it; the rest stays in its order."""
        batch, sessions, left = [], set(), collections.deque()
        for request in self._queue:
            fits = not batch or request.observation.sizes == batch[0].observation.sizes
            if fits and len(batch) < self._max_batch and request.session not in sessions:
                batch.append(request)
            else:
                left.append(request)
            sessions.add(request.session)  # a later one must not overtake
        self._queue = left
        return batch

    def _answer(self, batch):
        begin = self._busy_since = time.monotonic()
        try:
            actions, taps = self._ask([request.observation for request in batch])
        except BaseException as error:  # of this batch; those that wait are asked next
            for request in batch:
                request.future.set_exception(error)
            return
        finally:
            self._busy_since = None
        took = time.monotonic() - begin
        for row, request in enumerate(batch):
            own = {name: tap[row] if _has_rows(name) else tap for name, tap in taps.items()}
            waited = begin - request.since
            request.future.set_result(Planned(actions[row], own, waited, took, len(batch)))

    def _ask(self, observations):
        first = observations[0]
        images = {
            camera: np.stack([each.images[camera] for each in observations])
            for camera in first.images
        }
        state = np.stack([each.state for each in observations])
        prompts = [each.prompt for each in observations]
        asked = self.policy.act(images, state, prompts, **self._how)
        actions, taps = asked if self._taps else (asked, {})
        if len(actions) != len(observations):
            raise ValueError(
                f"the policy planned {len(actions)} chunks for {len(observations)} observations"
            )
        return actions, taps


def _has_rows(name):
    return name.startswith("attention_")


def _still_wanted(request):
    if not request.future.set_running_or_notify_cancel():
        return False
    if time.monotonic() > request.expires:
        request.future.set_exception(Expired("too old before the device was free"))
        return False
    return True


class Worker:
    """A daemon thread for what is rare and slow; the process may end while it works."""

    def __init__(self):
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._work, name="prepare", daemon=True).start()

    async def run(self, function, *arguments):
        """Returns what the function returns, run after the jobs before it."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put((loop, future, function, arguments))
        return await future

    def close(self):
        """Lets the thread end after its jobs."""
        self._jobs.put(None)

    def _work(self):
        while (job := self._jobs.get()) is not None:
            loop, future, function, arguments = job
            if future.cancelled():  # who asked has left
                continue
            try:
                result, error = function(*arguments), None
            except Exception as raised:
                result, error = None, raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future, result, error):
    if not future.cancelled():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
