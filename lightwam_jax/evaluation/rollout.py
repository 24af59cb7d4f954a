"""Closed-loop evaluation: one batched policy in this process, N simulator processes beside it.

Episodes are a queue, each run exactly once. `config.batch` environments are open at any
time, spread over `config.workers` spawned processes. Whoever needs a plan waits until all others
need one too; then one batch of exactly `config.batch` rows is computed, padded when fewer episodes
are left. So the same compiled function makes every plan, and what happens in an episode depends
neither on the number of workers nor on its neighbours.

An episode that crashes its environment or its process is tried once more and then recorded as an
error, never as a failure of the policy. What an environment has to provide:
`evaluation/worker.py`. With a log (`episode_log.py`) an evaluation that was killed continues where
it was.
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

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import episode_log
from lightwam_jax.evaluation import worker as worker_lib

ATTEMPTS = 2  # at an episode whose environment or process crashes
START_TIMEOUT = 600.0  # seconds a process may take to start: imports, on an overloaded machine
_CONTEXT = multiprocessing.get_context("spawn")  # forking once jax has threads can deadlock


def run(
    policy_act,
    env,
    episodes,
    config,
    log_path=None,
    manifest=None,
    label="policy",
    expert=False,
    timeout=120.0,
):
    """Runs every episode once and returns the `worker.EpisodeResult`s in the order of `episodes`.

    Args:
      policy_act: (images {camera: uint8 [B,H,W,3]}, state [B,P], prompts) -> actions [B,T,A], with
        B = config.batch at every call; None when `expert` is set.
      env: `base.EnvSpec`.
      episodes: distinct `base.EpisodeSpec`s.
      config: `EvaluationConfig` (replan_steps, max_steps, workers, batch).
      log_path: file that gets each record as it comes. Episodes that it has already are not run
        again, but for those that could not be run.
      manifest: what decides the results, JSON-able; a log with another one is refused.
      label: shown by the progress bar.
      expert: let `env.expert_action()` act, inside the workers.
      timeout: seconds a worker may be silent before it counts as hung.

    Raises:
      ValueError: an episode is given twice, or the log is of another manifest, damaged or in use.
      FloatingPointError: the policy planned actions that are not finite.
      RuntimeError: not one episode could be run, or no simulator process started.
    """
    episodes = list(episodes)
    if repeated := len(episodes) - len(set(episodes)):
        raise ValueError(f"each episode is run once; {repeated} of {len(episodes)} are repeated")
    with contextlib.ExitStack() as stack:
        log = None
        if log_path is not None:
            log = episode_log.EpisodeLog(log_path, manifest or {})
            stack.callback(log.close)
        records = {e: log.records[e] for e in episodes if e in log.records} if log else {}
        progress = stack.enter_context(_Progress(label, len(episodes)))
        for record in records.values():
            progress.add(record)
        todo = [episode for episode in episodes if episode not in records]
        if todo:
            engine = stack.enter_context(_Engine(env, todo, config, expert, timeout))
        while len(records) < len(episodes):
            for record in engine.collect():
                records[record.episode] = record
                if log:
                    log.add(record)
                progress.add(record)
            if slots := engine.due():
                batch = _stack([slot.observation for slot in slots], config.batch)
                engine.plan(slots, policy_act(*batch))
    if all(record.error for record in records.values()):
        raise RuntimeError(
            f"none of the {len(episodes)} episodes could be run; the first error:\n"
            f"{records[episodes[0]].error}"
        )
    return [records[episode] for episode in episodes]


def describe(env, episode):
    """Returns `worker.describe` of an environment, found out in a process of its own."""
    with _CONTEXT.Pool(1) as pool:
        return pool.apply(worker_lib.describe, (env, episode))


def replay(env, records, every, size, replan_steps):
    """Returns `worker.replay` of each record, several processes at a time."""
    if not records:
        return []
    with _CONTEXT.Pool(min(len(records), multiprocessing.cpu_count())) as pool:
        jobs = [(env, record, every, size, replan_steps) for record in records]
        return pool.starmap(worker_lib.replay, jobs, chunksize=1)


@dataclasses.dataclass
class _Slot:
    """One open environment as the main process sees it; `observation` is set while it waits."""

    worker: "_Worker"
    index: int
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
        self.pipe, child = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
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

    def __init__(self, env, episodes, config, expert, timeout):
        self._queue = collections.deque((episode, 1) for episode in episodes)
        self._timeout = timeout
        slots = min(config.batch, len(episodes))
        arguments = (env, config.replan_steps, config.max_steps, expert)
        self._workers = [_Worker(arguments) for _ in range(max(1, min(config.workers, slots)))]
        self._slots = [_Slot(self._workers[i % len(self._workers)], i) for i in range(slots)]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for worker in self._workers:
            worker.stop()

    def collect(self):
        """Hands out episodes, waits for news, and returns the records that are final."""
        for slot in self._slots:
            if slot.episode is None and self._queue:
                slot.episode, slot.attempt = self._queue.popleft()
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
        if kind == "ready":
            return []
        if kind == "observation":
            slot.observation = payload
            return []
        if kind == "error":
            return self._failed(slot, payload)
        slot.episode = None
        return [payload]

    def _restart(self, worker, reason):
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
        episode, slot.episode, slot.observation = slot.episode, None, None
        if slot.attempt < ATTEMPTS:
            self._queue.append((episode, slot.attempt + 1))
            return []
        return [worker_lib.failed_to_run(episode, reason)]


class _Progress:
    """A progress bar with the running success rate."""

    def __init__(self, label, total):
        self._counts = collections.Counter()
        self._bar = tqdm.tqdm(
            total=total,
            desc=f"{label:<10}",
            unit="episode",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._bar.close()

    def add(self, record):
        self._counts[record.success] += 1
        ran = self._counts[True] + self._counts[False]
        errors = f", {self._counts[None]} errors" if self._counts[None] else ""
        self._bar.set_postfix_str(f"success {self._counts[True]}/{ran}{errors}", refresh=False)
        self._bar.update()


def _stack(observations, rows):
    """Batches observations; repeats the first to fill `rows` (rows do not see each other)."""
    filled = observations + observations[:1] * (rows - len(observations))
    images = {c: np.stack([o["images"][c] for o in filled]) for c in filled[0]["images"]}
    state = np.stack([o["state"] for o in filled]).astype(np.float32)
    return images, state, [o["prompt"] for o in filled]
