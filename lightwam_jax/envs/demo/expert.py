"""The scripted expert of the demo task: a function of the present state, with no hidden phase.

Approach and delivery are funnels: the height it wants depends on how far off it is sideways, and
how fast it may go sideways depends on how far it is from that height. A policy that sees the
images and feels the gripper can therefore infer each action, and what went wrong is tried again.
"""

import numpy as np

from lightwam_jax.envs.demo import scene as scene_lib

_GRASP = 0.028  # height of the hand when it closes
_HOVER = 0.095  # ... when it crosses the table, empty or loaded: clears every object
_RELEASE = 0.046  # ... when it lets go over the tray
_GAIN = 0.55  # share of an error that one control step removes
_STEP = scene_lib.SPEED / scene_lib.FPS  # metres per control step at full speed


def act(env, target=None):
    """Returns the expert's action for the present state of a `TabletopEnv`.

    Args:
      target: index of the object to deliver; None: the one that the instruction names.

    Returns:
      [4] float32 in -1..1.
    """
    target = env.scene.target if target is None else target
    if env.held(target):
        return _deliver(env)
    if env.inside(target):
        return np.array([0, 0, 1, -1], np.float32)  # let go, out of the way
    return _grasp(env, env.place(target))


def _towards(error, height_error, sideways):
    """Velocity towards a point; `sideways` (0..1) throttles the horizontal part."""
    flat = error / _STEP * _GAIN
    speed = np.linalg.norm(flat)
    flat = flat * sideways / max(speed, 1.0)
    return np.array([*flat, np.clip(height_error / _STEP * _GAIN, -1, 1)])


def _grasp(env, place):
    hand = env.hand
    error = place[:2] - hand[:2]
    off = np.linalg.norm(error)
    # Wide at the bottom: the fingers forgive two centimetres, so the images need not be read
    # to the millimetre to know how high to be and when to close.
    height = _GRASP + np.clip((off - 0.015) * 2.5, 0, _HOVER - _GRASP)
    sideways = np.clip(1 - (height - hand[2] - 0.01) / 0.03, 0, 1)
    # Once the fingers move, small disturbances must not make them hesitate.
    closing = env.gap < scene_lib.OPENING - 0.006
    reach, depth = (0.026, 0.018) if closing else (0.02, 0.012)
    near = max(off / reach, (hand[2] - _GRASP) / depth)
    grip = np.clip((1 - near) * 4, -1, 1)
    return np.array([*_towards(error, height - hand[2], sideways), grip], np.float32)


def _deliver(env):
    hand = env.hand
    error = np.asarray(env.scene.tray) - hand[:2]
    off = np.linalg.norm(error)
    height = _RELEASE + np.clip((off - 0.028) * 2.5, 0, _HOVER - _RELEASE)
    sideways = np.clip((hand[2] - _GRASP - 0.012) / 0.04, 0, 1)
    near = max(off / 0.035, (hand[2] - _RELEASE) / 0.012)
    grip = np.clip((near - 1) * 4, -1, 1)
    return np.array([*_towards(error, height - hand[2], sideways), grip], np.float32)
