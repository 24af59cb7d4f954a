"""Pushes move the robot and stay out of what is recorded; failed episodes are replaced."""

import types

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record

SUITE = types.SimpleNamespace()  # that says nothing about disturbances


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
        SUITE, env, envs_base.EpisodeSpec("t", 0, 0), 0.3, 500
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
    record.demonstrate(SUITE, env, envs_base.EpisodeSpec("t", 0, 0), 0.0, 7)
    np.testing.assert_array_equal(env.executed, np.tile(env.wanted, (7, 1)))


class Expert:
    """Says its step in everything; `ends`: {step: (success, done)}."""

    def __init__(self, **ends):
        self.ends, self.executed = {int(k[1:]): end for k, end in ends.items()}, []

    def reset(self, episode):
        self.executed = []
        return self.observe()

    def observe(self):
        k = len(self.executed)
        return {
            "images": {"scene": np.full((1, 1, 3), k % 256, np.uint8)},
            "state": np.float32([k]),
            "prompt": "go",
        }

    def expert_action(self):
        return np.array([len(self.executed), 1.0, -1.0])

    def step(self, action):
        self.executed.append(action)
        return None, *self.ends.get(len(self.executed), (False, False))


@pytest.mark.parametrize(
    "ends, steps, success",
    [
        ({}, 60, False),
        ({"_5": (True, True)}, 5, True),
        ({"_5": (False, True)}, 5, False),
        ({"_5": (True, False)}, 60, False),
        ({"_60": (True, False)}, 60, True),
        ({"_61": (True, True)}, 60, False),
    ],
)
def test_a_demonstration_is_what_was_seen_and_what_the_expert_would_do(ends, steps, success):
    for noise in (0.0, 0.5):
        env = Expert(**ends)
        got = record.demonstrate(SUITE, env, envs_base.EpisodeSpec("a", 0, 3), noise, 60)
        assert got[:2] == (success, "go")
        arrays = got[2]
        assert arrays["state"][:, 0].tolist() == list(range(steps))
        assert arrays["scene"][:, 0, 0, 0].tolist() == list(range(steps))
        want = np.float32([[k, 1, -1] for k in range(steps)])
        np.testing.assert_array_equal(arrays["action"], want)
        pushes = np.stack(env.executed) - want
        assert not pushes[:, 2].any(), "the gripper is never disturbed"
        if not noise:
            assert not pushes.any()


def test_pushes_are_rare_last_three_steps_and_belong_to_the_episode():
    def pushes(seed, noise=0.5, steps=600):
        env = Expert()
        record.demonstrate(SUITE, env, envs_base.EpisodeSpec("a", 0, seed), noise, steps)
        return np.stack(env.executed)[:, :2] - np.float32([[k, 1] for k in range(steps)])

    found = pushes(3)
    np.testing.assert_array_equal(found, pushes(3))
    assert np.abs(found[:60] - pushes(4)[:60]).max() > 0.1
    pushed = np.abs(found).max(1) > 0
    assert 0.1 < pushed.mean() < 0.3  # 3 steps of every 12.5 or so and those between
    starts = np.flatnonzero(pushed & ~np.r_[False, pushed[:-1]])
    for start in starts[:-1]:
        np.testing.assert_allclose(found[start : start + 3], found[[start] * 3], atol=1e-4)
    assert 0.3 < np.std([found[start] for start in starts]) < 0.8
    assert np.std(pushes(3, noise=5.0)[pushed]) > 3


def test_failed_demonstrations_are_replaced_by_the_seeds_that_follow(monkeypatch):
    """Even seeds are solved; jobs are handed out ahead, and those left over count for nothing."""
    asked = []
    monkeypatch.setattr(record, "_take", lambda arrays: arrays)

    def submit(function, episode, most_steps):
        asked.append(episode)
        arrays = {name: np.full((2, 1), episode.seed) for name in ("state", "action", "scene")}
        return types.SimpleNamespace(result=lambda: (episode.seed % 2 == 0, "go", arrays))

    pool, first = types.SimpleNamespace(submit=submit), envs_base.EpisodeSpec("a", 4, 7)
    part = record._Part(first, 3, 60, False)
    found, tried = zip(*record._demonstrations(pool, part, [], 2, 20))
    assert [one.id for one in found] == ["a/4/8", "a/4/10", "a/4/12"]
    assert tried == (2, 4, 6), "7 to 12"
    assert [e.seed for e in asked] == list(range(7, 7 + len(asked))) and {
        e.init for e in asked
    } == {4}
    assert [(one.fps, one.task, set(one.images)) for one in found] == [(20.0, "go", {"scene"})] * 3
    assert found[1].state[0, 0] == 10


def test_an_expert_that_fails_too_often_ends_the_recording(monkeypatch):
    monkeypatch.setattr(record, "_take", lambda arrays: arrays)
    failed = types.SimpleNamespace(result=lambda: (False, "go", {}))
    pool = types.SimpleNamespace(submit=lambda *given: failed)
    part = record._Part(envs_base.EpisodeSpec("a", 0, 0), 5, 60, False)
    with pytest.raises(RuntimeError, match=r"solved 0 of 11 episodes of a: give less --noise"):
        list(record._demonstrations(pool, part, [], 2, 20))
