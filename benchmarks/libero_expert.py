"""How often LIBERO's scripted expert succeeds: from stored states, and in demonstrations.

    python -m benchmarks.libero_expert --out docs/results/libero_expert.json

Nothing is rendered. From the stored initial states the expert acts undisturbed. Demonstrations are
drawn from their seeds and disturbed as `envs/record.py` disturbs them. Each task has a process of
its own. If it is killed, the same command continues.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib

import numpy as np

from benchmarks import results
from lightwam_jax import envs, interrupts
from lightwam_jax.data.caches import journal
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record
from lightwam_jax.envs.libero import env as libero
from lightwam_jax.envs.libero import files
from lightwam_jax.evaluation import report

FIRST_SEED = 2_000_000  # of the demonstrations: neither recorded nor evaluated anywhere else
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_PACKAGES = ("hf-libero", "libero", "robosuite", "mujoco")


class Blind(libero.LiberoEnv):
    """LIBERO without pictures; everything else is the same."""

    def image(self, camera, size):
        """Returns a picture without pixels, uint8 [0,0,3]."""
        return np.zeros((0, 0, 3), np.uint8)


def play(task, states, seeds, noise, assets):
    """Plays the episodes of one task; returns {"environment", "stored", "disturbed"}.

    The last two are {initial state or seed: steps until solved, None where it was not}.
    """
    suite = envs.suite("libero")
    limit = libero.PROTOCOLS["lightwam"].max_steps[files.suite_of(task)]
    found = {"stored": {}, "disturbed": {}}
    listed = [("stored", init, envs_base.EpisodeSpec(task, init, init)) for init in states]
    listed += [("disturbed", s, envs_base.EpisodeSpec(task, libero.DRAWN, s)) for s in seeds]
    env = Blind("lightwam", assets, image_size=64, rendering="fast")
    with contextlib.closing(env):
        for kind, name, episode in listed:
            push = noise if kind == "disturbed" else 0.0
            success, _, arrays = record.demonstrate(suite, env, episode, push, limit)
            found[kind][name] = len(arrays["action"]) if success else None
        return {"task": task, "environment": env.describe(), **found}


def measure(tasks, states, seeds, noise, assets, workers, path):
    """Returns what `play` returns for each task, from the journal at `path` where it is there."""
    os.environ.update(_ONE_THREAD)
    settings = dict(states=list(states), seeds=list(seeds), noise=noise, assets=assets)
    log = journal.Journal(path, settings, "give another --out")
    with contextlib.closing(log):
        done = {entry["task"]: entry for entry in log.entries}
        with concurrent.futures.ProcessPoolExecutor(
            workers, interrupts.SPAWN, max_tasks_per_child=1
        ) as pool:
            waiting = [
                pool.submit(play, task, states, seeds, noise, assets)
                for task in tasks
                if task not in done
            ]
            for future in concurrent.futures.as_completed(waiting):
                entry = json.loads(json.dumps(future.result()))
                log.add(entry)
                done[entry["task"]] = entry
                print(entry["task"], entry["stored"], entry["disturbed"], flush=True)
    return {task: done[task] for task in tasks}


def summary(found):
    """Returns {"stored", "disturbed": {suite: rate and steps}} of what `measure` returned."""
    kinds = {}
    for kind in ("stored", "disturbed"):
        suites = collections.defaultdict(list)
        for task, entry in found.items():
            suites[files.suite_of(task)] += entry[kind].values()
        kinds[kind] = {suite: _rate(steps) for suite, steps in suites.items() if steps}
    return kinds


def _rate(steps):
    solved = [count for count in steps if count is not None]
    rate = report.numbers(report.Rate(len(solved), len(steps), 0))
    return rate | {"steps": [min(solved), int(np.median(solved)), max(solved)] if solved else []}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", default="goal,spatial,object,10", help="comma separated")
    parser.add_argument("--states", type=int, default=5, help="stored initial states of each task")
    parser.add_argument("--drawn", type=int, default=5, help="demonstrations of each task")
    parser.add_argument("--noise", type=float, default=0.3, help="of the demonstrations")
    parser.add_argument("--assets", default=None, help="directory of LIBERO's meshes and textures")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", default="/tmp/libero_expert.json")
    given = parser.parse_args()
    tasks = [task for suite in given.suites.split(",") for task in files.tasks(suite)]
    tasks = [task for task in tasks if libero.has_expert(task)]
    states, seeds = range(given.states), range(FIRST_SEED, FIRST_SEED + given.drawn)
    path = pathlib.Path(f"{given.out}.partial.jsonl")
    found = measure(tasks, states, seeds, given.noise, given.assets, given.workers, path)
    environments = [entry.pop("environment") for entry in found.values()]
    if any(other != environments[0] for other in environments):
        raise RuntimeError(f"the tasks ran in different environments: delete {path}, begin anew")
    versions = {name: v for name, v in environments[0]["versions"].items() if name in _PACKAGES}
    numbers = {"environment": environments[0], "noise": given.noise, **summary(found)}
    tasks = {task: {k: entry[k] for k in ("stored", "disturbed")} for task, entry in found.items()}
    numbers |= {"steps": tasks, "versions": results.versions() | versions}
    results.write(given.out, "libero_expert", numbers)
    path.unlink()


if __name__ == "__main__":
    interrupts.guard(main, "tasks that are finished are kept: run the same command again")
