"""The simulated suites, one module each, found by name.

A module has
  make(**kwargs)                      a new environment; see `base.py`
  episodes(tasks, count, first_seed)  [`base.EpisodeSpec`] to evaluate, `count` of each task
  demonstrations(...)                 those to record, where they are others
  has_expert(task)                    where not every task has a scripted expert
  groups(tasks)                       {name: [tasks]} that have rates of their own, if any
  TASKS                               names of the tasks that `--tasks all` means
  CAMERAS, STATE, ACTION              names: of the cameras, and of the dimensions
  FPS, MOST_STEPS, ROBOT              control steps per second, limit of an episode, robot type
and, if `envs/record.py` is to do otherwise than usual,
  disturbed_by(episode)               seed of the disturbances of an episode, not of its key
  FUMBLES                             (chance per step that the gripper does the opposite, and for
                                      how many steps)
  SETTINGS                            {name: value} that decide the data besides the flags
and can be imported where its simulator is not installed.
"""

import importlib

from lightwam_jax.envs import base as envs_base

SUITES = {
    "demo": "lightwam_jax.envs.demo.env",
    "libero": "lightwam_jax.envs.libero.env",
    "metaworld": "lightwam_jax.envs.metaworld",
}


def suite(name):
    """Returns the module of a suite; ValueError names those there are."""
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; expected one of {', '.join(SUITES)}")
    return importlib.import_module(SUITES[name])


def spec(name, **kwargs):
    """Returns the `base.EnvSpec` of a suite with the keyword arguments of its `make`."""
    return envs_base.EnvSpec(f"{suite(name).__name__}:make", kwargs)
