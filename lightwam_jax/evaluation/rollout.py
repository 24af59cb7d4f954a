"""Closed-loop evaluation: one batched policy in this process, N simulator processes beside it.

Episodes are a queue of seeds, each run exactly once. A fixed number of environments (`config.batch`) is open at any
time, spread over `config.workers` spawned processes; whoever needs a plan waits until all the others need one too,
and then one batch of exactly `config.batch` rows is computed, padded when fewer environments are left. So the same
compiled function serves every plan, and an episode's result depends neither on the number of workers nor on its
neighbours. Workers never import jax; an episode that crashes its environment or its process is tried once more and
then recorded as an error, never as a failure of the policy.

What an environment provides (see `envs/demo.py`):
  reset(seed)           starts an episode; everything random in it comes from the seed
  observe()             {"images": {camera: uint8 [H,W,3]}, "state": f32 [P], "prompt": str}; renders
  step(action)          -> (observation without images or None, success, done); does not render
  expert_action()       -> [A]; only for expert=True
  picture(camera, size) -> uint8 [size,size,3]; only for `replay`
"""

import collections
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.connection
import pathlib
import sys
import time
import traceback
import zlib

import numpy as np
import tqdm

from lightwam_jax.inference import chunking

ATTEMPTS = 2  # of an episode whose environment or process crashes
_CONTEXT = multiprocessing.get_context("spawn")  # fork after jax has started its threads deadlocks


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Where a worker finds its environments: "module:callable" and the keyword arguments to call it with."""
    factory: str
    kwargs: dict = dataclasses.field(default_factory=dict)

    def make(self):
        """Returns a new environment."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(**self.kwargs)


@dataclasses.dataclass(frozen=True)
class Record:
    """One episode. `success` is None when it could not be run, and `error` says why."""
    seed: int
    success: bool | None
    steps: int
    prompt: str
    error: str | None
    seconds: float
    digest: int  # CRC-32 of the executed actions: equal digests, equal episodes
    actions: np.ndarray = dataclasses.field(repr=False, compare=False)  # [steps, A], for `replay`

    def to_json(self):
        """Returns the record as a plain dict, without the actions."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "actions"}


def run(policy_act, env, seeds, config, log_path=None, label="policy", expert=False, timeout=120.0):
    """Runs every seed once and returns the records in the order of `seeds`.

    Args:
      policy_act: callable (images {camera: uint8 [B,H,W,3]}, state [B,P], prompts) -> actions [B,T,A], with B equal
        to config.batch at every call; None when expert is set.
      env: EnvSpec.
      seeds: distinct integers.
      config: `EvaluationConfig` (replan, max_steps, workers, batch).
      log_path: JSON lines file, begun anew; gets each record as it comes.
      label: shown by the progress bar.
      expert: let `env.expert_action()` act, in the workers.
      timeout: seconds a worker may be silent before it counts as hung.

    Raises:
      ValueError: duplicate seeds.
      FloatingPointError: the policy returned actions that are not finite.
      RuntimeError: not one episode could be run.
    """
    seeds = [int(seed) for seed in seeds]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"each seed is one episode; {len(seeds) - len(set(seeds))} of the {len(seeds)} are repeated")
    engine = _Engine(env, seeds, config, expert, timeout)
    records = {}
    with engine, _Log(log_path, label, len(seeds)) as log:
        while len(records) < len(seeds):
            for record in engine.collect():
                records[record.seed] = record
                log.add(record)
            rows = engine.due()
            if rows:
                engine.plan(rows, policy_act(*_stack([row.observation for row in rows], config.batch)))
    if all(record.error for record in records.values()):
        raise RuntimeError(f"none of the {len(seeds)} episodes could be run; the first error:\n{records[seeds[0]].error}")
    return [records[seed] for seed in seeds]


def replay(env, records, every, size, replan):
    """Repeats recorded episodes and takes their pictures; renders nothing the evaluation itself had to render.

    Args:
      env: EnvSpec.
      records: `Record`s that ran (`error` is None).
      every: steps between two pictures.
      size: edge of the pictures in pixels.
      replan: steps between two of the returned observations.

    Returns:
      per record: {"frames": {camera: uint8 [n,size,size,3]}, "frame_steps": [n], "observations": [m], what the policy
      saw at each plan, "plan_steps": [m]}; the last frame is the end.

    Raises:
      RuntimeError: a repeated episode ended otherwise than it was recorded (the environment is not deterministic).
    """
    if not records:
        return []
    jobs = [(env, record, every, size, replan) for record in records]
    with _CONTEXT.Pool(min(len(jobs), multiprocessing.cpu_count())) as pool:
        return pool.starmap(_replay, jobs)


# ---------------------------------------------------------------- main process


@dataclasses.dataclass
class _Slot:
    """One open environment as the main process sees it."""
    worker: "_Worker"
    index: int
    seed: int | None = None
    attempt: int = 0
    observation: dict | None = None  # set while the episode waits for a plan


class _Worker:
    """A simulator process and the pipe to it."""

    def __init__(self, arguments):
        self._arguments = arguments
        self.start()

    def start(self):
        self.pipe, child = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(child, *self._arguments), daemon=True)
        self.process.start()
        child.close()  # so that the death of the process ends the pipe
        self.heard = time.monotonic()

    def send(self, message):
        self.heard = time.monotonic()
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process died; `collect` finds the closed pipe and tries the episodes again

    def stop(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Engine:
    """The queue of episodes and the environments they run in."""

    def __init__(self, env, seeds, config, expert, timeout):
        self._queue = collections.deque((seed, 1) for seed in seeds)
        self._timeout = timeout
        processes = max(1, min(config.workers, config.batch, len(seeds)))
        arguments = (env, config.replan, config.max_steps, expert)
        self._workers = [_Worker(arguments) for _ in range(processes)]
        count = min(config.batch, len(seeds))
        self._slots = [_Slot(self._workers[i % processes], i) for i in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for worker in self._workers:
            worker.stop()

    def collect(self):
        """Hands out episodes, waits for news from the workers, and returns the records that are final."""
        for slot in self._slots:
            if slot.seed is None and self._queue:
                slot.seed, slot.attempt = self._queue.popleft()
                slot.worker.send(("start", slot.index, slot.seed))
        busy = {id(s.worker): s.worker for s in self._slots if s.seed is not None and s.observation is None}.values()
        final = []
        ready = multiprocessing.connection.wait([w.pipe for w in busy], timeout=1.0) if busy else []
        for worker in busy:
            if worker.pipe in ready:
                worker.heard = time.monotonic()
                try:
                    final += self._receive(*worker.pipe.recv())
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    final += self._restart(worker, f"the simulator process died (exit code {worker.process.exitcode})")
            elif time.monotonic() - worker.heard > self._timeout:
                final += self._restart(worker, f"the simulator process was silent for {self._timeout:.0f} s")
        return final

    def due(self):
        """Returns the slots to plan for: all that are running, once all of them wait; else none."""
        running = [slot for slot in self._slots if slot.seed is not None]
        return running if all(slot.observation is not None for slot in running) else []

    def plan(self, slots, actions):
        """Sends each slot its row of actions [B,T,A]."""
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            seeds = [slot.seed for slot, chunk in zip(slots, actions) if not np.isfinite(chunk).all()]
            raise FloatingPointError(f"the policy planned NaN or infinite actions for seeds {seeds}; evaluation stopped")
        for slot, chunk in zip(slots, actions):
            slot.observation = None
            slot.worker.send(("plan", slot.index, chunk))

    def _receive(self, kind, index, payload):
        slot = self._slots[index]
        if kind == "observation":
            slot.observation = payload
            return []
        if kind == "error":
            return self._failed(slot, payload)
        slot.seed = None
        return [payload]

    def _restart(self, worker, reason):
        worker.stop()
        worker.start()
        lost = [s for s in self._slots if s.worker is worker and s.seed is not None]
        return [record for slot in lost for record in self._failed(slot, reason)]

    def _failed(self, slot, reason):
        seed, slot.seed, slot.observation = slot.seed, None, None
        if slot.attempt < ATTEMPTS:
            self._queue.append((seed, slot.attempt + 1))
            return []
        return [Record(seed, None, 0, "", reason, 0.0, 0, np.zeros((0, 0), np.float32))]


class _Log:
    """JSON lines as records come, and a progress bar with the running success rate."""

    def __init__(self, path, label, total):
        self._file = None
        if path is not None:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w")
        self._bar = tqdm.tqdm(total=total, desc=label, unit="episode", file=sys.stderr)
        self._counts = collections.Counter()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def add(self, record):
        if self._file is not None:
            self._file.write(json.dumps(record.to_json()) + "\n")
            self._file.flush()
        self._counts[record.success] += 1
        done = self._counts[True] + self._counts[False]
        errors = f", {self._counts[None]} errors" if self._counts[None] else ""
        self._bar.set_postfix_str(f"success {self._counts[True]}/{done}{errors}")
        self._bar.update()


def _stack(observations, rows):
    """Batches observations and repeats the first to fill `rows`; rows of a batch do not see each other."""
    filled = observations + observations[:1] * (rows - len(observations))
    images = {camera: np.stack([o["images"][camera] for o in filled]) for camera in filled[0]["images"]}
    state = np.stack([o["state"] for o in filled]).astype(np.float32)
    return images, state, [o["prompt"] for o in filled]


# ---------------------------------------------------------------- simulator processes


def _work(pipe, spec, replan, max_steps, expert):
    """Runs in a simulator process: several environments, each an episode that is stepped when its plan comes."""
    envs, episodes = {}, {}
    while True:
        try:
            kind, slot, payload = pipe.recv()
        except EOFError:  # the main process is gone
            return
        try:
            if kind == "start":
                if slot not in envs:
                    envs[slot] = spec.make()
                episodes[slot] = _episode(envs[slot], payload, replan, max_steps, expert)
                payload = None
            reply = ("observation", slot, episodes[slot].send(payload))
        except StopIteration as end:
            reply = ("record", slot, end.value)
        except Exception:  # recorded as an error of this episode; the others of this process go on
            reply = ("error", slot, traceback.format_exc())
            envs.pop(slot, None)  # its state is unknown: the next episode gets a new one
        pipe.send(reply)


def _episode(env, seed, replan, max_steps, expert):
    """Generator: yields an observation whenever it needs a plan, is sent a chunk [T,A], returns the `Record`."""
    start = time.monotonic()
    prompt = env.reset(seed)["prompt"]
    queue, executed, success, done = chunking.ChunkQueue(replan), [], False, False
    while not done and len(executed) < max_steps:
        if expert:
            action = env.expert_action()
        else:
            if queue.empty:
                queue.push((yield env.observe()))
            action = queue.pop()
        executed.append(np.asarray(action, np.float32))
        _, success, done = env.step(executed[-1])
    actions = np.stack(executed)
    return Record(seed, bool(success), len(executed), prompt, None, time.monotonic() - start,
                  zlib.crc32(actions.tobytes()), actions)


def _replay(spec, record, every, size, replan):
    env = spec.make()
    cameras = list(env.reset(record.seed)["images"])
    frame_steps = sorted({*range(0, record.steps, every), record.steps})
    plan_steps = list(range(0, record.steps, replan))
    frames, observations, success = {camera: [] for camera in cameras}, [], False
    for step in range(record.steps + 1):
        if step in frame_steps:
            for camera in cameras:
                frames[camera].append(env.picture(camera, size))
        if step in plan_steps:
            observations.append(env.observe())
        if step < record.steps:
            _, success, _ = env.step(record.actions[step])
    if bool(success) != record.success:
        raise RuntimeError(
            f"seed {record.seed}: the recorded episode ended with success={record.success}, its repetition with "
            f"{bool(success)}; the environment must give the same episode for the same seed and actions")
    return {"frames": {camera: np.stack(pictures) for camera, pictures in frames.items()}, "frame_steps": frame_steps,
            "observations": observations, "plan_steps": plan_steps}
