"""Meta-World itself (`make setup-sim`), in processes of its own, as it is used."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from lightwam_jax import envs, interrupts
from lightwam_jax.data.formats import lerobot
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import metaworld, record
from lightwam_jax.evaluation import rollout, worker
from tests import synthetic
from tests.evaluation.test_rollout import evaluation, numbers

pytestmark = pytest.mark.sim
SPEC = envs.spec("metaworld", image_size=32)
EPISODES = metaworld.episodes(("button-press-topdown-v3", "reach-v3"), 2, 100)
SETTINGS = dict(replan_steps=4, max_steps=24, batch=3)


def policy(images, state, prompts):
    """Moves by what it sees: images, state and instruction."""
    seen = images["corner2"].mean((1, 2)) / 255 - images["gripperPOV"].mean((1, 2)) / 255
    speed = np.array([len(prompt) for prompt in prompts])[:, None] / 40
    action = np.concatenate([np.sin(9 * seen + 20 * state[:, :3]) * speed, seen[:, :1]], 1)
    return np.repeat(action[:, None], 8, 1).astype(np.float32)


class Mortal(metaworld.MetaWorldEnv):
    """Kills its process once, in the middle of an episode. `mark`: file that says it did."""

    mark = None

    def step(self, action):
        """As the original; see the class."""
        if self.mark and self._task == "reach-v3" and self._env.curr_path_length == 10:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return super().step(action)


def make_mortal(mark):
    env = metaworld.make(image_size=32)
    env.__class__ = Mortal
    env.mark = mark
    return env


@pytest.fixture(scope="module")
def one_worker():
    return rollout.run(policy, SPEC, EPISODES, evaluation(workers=1, **SETTINGS))


@pytest.mark.parametrize("workers", [2, 4])
def test_results_do_not_depend_on_the_number_of_workers(one_worker, workers):
    again = rollout.run(policy, SPEC, EPISODES, evaluation(workers=workers, **SETTINGS))
    assert numbers(again) == numbers(one_worker)
    assert len({r.checksum for r in again}) == len(EPISODES)


def test_a_worker_killed_in_mid_episode_changes_nothing(one_worker, tmp_path):
    mark = tmp_path / "killed"
    spec = envs_base.EnvSpec("tests.envs.test_metaworld:make_mortal", {"mark": str(mark)})
    again = rollout.run(policy, spec, EPISODES, evaluation(workers=2, **SETTINGS))
    assert mark.exists() and numbers(again) == numbers(one_worker)


def _play(seed_first):
    """Digest of images and states of an episode, in a process where another may have run."""
    env = metaworld.make(image_size=32)
    if seed_first is not None:
        env.reset(envs_base.EpisodeSpec("reach-v3", 0, seed_first))
        for _ in range(5):
            env.step(np.full(4, 0.7, np.float32))
    seen = [env.reset(envs_base.EpisodeSpec("push-v3", 0, 3))]
    for _ in range(12):
        env.step(env.expert_action())
        seen.append(env.observe())
    assert all(o["state"].shape == (4,) and set(o) == {"images", "state", "prompt"} for o in seen)
    frames = np.stack([np.stack([o["images"][c] for c in metaworld.CAMERAS]) for o in seen])
    return frames, np.stack([o["state"] for o in seen]), worker.describe(SPEC, EPISODES[0])


def test_an_episode_is_a_function_of_episode_and_actions():
    with interrupts.SPAWN.Pool(2) as pool:
        first, second = pool.map(_play, [None, 7], chunksize=1)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2] == second[2]
    assert first[0].std() > 20 and not np.array_equal(first[0][0], first[0][-1])
    about = json.loads(json.dumps(first[2]))
    assert about["versions"]["metaworld"] and about["renderer"] and not about["shadows"]
    assert len(about["reset_frame"]["sha256"]) == 16


def test_the_goal_is_not_in_the_state():
    """Two seeds of reach-v3 differ in the goal, and the first states agree to a millimetre."""
    with interrupts.SPAWN.Pool(1) as pool:
        states = pool.map(_first_state, [1, 2])
    np.testing.assert_allclose(states[0], states[1], atol=1e-3)


def _first_state(seed):
    return metaworld.make(image_size=32).reset(envs_base.EpisodeSpec("reach-v3", 0, seed))["state"]


def test_every_task_has_its_own_instruction_and_expert():
    from metaworld import env_dict, policies

    assert set(metaworld.INSTRUCTIONS) == set(env_dict.ALL_V3_ENVIRONMENTS)
    assert len(set(metaworld.INSTRUCTIONS.values())) == 50
    assert set(metaworld.INSTRUCTIONS) <= set(policies.ENV_POLICY_MAP)
    assert set(metaworld.SETS) == {"MT10", "MT25", "MT50"}
    for name, tasks in metaworld.SETS.items():
        assert len(tasks) == int(name.removeprefix("MT"))
        assert set(tasks) == set(getattr(env_dict, f"{name}_V3"))
    assert [e.task for e in metaworld.episodes(("MT25", "MT10"), 1, 0)] == list(env_dict.MT25_V3), (
        "each task once, in the order of Meta-World"
    )


def test_experts_are_recorded(tmp_path):
    tried = record.record(
        "metaworld",
        ("reach-v3", "button-press-topdown-v3"),
        1,
        tmp_path / "episodes",
        noise=0.3,
        image_size=32,
    )
    assert set(tried) == {"reach-v3", "button-press-topdown-v3"}
    config = synthetic.make_config(
        tmp_path,
        **{
            "data.source": "lerobot",
            "data.path": str(tmp_path / "episodes"),
            "model.action_dim": 4,
            "model.proprio_dim": 4,
        },
    )
    data = dataclasses.replace(config.data, cameras=metaworld.CAMERAS)
    found, problems = lerobot.read(dataclasses.replace(config, data=data))
    assert not problems
    assert [e.task for e in found] == [metaworld.INSTRUCTIONS[t] for t in tried]
    assert found[0].frames("corner2", [0]).shape == (1, 32, 32, 3) and found[0].fps == 80
