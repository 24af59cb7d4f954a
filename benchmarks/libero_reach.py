"""Does the hand follow the thing, or go to where it usually lies? Of an evaluation on LIBERO.

    python evaluate.py --workdir policies/libero_object --mode libero
    python -m benchmarks.libero_reach runs/policies/libero_object/report \\
        --out benchmarks/results/libero_reach.json

Replays the actions that `evaluate.py` recorded in its report, of episodes of object and spatial.
Where the hand is lowest before its gripper first closes, within the first 60 steps, is its reach;
the place of the thing is that of its body at the start. `follows` is the slope of the one over the
other, both less their means over the states of a task: 1 where the hand goes to the thing, 0 where
it goes to one place whatever is there. `offset_cm` is the median horizontal distance between the
two, of solved and of failed episodes; a body's middle need not be where it is grasped.
"""

import argparse
import importlib.metadata
import json
import pathlib

import numpy as np
import tqdm

from benchmarks import results
from lightwam_jax import interrupts
from lightwam_jax.envs.libero import env as libero
from lightwam_jax.evaluation import worker

STEPS = 60
OPEN = 0.5  # the gripper of a policy under the protocol "lightwam": 1 open, 0 closed


def replay(env, done):
    """Returns (thing's place, reach) of an episode, [2] metres each."""
    env.reset(done.episode)
    scene, lowest = env._env.env, None
    thing = scene.sim.data.body_xpos[scene.obj_body_id[scene.obj_of_interest[0]]][:2].copy()
    for action in done.actions[:STEPS]:
        if action[-1] < OPEN:
            break
        env.step(action)
        hand = env._raw["robot0_eef_pos"].copy()
        lowest = hand if lowest is None or hand[2] < lowest[2] else lowest
    return thing, None if lowest is None else lowest[:2]


def describe(rows):
    """Returns the numbers of [(task, success, thing [2], reach [2])]."""
    tasks = sorted({task for task, *_ in rows})
    centred = {"thing": [], "reach": []}
    for task in tasks:
        of = [row for row in rows if row[0] == task]
        for name, column in (("thing", 2), ("reach", 3)):
            places = np.stack([row[column] for row in of])
            centred[name].append(places - places.mean(axis=0))
    thing, reach = (np.concatenate(centred[name]) for name in ("thing", "reach"))
    distance = lambda wanted: [
        np.linalg.norm(reach - thing) for _, success, thing, reach in rows if success == wanted
    ]
    offsets = {"solved": distance(True), "failed": distance(False)}
    return {
        "episodes": len(rows),
        "follows": round(float((thing * reach).sum() / (thing**2).sum()), 3),
        "thing_spread_cm": [round(100 * float(x), 2) for x in thing.std(axis=0)],
        "offset_cm": {
            name: round(100 * float(np.median(at)), 2) for name, at in offsets.items() if at
        },
    }


def read(path):
    """The `EpisodeResult`s of a JSON lines file of a report, in their order."""
    with path.open(encoding="utf-8") as file:
        next(file)  # the manifest
        return [worker.EpisodeResult.from_json(json.loads(line)) for line in file]


def main():
    """Replays what the report holds of the trained policy and of the expert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path, help="report directory of evaluate.py")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    env, found = libero.make("lightwam", image_size=16, rendering="fast"), {}
    for who in ("trained", "expert"):
        path = args.report / f"{who}.jsonl"
        if not path.is_file():
            parser.error(f"{path} is not there; make it with evaluate.py --mode libero")
        rows = []
        for done in tqdm.tqdm(read(path), desc=who, unit="episode"):
            thing, reach = replay(env, done)
            if reach is not None:
                rows.append((done.episode.task, done.success, thing, reach))
        found[who] = describe(rows)
        print(who, found[who])
    env.close()
    versions = results.versions() | {"mujoco": importlib.metadata.version("mujoco")}
    results.write(args.out, "libero_reach", found | {"versions": versions})


if __name__ == "__main__":
    interrupts.guard(main)
