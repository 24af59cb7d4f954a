"""The simulated suites, one module each, found by name. An environment is: `envs/base.py`.

A suite's module can be imported where its simulator is not installed. It has
  make(**kwargs)                      returns a new environment
  episodes(tasks, count, first_seed)  `base.EpisodeSpec`s to evaluate: `count` of each task
  TASKS                               names of the tasks that `--tasks all` means
  CAMERAS, STATE, ACTION              names of the cameras, and of the dimensions
  FPS, MOST_STEPS, ROBOT              control steps per second, limit of an episode, robot type
and, where it needs them,
  has_expert(task)                    whether a task has a scripted expert; else every task has one
  groups(tasks)                       {name: [tasks]} that get success rates of their own
  demonstrations(...)                 as `episodes`, to record demonstrations from
  disturbed_by(episode)               seed of the disturbances in a demonstration
  FUMBLES                             in demonstrations: chance per step that the gripper does the
                                      opposite, and for how many steps
  SETTINGS                            {name: value} that decide demonstrations besides the flags
"""

import importlib
import inspect
import json

from lightwam_jax.envs import base as envs_base

SUITES = {
    "demo": "lightwam_jax.envs.demo.tabletop",
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
    module = suite(name)
    try:
        inspect.signature(module.make).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"the environment of suite {name!r} cannot be made: {error}") from error
    return envs_base.EnvSpec(f"{module.__name__}:make", kwargs)


def parse_arguments(text):
    """Returns the arguments of an environment, as --env gives them; ValueError: no JSON object."""
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f'--env={text}: expected JSON such as {{"image_size": 128}}')
    return arguments
