"""The embedded table-top demo behind the protocol of `evaluation/worker.py`."""

import dataclasses
import importlib.metadata

from lightwam_jax.data import demo_env, demo_expert
from lightwam_jax.evaluation import worker

TASKS = ("tabletop",)
CAMERAS = demo_env.CAMERAS
STATE = ("x", "y", "z", "gap", "held")
ACTION = ("vx", "vy", "vz", "gripper")
FPS = demo_env.FPS
ROBOT = "demo"
MOST_STEPS = demo_env.MAX_STEPS
FUMBLES = (0.004, 2)
SETTINGS = {
    "task_version": demo_env.TASK_VERSION,
    "difficulty": dataclasses.asdict(demo_env.Difficulty()),
}


def make(image_size=64, **difficulty):
    """Returns a new `DemoEnv`.

    Args:
      image_size: pixels per side of the pictures the policy sees; as recorded.
      **difficulty: fields of `demo_env.Difficulty` to change.
    """
    return DemoEnv(demo_env.TabletopEnv(image_size, demo_env.Difficulty(**difficulty)))


def episodes(tasks, count, first_seed):
    """Returns `count` episodes, of the seeds from `first_seed` on; the one task is `TASKS[0]`."""
    if unknown := sorted({*tasks} - {*TASKS}):
        raise ValueError(f"the demo has no task {', '.join(unknown)}; it has {', '.join(TASKS)}")
    return [worker.Episode(TASKS[0], 0, first_seed + i) for i in range(count)]


def disturbed_by(episode):
    """Returns the seed of the disturbances of a recorded episode."""
    return [demo_env.TASK_VERSION, episode.seed, 1]


class DemoEnv:
    """One simulated table; see `evaluation/worker.py` for what each method promises."""

    def __init__(self, env):
        self._env = env

    def reset(self, episode):
        """Starts an episode (`worker.Episode`) and returns the first observation."""
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

    def picture(self, camera, size):
        """Returns the camera's view as uint8 [size, size, 3]."""
        return self._env.render(camera, size)

    def describe(self):
        """Returns the versions that decide physics and pixels."""
        return {
            "versions": {"mujoco": importlib.metadata.version("mujoco")},
            "task_version": demo_env.TASK_VERSION,
            "renderer": "rays, in numpy",
        }
