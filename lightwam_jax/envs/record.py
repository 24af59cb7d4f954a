"""Records a training set with the scripted expert of a simulated suite, as LeRobot v2.1.

    python -m lightwam_jax.envs.record --suite metaworld --tasks reach-v3,push-v3 \\
        --episodes 100 --out data/metaworld/episodes

Only episodes that the expert solves are kept; the seeds that follow replace the others. So the data
depend on the flags alone, not on the number of worker processes. If it is killed, the same command
continues; if it is finished, the same command does nothing.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import threading
import zlib
from concurrent.futures import process

from absl import app, flags

from lightwam_jax import command_line, envs, interrupts

if __name__ == "__main__":  # workers import this file again, and define none
    flags.DEFINE_string("suite", None, f"One of {', '.join(envs.SUITES)}.")
    flags.DEFINE_list("tasks", ["all"], "Names of tasks, comma separated, or all.")
    flags.DEFINE_integer("episodes", 50, "Solved episodes of each task.", lower_bound=1)
    flags.DEFINE_integer("starts", 0, "More episodes of each task, only begun.", lower_bound=0)
    flags.DEFINE_integer("start_steps", 5, "Steps kept of each of --starts.", lower_bound=1)
    flags.DEFINE_string("out", None, "Directory of the new dataset.")
    flags.DEFINE_integer(
        "first_seed", 0, "Of each task; evaluation begins at 1,000,000.", lower_bound=0
    )
    flags.DEFINE_float(
        "noise", 0.0, "Deviation of pushes; recorded actions stay clean.", lower_bound=0.0
    )
    flags.DEFINE_enum("images", "video", ["video", "png"], "png: without loss, larger.")
    flags.DEFINE_integer("workers", 2, "Simulator processes.", lower_bound=1)
    flags.DEFINE_string("env", "{}", 'Arguments of the suite\'s make, JSON: {"image_size": 128}.')
    flags.mark_flags_as_required(["suite", "out"])
    command_line.check()

import numpy as np
import tqdm

from lightwam_jax import atomic
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.caches import journal
from lightwam_jax.data.formats import lerobot_write
from lightwam_jax.envs import base as envs_base

_PUSH, _PUSH_STEPS = 0.08, 3  # chance per step that a push begins, and how long it lasts
_PLAYED = "played"  # folder of episodes on their way from a worker to the writer
_LEAST_SOLVED = 0.3  # share of its episodes that an expert has to solve
_FIRST_START = 500_000  # added to first_seed: more episodes never reach the seeds of the starts
_ELSEWHERE = "give another --out"
# Of the workers: numpy's threads would compete with them for the cores.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def demonstrate(suite, env, episode, noise, most_steps):
    """Lets the expert play one episode, disturbed, and returns what a learner needs.

    Now and then a push of standard deviation `noise` is added to the executed motion for some
    steps. In some suites, more rarely, the gripper does the opposite. Recorded is the expert's own
    action for the state that was really reached. So the demonstrations show how to recover (as in
    DART, Laskey et al. 2017). Without noise nothing is disturbed.

    Args:
      suite: module of `envs`.
      env: see `envs/base.py`; the last dimension of its actions is the gripper.
      episode: `base.EpisodeSpec`; it also decides the disturbances.
      noise: in units of the action. most_steps: where an unsolved episode ends.

    Returns:
      (success, instruction, {"state" [n,P] f32, "action" [n,A] f32, camera: uint8 [n,H,W,3]})
    """
    rng = np.random.default_rng(getattr(suite, "disturbed_by", _disturbed_by)(episode))
    fumbles, fumble_steps = getattr(suite, "FUMBLES", (0.0, 0))
    observation, rows = env.reset(episode), collections.defaultdict(list)
    success = done = False
    pushed = fumbling = 0  # steps that are left of a disturbance
    while not done and len(rows["action"]) < most_steps:
        if rows["action"]:
            observation = env.observe()
        action = np.asarray(env.expert_action(), np.float32)
        rows["state"].append(observation["state"])
        rows["action"].append(action)
        for camera, image in observation["images"].items():
            rows[camera].append(image)
        executed = action.copy()
        if noise > 0:
            pushed = pushed - 1 if pushed > 1 else _PUSH_STEPS * (rng.random() < _PUSH)
            if pushed == _PUSH_STEPS:
                push = rng.normal(0, noise, len(action) - 1)
            if pushed:
                executed[:-1] += push
        if noise > 0 and fumbles:
            fumbling = fumbling - 1 if fumbling > 1 else fumble_steps * (rng.random() < fumbles)
            executed[-1] *= -1 if fumbling else 1
        _, success, done = env.step(executed)
    return bool(success), observation["prompt"], {k: np.stack(row) for k, row in rows.items()}


def _disturbed_by(episode):
    return [zlib.crc32(episode.key.encode()), 1]


@dataclasses.dataclass(frozen=True)
class _Part:
    """`count` demonstrations of one task, from the seed of `first` on, of `most_steps` at most.

    start: they are kept whether solved or not.
    """

    first: envs_base.EpisodeSpec
    count: int
    most_steps: int
    start: bool


def record(
    suite,
    tasks,
    count,
    out,
    first_seed=0,
    noise=0.0,
    workers=2,
    starts=0,
    start_steps=5,
    images="video",
    **env,
):
    """Writes demonstrations of each task as a LeRobot v2.1 dataset; goes on with an unfinished one.

    First come `count` solved episodes of each task, in the order of their seeds, then the starts.

    Args:
      suite: of `envs.SUITES`. tasks: names, or ("all",). out: directory.
      first_seed: of the first episode of every task. noise: see `demonstrate`. workers: processes.
      starts: further episodes of each task, from half a million seeds later, of which only the
        first `start_steps` steps are kept.
      images: "video", or "png": without loss. **env: arguments of the suite's `make`.

    Returns:
      {task: number of episodes the expert tried}, also in `meta/recording.json`.

    Raises:
      FileExistsError: `out` is there and is no recording.
      ValueError: unknown suite, task or `images`, or a recording with other settings.
      FileNotFoundError, ImportError: the simulator or its files are missing.
      RuntimeError: the expert fails too often, or a worker ended.
    """
    if images not in ("video", "png"):
        raise ValueError(f"images is {images!r}; expected 'video' or 'png'")
    out = os.path.normpath(out)  # a slash at the end would get into the names made of it
    module = envs.suite(suite)
    tasks = module.TASKS if tuple(tasks) == ("all",) else tasks
    listed = getattr(module, "demonstrations", module.episodes)(tasks, 1, first_seed)
    settings = dict(suite=suite, tasks=[first.task for first in listed], episodes=count)
    settings |= dict(starts=starts, start_steps=start_steps, first_seed=first_seed, noise=noise)
    settings |= dict(images=images, env=env) | getattr(module, "SETTINGS", {})
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will when read back
    if (tried := _finished(out, settings)) is not None:
        print(f"{out} is up to date", flush=True)
        return tried
    later = [dataclasses.replace(first, seed=first.seed + _FIRST_START) for first in listed]
    parts = [_Part(first, count, module.MOST_STEPS, start=False) for first in listed]
    parts += [_Part(first, starts, start_steps, start=True) for first in later if starts]
    with _pool(workers, suite, env, noise, f"{out}.partial/{_PLAYED}") as pool:
        # Before there is a directory: an environment that cannot be made leaves none behind.
        manifest = settings | {"environment": pool.submit(_describe, listed[0]).result()}
        log = journal.Journal(f"{out}.partial/journal.jsonl", manifest, _ELSEWHERE)
        with contextlib.closing(log):
            return _record(pool, module, parts, log, manifest, out, 2 * workers)


def _finished(out, settings):
    """Returns {task: tried} of a finished recording; None where there is nothing."""
    out = pathlib.Path(out)
    if not out.exists():
        return None
    about = atomic.read_json(out / "meta" / "recording.json")
    if about is None:
        raise FileExistsError(f"{out} exists and is no recording; delete it, or {_ELSEWHERE}")
    found = ("tried", "seeds", "environment")
    there = {key: value for key, value in about.items() if key not in found}
    journal.refuse_others(out, there, settings, _ELSEWHERE)
    (out / "journal.jsonl").unlink(missing_ok=True)  # it is there after a kill at the very end
    return about["tried"]


def _record(pool, module, parts, log, manifest, out, ahead):
    """Writes what the journal does not have yet, and then meta/; returns {task: tried}."""
    growing = pathlib.Path(f"{out}.partial")
    if not log.entries:  # nobody knows how the files that may be there were recorded
        for folder in ("data", "videos"):
            shutil.rmtree(growing / folder, ignore_errors=True)
    shutil.rmtree(growing / _PLAYED, ignore_errors=True)
    os.makedirs(growing / _PLAYED)
    writer = lerobot_write.Writer(
        growing,
        cameras=module.CAMERAS,
        videos=manifest["images"] == "video",
        robot_type=module.ROBOT,
        names={"observation.state": list(module.STATE), "action": list(module.ACTION)},
        entries=[line["entry"] for line in log.entries],
    )
    seeds, tried = collections.defaultdict(list), {}
    total, there = sum(part.count for part in parts), len(log.entries)
    with tqdm.tqdm(total=total, initial=there, desc="demonstrations", unit="episode") as bar:
        for number, part in enumerate(parts):
            done = [line["tried"] for line in log.entries if line["part"] == number]
            for episode, after in _demonstrations(pool, part, done, ahead, module.FPS):
                log.add({"part": number, "tried": after, "entry": writer.add(episode)})
                done.append(after)
                bar.update()
            seeds[part.first.task].append([part.first.seed, done[-1]])
            if not part.start:
                tried[part.first.task] = done[-1]
    writer.finish()
    about = manifest | {"tried": tried, "seeds": seeds}
    atomic.write_json(growing / "meta" / "recording.json", about)
    shutil.rmtree(growing / _PLAYED)
    os.rename(growing, out)
    os.remove(pathlib.Path(out, "journal.jsonl"))
    return tried


def _demonstrations(pool, part, done, ahead, fps):
    """Yields the missing ones of a part by seed: (`ArrayEpisode`, how many were tried up to it).

    Args:
      done: how many were tried up to each of those that are there. ahead: played at once.
    """
    kept, tried = len(done), max(done, default=0)
    waiting, seed = collections.deque(), part.first.seed + tried
    while kept < part.count:
        while len(waiting) < min(ahead, part.count - kept):
            episode = dataclasses.replace(part.first, seed=seed)
            waiting.append((episode, pool.submit(_demonstrate, episode, part.most_steps)))
            seed += 1
        episode, played = waiting.popleft()
        success, prompt, file = played.result()
        arrays, tried = _take(file), tried + 1
        if success or part.start:
            kept += 1
            state, actions = arrays.pop("state"), arrays.pop("action")
            key, fps = episode.key, float(fps)
            yield episodes_lib.ArrayEpisode(key, fps, prompt, state, actions, arrays), tried
        elif kept + 3 < _LEAST_SOLVED * tried:
            raise RuntimeError(
                f"the expert solved {kept} of {tried} episodes of {episode.task}: "
                "give less --noise, or leave the task out"
            )


# ---- worker processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(workers, suite, env, noise, played):
    """Gives processes that play; RuntimeError where one of them ends."""
    pool = concurrent.futures.ProcessPoolExecutor(  # a fork would share the simulator's state
        workers, interrupts.SPAWN, _begin, (suite, env, noise, played)
    )
    try:
        yield pool
    except process.BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process ended (killed, or out of memory?); what is finished is kept: "
            "the same command continues, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(suite, env, noise, played):
    global _suite, _noise, _make, _played  # of this worker process
    _suite, _noise, _played = envs.suite(suite), noise, played
    # Made by the first job, whose error reaches the main process; one in here would not.
    _make = functools.cache(envs.spec(suite, **env).make)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A worker of a killed main process would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _demonstrate(episode, most_steps):
    """Plays an episode; returns (success, instruction, file of its arrays).

    The arrays do not go through the pipe: a process that is killed in the middle of a long answer
    would leave the main process waiting for the rest.
    """
    success, prompt, arrays = demonstrate(_suite, _make(), episode, _noise, most_steps)
    file = os.path.join(_played, f"{episode.seed}_{os.getpid()}.npz")
    np.savez(file, **arrays)
    return success, prompt, file


def _take(file):
    """Returns the arrays of an episode, {name: array}, and removes their file."""
    with np.load(file) as stored:
        arrays = dict(stored)
    os.remove(file)
    return arrays


def _describe(episode):
    env = _make()
    env.reset(episode)
    return env.describe()


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; tasks go into --tasks")
    given = flags.FLAGS
    os.environ.update(_ONE_THREAD)
    names = ("first_seed", "noise", "workers", "starts", "start_steps", "images")
    options = {name: given[name].value for name in names}
    command_line.check_new(given.out, "--out")
    try:
        env = envs.parse_arguments(given.env)
        tried = record(given.suite, given.tasks, given.episodes, given.out, **options, **env)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        command_line.fail(error)
    for task, n in tried.items():
        print(f"{task:<30}  {given.episodes} kept of {n} that the expert tried")
    print(f"the dataset is {given.out}")


if __name__ == "__main__":
    command_line.run(main)
