"""Pushes move the robot and stay out of what is recorded."""

import types

import numpy as np

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record


class Env:
    """An expert that always wants the same; `executed` keeps what was done."""

    def __init__(self):
        self.wanted, self.executed = np.float32([0.5, -0.5, 1]), []

    def reset(self, episode):
        return self.observe()

    def observe(self):
        image = np.full((2, 2, 3), len(self.executed), np.uint8)
        state = np.float32([len(self.executed)])
        return {"images": {"scene": image}, "state": state, "prompt": "go"}

    def expert_action(self):
        return self.wanted.copy()

    def step(self, action):
        self.executed.append(action.copy())
        return None, len(self.executed) == 200, len(self.executed) == 200


def test_recorded_actions_are_the_experts_and_executed_ones_are_not():
    env = Env()
    success, prompt, rows = record.demonstrate(
        types.ModuleType("suite"), env, envs_base.EpisodeSpec("t", 0, 0), 0.3, 500
    )
    assert success and prompt == "go" and len(rows["action"]) == 200
    np.testing.assert_array_equal(rows["action"], np.tile(env.wanted, (200, 1)))
    pushes = np.stack(env.executed) - env.wanted
    assert 0.05 < (pushes[:, :2] != 0).any(axis=1).mean() < 0.5
    np.testing.assert_array_equal(pushes[:, 2], 0)  # the gripper is never disturbed
    assert rows["state"][:, 0].tolist() == list(range(200))
    assert rows["scene"][:, 0, 0, 0].tolist() == list(range(200))


def test_without_noise_the_expert_is_obeyed():
    env = Env()
    record.demonstrate(types.ModuleType("suite"), env, envs_base.EpisodeSpec("t", 0, 0), 0.0, 7)
    np.testing.assert_array_equal(env.executed, np.tile(env.wanted, (7, 1)))
