"""The embedded table-top demo behind the protocol of `evaluation/rollout.py`."""

from lightwam_jax.data import demo_env, demo_expert


def make(image_size=64, **difficulty):
    """Returns a new `DemoEnv`.

    Args:
      image_size: pixels per side of the pictures the policy sees; as recorded.
      **difficulty: fields of `demo_env.Difficulty` to change.
    """
    return DemoEnv(demo_env.TabletopEnv(image_size, demo_env.Difficulty(**difficulty)))


class DemoEnv:
    """One simulated table; see `evaluation/rollout.py` for what each method promises."""

    def __init__(self, env):
        self._env = env

    def reset(self, seed):
        """Starts the episode of a seed and returns the first observation, with images."""
        return self._env.reset(seed)

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
