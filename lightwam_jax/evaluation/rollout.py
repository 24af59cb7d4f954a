"""Runs episodes: one batched policy in this process, N simulator processes beside it.

Episodes are a queue, each run exactly once. `config.batch` environments are open at any time,
spread over `config.workers` spawned processes. Whoever needs a plan waits until all others need one
too. Then one batch of exactly `config.batch` rows is computed, padded when fewer episodes are left.
So the same compiled function makes every plan, and what happens in an episode depends neither on
the number of workers nor on the other episodes.

Which episode comes next is therefore free. A process stays on its task as long as there are
episodes of it, since changing tasks can take seconds, and memory (`EnvSpec.tasks_at_once`).

An episode that crashes its environment or its process is tried once more and then counted as an
error, never as a failure of the policy. With a log (`episode_log.py`) an evaluation that was killed
continues where it was. What an environment has to provide: `envs/base.py`.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import sys
import time

import numpy as np
import tqdm

from lightwam_jax import interrupts
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import episode_log
from lightwam_jax.evaluation import worker as worker_lib

ATTEMPTS = 2  # at an episode whose environment or process crashes
START_TIMEOUT = 600.0  # seconds a process may take to start: imports, on an overloaded machine


def run(
    act,
    env,
    episodes,
    config,
    log_path=None,
    manifest=None,
    label="policy",
    timeout=120.0,
    player=None,
):
    """Runs every episode once and returns the `worker.EpisodeResult`s in the order of `episodes`.

    Args:
      act: (images {camera: uint8 [B,H,W,3]}, state [B,P], prompts) -> actions [B,T,A], with
        B = config.batch at every call; None: `env.expert_action()` acts, inside the workers.
      env: `base.EnvSpec`. episodes: distinct `base.EpisodeSpec`s.
      config: `EvaluationConfig` (replan_steps, max_steps, workers, batch).
      log_path: file that gets each result as it comes. Episodes that it has already are not run
        again, but for those that could not be run.
      manifest: what decides the results, JSON-able; a log with another one is refused.
      label: shown by the progress bar.
      timeout: seconds a worker may be silent before it counts as hung.
      player: what runs an episode in place of `worker.play`, with its arguments; picklable.

    Raises:
      ValueError: an episode is given twice, or the log is of another manifest, damaged or in use.
      FloatingPointError: the policy planned actions that are not finite.
      RuntimeError: not one episode could be run, or no simulator process started.
    """
    episodes = list(episodes)
    if repeated := len(episodes) - len(set(episodes)):
        raise ValueError(f"each episode is run once; {repeated} of {len(episodes)} are repeated")
    with contextlib.ExitStack() as contexts:
        log = episode_log.EpisodeLog(log_path, manifest or {}) if log_path is not None else None
        if log:
            contexts.callback(log.close)
        results = {e: log.results[e] for e in episodes if e in log.results} if log else {}
        progress = contexts.enter_context(_Progress(label, len(episodes)))
        for result in results.values():
            progress.add(result)
        todo = [episode for episode in episodes if episode not in results]
        if todo:
            engine = _Engine(env, todo, config, act is None, timeout, player)
            contexts.enter_context(engine)
        while len(results) < len(episodes):
            for result in engine.collect():
                results[result.episode] = result
                if log:
                    log.add(result)
                progress.add(result)
            if slots := engine.due():
                batch = stack([slot.observation for slot in slots], config.batch)
                engine.plan(slots, act(*batch))
    if all(result.error for result in results.values()):
        raise RuntimeError(
            f"none of the {len(episodes)} episodes could be run; the first error:\n"
            f"{results[episodes[0]].error}"
        )
    return [results[episode] for episode in episodes]


def describe(env, episode):
    """Returns `worker.describe` of an environment, found out in a process of its own."""
    with interrupts.SPAWN.Pool(1) as pool:
        return pool.apply(worker_lib.describe, (env, episode))


def replay(env, results, every, size, replan_steps):
    """Returns `worker.replay` of each result, several processes at a time."""
    if not results:
        return []
    processes = min(len(results), multiprocessing.cpu_count())
    with interrupts.SPAWN.Pool(processes) as pool:
        jobs = [(env, result, every, size, replan_steps) for result in results]
        return pool.starmap(worker_lib.replay, jobs, chunksize=1)


@dataclasses.dataclass
class _Slot:
    """One open environment as the main process sees it; `observation` is set while it waits."""

    worker: "_Worker"
    index: int
    task: str | None = None  # of its last episode: what its environment has loaded
    episode: envs_base.EpisodeSpec | None = None
    attempt: int = 0
    observation: dict | None = None


class _Worker:
    """A simulator process and the pipe to it.

    It answers messages one by one, in order: `pending` holds the slots it has yet to answer for
    (None: its start), and if it dies or hangs, the first of them is to blame.
    """

    def __init__(self, arguments):
        self._arguments = arguments
        self.start()

    def start(self):
        self.pipe, child = interrupts.SPAWN.Pipe()
        self.process = interrupts.SPAWN.Process(  # forking once jax has threads can deadlock
            target=worker_lib.serve, args=(child, *self._arguments), daemon=True
        )
        self.process.start()
        child.close()  # so that the death of the process ends the pipe
        self.pending = collections.deque([None])  # that it is ready
        self.heard = time.monotonic()

    def send(self, kind, slot, payload):
        self.heard = time.monotonic()
        self.pending.append(slot)
        # A process that died is found by its closed pipe in `collect`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((kind, slot.index, payload))

    def stop(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Engine:
    """The queue of episodes and the environments they run in."""

    def __init__(self, env, episodes, config, expert, timeout, player=None):
        self._queue = collections.deque((episode, 1) for episode in episodes)
        self._tasks_at_once = env.tasks_at_once()
        self._timeout = timeout
        slots = min(config.batch, len(episodes))
        arguments = (env, config.replan_steps, config.max_steps, expert, player)
        self._workers = [_Worker(arguments) for _ in range(max(1, min(config.workers, slots)))]
        self._slots = [_Slot(self._workers[i % len(self._workers)], i) for i in range(slots)]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for worker in self._workers:
            worker.stop()

    def collect(self):
        """Hands out episodes, waits for news, and returns the results that are final."""
        for slot in self._slots:
            if slot.episode is None and (item := self._take(slot)):
                slot.episode, slot.attempt = item
                slot.task = slot.episode.task
                slot.worker.send("start", slot, slot.episode)
        final, busy = [], [worker for worker in self._workers if worker.pending]
        ready = multiprocessing.connection.wait([w.pipe for w in busy], timeout=1.0)
        for worker in busy:
            if worker.pipe in ready:
                worker.heard = time.monotonic()
                try:
                    kind, _, payload = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    reason = f"the simulator process died (exit code {worker.process.exitcode})"
                    final += self._restart(worker, reason)
                else:
                    final += self._receive(worker.pending.popleft(), kind, payload)
            elif time.monotonic() - worker.heard > self._patience(worker):
                reason = f"the simulator process was silent for {self._patience(worker):.0f} s"
                final += self._restart(worker, reason)
        return final

    def _take(self, slot):
        """Takes the episode that comes next in a slot from the queue; None: none for now."""
        running = [other for other in self._slots if other.episode is not None]
        here = {other.task for other in running if other.worker is slot.worker}
        elsewhere = {other.task for other in running} - here
        full = self._tasks_at_once is not None and len(here) >= self._tasks_at_once

        def rank(place):
            task = self._queue[place][0].task
            return (task != slot.task, task not in here, task in elsewhere, place)

        places = range(len(self._queue))
        if full:
            places = [place for place in places if self._queue[place][0].task in here]
        if not places:
            return None
        place = min(places, key=rank)
        item = self._queue[place]
        del self._queue[place]
        return item

    def due(self):
        """Returns the slots to plan for: all that run, once all of them wait; else none."""
        running = [slot for slot in self._slots if slot.episode is not None]
        return running if all(slot.observation is not None for slot in running) else []

    def plan(self, slots, actions):
        """Sends each slot its row of actions [B,T,A]."""
        actions = np.asarray(actions)
        bad = [s.episode.key for s, chunk in zip(slots, actions) if not np.isfinite(chunk).all()]
        if bad:
            raise FloatingPointError(
                f"the policy planned NaN or infinite actions for episodes "
                f"{', '.join(bad)}; nothing it does can be evaluated"
            )
        for slot, chunk in zip(slots, actions):
            slot.observation = None
            slot.worker.send("plan", slot, chunk)

    def _patience(self, worker):
        return max(self._timeout, START_TIMEOUT) if worker.pending[0] is None else self._timeout

    def _receive(self, slot, kind, payload):
        """Takes the answer of a worker; returns the results that it makes final."""
        if kind == "error":
            return self._failed(slot, payload)
        if kind == "result":
            slot.episode = None
            return [payload]
        if kind == "observation":  # else: "ready"
            slot.observation = payload
        return []

    def _restart(self, worker, reason):
        """Replaces a dead or hung process; its other episodes begin again without losing a try."""
        guilty = worker.pending[0]
        if guilty is None:
            raise RuntimeError(
                f"a simulator process could not be started: {reason}; its own error output is above"
            )
        worker.stop()
        worker.start()
        for slot in self._slots:
            if slot.worker is worker and slot.episode is not None and slot is not guilty:
                self._queue.append((slot.episode, slot.attempt))
                slot.episode = slot.observation = None
        return self._failed(guilty, reason)

    def _failed(self, slot, reason):
        """Queues the slot's episode once more, or returns its result as one that could not run."""
        episode, slot.episode, slot.observation = slot.episode, None, None
        if slot.attempt < ATTEMPTS:
            self._queue.append((episode, slot.attempt + 1))
            return []
        return [worker_lib.failed_to_run(episode, reason)]


class _Progress:
    """A progress bar with the running success rate."""

    def __init__(self, label, total):
        self._counts = collections.Counter()
        every = 0.2 if sys.stderr.isatty() else 30.0  # seconds
        look = dict(desc=f"{label:<10}", unit="episode", dynamic_ncols=True, mininterval=every)
        self._bar = tqdm.tqdm(total=total, **look)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._bar.close()

    def add(self, result):
        self._counts[result.success] += 1
        ran = self._counts[True] + self._counts[False]
        errors = f", {self._counts[None]} errors" if self._counts[None] else ""
        self._bar.set_postfix_str(f"success {self._counts[True]}/{ran}{errors}", refresh=False)
        self._bar.update()


def stack(observations, rows):
    """Returns (images, state, prompts) of observations, a batch that `act` takes.

    The first is repeated to fill `rows`; rows do not see each other.
    """
    filled = observations + observations[:1] * (rows - len(observations))
    images = {c: np.stack([o["images"][c] for o in filled]) for c in filled[0]["images"]}
    state = np.stack([o["state"] for o in filled]).astype(np.float32)
    return images, state, [o["prompt"] for o in filled]
