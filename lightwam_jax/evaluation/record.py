"""Records a training set with the scripted expert of a simulated suite, as LeRobot v2.1.

    python -m lightwam_jax.evaluation.record --suite metaworld --tasks reach-v3,push-v3 \\
        --episodes 100 --out data/metaworld/episodes

Only episodes that the expert solves are kept; the seeds that follow replace the others. So the data
depend on the flags alone, not on the number of worker processes.
"""

import collections
import functools
import json
import multiprocessing
import pathlib
import sys
import zlib

import numpy as np
from absl import app, flags

from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import lerobot_write
from lightwam_jax.evaluation import envs, worker

_PUSH, _PUSH_STEPS = 0.08, 3  # chance per step that a push begins, and how long it lasts
_LEAST_SOLVED = 0.3  # share of its episodes that an expert has to solve


def demonstrate(env, episode, noise, most_steps):
    """Lets the expert play one episode, disturbed, and returns what a learner needs.

    Now and then a push of standard deviation `noise` is added to the executed motion for some
    steps; recorded is the expert's own action for the state really reached. So the demonstrations
    show how to recover (as in DART, Laskey et al. 2017).

    Args:
      env: see `worker.py`; the last dimension of its actions is the gripper, never disturbed.
      episode: `worker.Episode`; it also fixes the disturbances.
      noise: in units of the action. most_steps: where an unsolved episode ends.

    Returns:
      (success, instruction, {"state" [n,P] f32, "action" [n,A] f32, camera: uint8 [n,H,W,3]})
    """
    rng = np.random.default_rng([zlib.crc32(episode.key.encode()), 1])
    observation, rows, pushed = env.reset(episode), collections.defaultdict(list), 0
    success = done = False
    while not done and len(rows["action"]) < most_steps:
        if rows["action"]:
            observation = env.observe()
        action = np.asarray(env.expert_action(), np.float32)
        rows["state"].append(observation["state"])
        rows["action"].append(action)
        for camera, picture in observation["images"].items():
            rows[camera].append(picture)
        executed = action.copy()
        if noise > 0:
            pushed = max(pushed - 1, 0) or _PUSH_STEPS * bool(rng.random() < _PUSH)
            if pushed == _PUSH_STEPS:
                push = rng.normal(0, noise, len(action) - 1)
            if pushed:
                executed[:-1] += push
        _, success, done = env.step(executed)
    return bool(success), observation["prompt"], {k: np.stack(row) for k, row in rows.items()}


def record(suite, tasks, count, out, first_seed=0, noise=0.0, workers=2, **env):
    """Writes `count` solved episodes of each task as a LeRobot v2.1 data set.

    Args:
      suite: of `envs.SUITES`. tasks: names, or ("all",). out: directory, not there yet.
      first_seed: of the first episode of every task.
      noise: see `demonstrate`. workers: processes. **env: arguments of the suite's `make`.

    Returns:
      {task: number of episodes the expert tried}, also in `meta/recording.json`.

    Raises:
      FileExistsError: `out` is there.
      ValueError: unknown suite or task.
      FileNotFoundError, ImportError: the simulator or its files are missing.
      RuntimeError: the expert fails too often.
    """
    module, tried = envs.suite(suite), {}
    tasks = module.TASKS if tuple(tasks) == ("all",) else tasks
    listed = getattr(module, "demonstrations", module.episodes)(tasks, 1, first_seed)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _begin, (envs.spec(suite, **env), noise, module.MOST_STEPS)) as pool:
        pool.apply(_check)  # before there is a directory

        def solved():
            for first in listed:
                tried[first.task] = 0
                yield from _solved(pool, first, count, workers, tried, module.FPS)

        lerobot_write.write(
            solved(),
            out,
            cameras=module.CAMERAS,
            robot_type=module.ROBOT,
            names={"observation.state": list(module.STATE), "action": list(module.ACTION)},
        )
        about = {
            "suite": suite,
            "noise": noise,
            "first_seed": first_seed,
            "tried": tried,
            "environment": pool.apply(_describe),
        }
    path = pathlib.Path(out) / "meta" / "recording.json"
    path.write_text(json.dumps(about, indent=2) + "\n")
    return tried


def _solved(pool, first, count, workers, tried, fps):
    """Yields the first `count` solved episodes from `first` on, in the order of their seeds."""
    waiting, kept, seed = collections.deque(), 0, first.seed
    while kept < count:
        while len(waiting) < min(2 * workers, count - kept):
            episode = worker.Episode(first.task, first.init, seed)
            waiting.append((episode, pool.apply_async(_demonstrate, (episode,))))
            seed += 1
        episode, result = waiting.popleft()
        success, prompt, arrays = result.get()
        tried[first.task] += 1
        if success:
            kept += 1
            yield episodes_lib.ArrayEpisode(
                id=episode.key,
                fps=float(fps),
                task=prompt,
                state=arrays.pop("state"),
                action=arrays.pop("action"),
                images=arrays,
            )
        elif kept + 3 < _LEAST_SOLVED * tried[first.task]:
            raise RuntimeError(
                f"the expert solved {kept} of {tried[first.task]} episodes of "
                f"{first.task}: give less --noise, or leave the task out"
            )


def _begin(spec, noise, most_steps):
    global _make, _arguments  # of this worker process
    # An environment that cannot be made has to fail in a job: a process that dies in here is
    # replaced by the pool without end.
    _make, _arguments = functools.cache(spec.make), (noise, most_steps)


def _check():
    _make()


def _demonstrate(episode):
    return demonstrate(_make(), episode, *_arguments)


def _describe():
    return _make().describe()


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; tasks go into --tasks")
    given = flags.FLAGS
    try:
        tried = record(
            given.suite,
            given.tasks,
            given.episodes,
            given.out,
            given.first_seed,
            given.noise,
            given.workers,
            **json.loads(given.env),
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for task, n in tried.items():
        print(f"{task:<30}  {given.episodes} kept of {n} that the expert tried")
    print(f"written to {given.out}")


if __name__ == "__main__":
    flags.DEFINE_string("suite", None, f"One of {', '.join(envs.SUITES)}.")
    flags.DEFINE_list("tasks", ["all"], "Names of tasks, comma separated, or all.")
    flags.DEFINE_integer("episodes", 50, "Solved episodes of each task.", lower_bound=1)
    flags.DEFINE_string("out", None, "Directory of the new data set.")
    flags.DEFINE_integer("first_seed", 0, "Of each task; evaluation begins at 1,000,000.")
    flags.DEFINE_float("noise", 0.0, "Deviation of pushes; the recorded actions stay clean.")
    flags.DEFINE_integer("workers", 2, "Simulator processes.", lower_bound=1)
    flags.DEFINE_string("env", "{}", 'Arguments of the suite\'s make, JSON: {"image_size": 128}.')
    flags.mark_flags_as_required(["suite", "out"])
    app.run(main)
