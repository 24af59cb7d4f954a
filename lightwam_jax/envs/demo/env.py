"""The embedded table-top demo behind the protocol of `envs/base.py`."""

import dataclasses
import importlib.metadata

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import expert as demo_expert
from lightwam_jax.envs.demo import tabletop

TASKS = ("tabletop",)
CAMERAS = tabletop.CAMERAS
STATE = ("x", "y", "z", "gap", "held")
ACTION = ("vx", "vy", "vz", "gripper")
FPS = tabletop.FPS
ROBOT = "demo"
MOST_STEPS = tabletop.MAX_STEPS
FUMBLES = (0.004, 2)
SETTINGS = {
    "task_version": tabletop.TASK_VERSION,
    "difficulty": dataclasses.asdict(tabletop.Difficulty()),
}


def make(image_size=64, **difficulty):
    """Returns a new `DemoEnv`.

    Args:
      image_size: pixels per side of the images the policy sees; as recorded.
      **difficulty: fields of `tabletop.Difficulty` to change.
    """
    return DemoEnv(tabletop.TabletopEnv(image_size, tabletop.Difficulty(**difficulty)))


def episodes(tasks, count, first_seed):
    """Returns `count` episodes, of the seeds from `first_seed` on; the one task is `TASKS[0]`."""
    if unknown := sorted({*tasks} - {*TASKS}):
        raise ValueError(f"the demo has no task {', '.join(unknown)}; it has {', '.join(TASKS)}")
    return [envs_base.EpisodeSpec(TASKS[0], 0, first_seed + i) for i in range(count)]


def disturbed_by(episode):
    """Returns the seed of the disturbances of a recorded episode."""
    return [tabletop.TASK_VERSION, episode.seed, 1]


class DemoEnv:
    """One simulated table; see `envs/base.py` for what each method promises."""

    def __init__(self, env):
        self._env = env

    def reset(self, episode):
        """Starts an episode (`base.EpisodeSpec`) and returns the first observation."""
        return self._env.reset(episode.seed)

    def observe(self):
        """Returns {"images": {camera: [S, S, 3] uint8}, "state": [P] float32, "prompt": str}."""
        return self._env.observe()

    def step(self, action):
        """Executes one action [A] and returns (None, success, done); nothing is rendered."""
        return (None, *self._env.step(action))

    def expert_action(self):
        """Returns the scripted expert's action [A] float32 for the present state."""
        return demo_expert.act(self._env)

    def image(self, camera, size):
        """Returns the camera's view as uint8 [size, size, 3]."""
        return self._env.render(camera, size)

    def describe(self):
        """Returns the versions that decide physics and pixels."""
        return {
            "versions": {"mujoco": importlib.metadata.version("mujoco")},
            "task_version": tabletop.TASK_VERSION,
            "renderer": "rays, in numpy",
        }
