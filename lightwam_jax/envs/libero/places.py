"""Other places for the things of suite object, for demonstrations.

LIBERO draws each thing of a scene within a square of 2 cm. What was trained on that goes to the
square and need not see the thing. Here the things change places at random and are moved besides.
"""

import numpy as np

from lightwam_jax.envs.libero import files as libero_files

SHIFT = 0.03  # metres along x and y, at most
APART = 0.1  # metres between the middles of two things, at least: the hand's fingers pass
_TRIES = 1000


def checked(choice):
    """Returns `choice`; ValueError if it is none."""
    if choice not in ("suite", "shuffled"):
        raise ValueError(f"places is {choice!r}; expected 'suite' or 'shuffled'")
    return choice


def shuffle(env, episode):
    """Moves what is not the goal's place, by the seed of an `EpisodeSpec`; `env`: robosuite's.

    Raises:
      ValueError: of another suite, whose instructions name places. RuntimeError: there is no room.
    """
    if (suite := libero_files.suite_of(episode.task)) != "object":
        raise ValueError(f"places='shuffled' is for suite object; {episode.task!r} is of {suite!r}")
    rng = np.random.default_rng(episode.seed)
    (_, _, place), *_ = env.parsed_problem["goal_state"]
    joints = [
        thing.joints[-1]
        for name, thing in env.objects_dict.items()
        if name != place.removesuffix("_contain_region")
    ]
    states = np.stack([env.sim.data.get_joint_qpos(joint) for joint in joints])
    states[:, :2] = drawn(states[:, :2], rng)
    for joint, state in zip(joints, states):
        env.sim.data.set_joint_qpos(joint, state)
    env.sim.forward()


def drawn(places, rng):
    """Places [N,2] in another order, each moved by up to `SHIFT`, none nearer than `APART`."""
    for _ in range(_TRIES):
        moved = rng.permutation(places) + rng.uniform(-SHIFT, SHIFT, places.shape)
        distances = np.linalg.norm(moved[:, None] - moved[None], axis=-1)
        if np.all(distances[~np.eye(len(moved), dtype=bool)] >= APART):
            return moved
    raise RuntimeError(f"{len(places)} things found no places {APART} m apart in {_TRIES} tries")
