import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from lightwam_jax import config as config_lib
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import metaworld
from lightwam_jax.evaluation import episode_log, rollout, worker


class FakeEnv:
    """Reach a seeded 2-D goal. `crash`: {seed: how}; `marks`: where each crash leaves a file."""

    def __init__(self, crash=None, marks=None):
        self.crash, self.marks = crash or {}, marks
        self.renders = 0

    def reset(self, episode):
        seed = episode.seed
        rng = np.random.default_rng(seed)
        self.seed, self.position, self.goal = (
            seed,
            np.zeros(2, np.float32),
            rng.uniform(-1, 1, 2).astype(np.float32),
        )
        self.steps = 0
        return self.observe()

    def observe(self):
        self.renders += 1
        image = np.full((4, 4, 3), 128 + 100 * self.goal.mean(), np.uint8)
        return {
            "images": {"scene": image, "wrist": image},
            "state": np.concatenate([self.position, self.goal]),
            "prompt": f"goal {self.seed % 3}",
        }

    def expert_action(self):
        return np.clip(self.goal - self.position, -0.1, 0.1)

    def step(self, action):
        self.steps += 1
        if self.steps == 3 and self.seed in self.crash:
            self._crash(self.crash[self.seed])
        self.position = self.position + action
        success = bool(np.abs(self.position - self.goal).max() < 0.05)
        return None, success, success

    def image(self, camera, size):
        return np.full((size, size, 3), self.steps, np.uint8)

    def _crash(self, how):
        mark = pathlib.Path(self.marks) / str(self.seed)
        first = not mark.exists()
        mark.touch()
        if how == "always" or (how == "once" and first):
            raise RuntimeError(f"simulator blew up on {self.seed}")
        if how == "kill" or (how == "die" and first):
            os._exit(3)
        if how == "hang":
            time.sleep(60)
        if how == "import":
            raise RuntimeError("jax is imported" if "jax" in sys.modules else "jax is not imported")


def policy(images, state, prompts):
    """Walks to the goal with a step that shrinks where the mean pixel is dark: uses every input."""
    assert {i.shape[0] for i in images.values()} == {len(state), len(prompts)} == {4}, (
        "one fixed batch"
    )
    step = 0.02 + 0.08 * images["scene"].mean((1, 2, 3), keepdims=True)[:, 0, :, 0] / 255
    return np.repeat(np.clip(state[:, None, 2:] - state[:, None, :2], -1, 1) * step[:, None], 12, 1)


def evaluation(**changes):
    values = dict(
        suite="",
        tasks=(),
        env={},
        episodes=9,
        first_seed=0,
        replan_steps=5,
        max_steps=60,
        workers=2,
        batch=4,
        videos=1,
    )
    return config_lib.EvaluationConfig(**{**values, **changes})


def spec(**kwargs):
    return envs_base.EnvSpec("tests.evaluation.test_rollout:FakeEnv", kwargs)


def episodes(*seeds):
    return [envs_base.EpisodeSpec("goal", 0, seed) for seed in seeds]


NINE = episodes(*range(9))


def numbers(found):
    return [(r.episode, r.success, r.steps, r.prompt, r.error, r.checksum) for r in found]


@pytest.fixture(scope="module")
def expected():
    """Of `NINE`, played here without the code under test: 5 of 12 planned steps, at most 60."""
    found = []
    for episode in NINE:
        env, executed, success = FakeEnv(), [], False
        seen = env.reset(episode)
        while not success and len(executed) < 60:
            images = {camera: np.stack([image] * 4) for camera, image in seen["images"].items()}
            (plan, *_) = policy(images, np.stack([seen["state"]] * 4), [seen["prompt"]] * 4)
            for action in plan[:5]:
                executed.append(action.astype(np.float32))
                _, success, _ = env.step(executed[-1])
                if success or len(executed) == 60:
                    break
            seen = env.observe()
        digest = zlib.crc32(np.stack(executed).tobytes())
        prompt = f"goal {episode.seed % 3}"
        found.append((episode, success, len(executed), prompt, None, digest))
    return found


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    log = tmp_path_factory.mktemp("rollout") / "episodes.jsonl"
    return rollout.run(policy, spec(), NINE, evaluation(), log, {"policy": "a"}), log


def test_each_episode_once_and_logged_as_it_comes(two_workers, expected):
    results, log = two_workers
    assert numbers(results) == expected
    assert {r.success for r in results} == {True, False}, (
        "the fake should tell good episodes from bad ones"
    )
    assert {r.steps for r in results if not r.success} == {60}
    first, *lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert first == {"manifest": {"policy": "a"}}
    assert sorted(line["seed"] for line in lines) == list(range(9))
    again = {r.episode: r for r in map(worker.EpisodeResult.from_json, lines)}
    for result in results:
        assert again[result.episode] == result
        np.testing.assert_array_equal(again[result.episode].actions, result.actions)


@pytest.mark.parametrize("workers", [1, 4])
def test_results_do_not_depend_on_the_number_of_workers(expected, workers):
    results = rollout.run(policy, spec(), NINE, evaluation(workers=workers))
    assert numbers(results) == expected


def test_results_do_not_depend_on_the_other_episodes(expected):
    results = rollout.run(policy, spec(), episodes(5, 2), evaluation(workers=3))
    assert numbers(results) == [expected[5], expected[2]]


def test_a_killed_evaluation_continues(tmp_path, expected):
    """SIGKILL in the middle, half a line at the end of the log, then the same command again."""
    log = tmp_path / "log.jsonl"
    code = (
        "import sys, time; from tests.evaluation.test_rollout import *\n"
        "def slow(*batch):\n    time.sleep(0.1)\n    return policy(*batch)\n"
        "rollout.run(slow, spec(), NINE, evaluation(), sys.argv[1], {'policy': 'a'})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(log)],
        cwd=pathlib.Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = log.read_bytes()
    there = there[: there.rfind(b"\n") + 1]
    assert 3 <= there.count(b"\n") < 10, "it was not killed in the middle"
    log.write_bytes(there + there.splitlines()[1][:50])
    asked = []

    def counting(images, state, prompts):
        asked.append(len(prompts))
        return policy(images, state, prompts)

    results = rollout.run(counting, spec(), NINE, evaluation(), log, {"policy": "a"})
    assert numbers(results) == expected and asked
    assert log.read_bytes().startswith(there) and log.read_bytes().count(b"\n") == 10
    asked.clear()
    finished = rollout.run(counting, spec(colour="red"), NINE, evaluation(), log, {"policy": "a"})
    assert numbers(finished) == numbers(results) and not asked, "nothing was left to run"


def test_logs_of_other_evaluations_are_refused(tmp_path, two_workers):
    log = tmp_path / "log.jsonl"
    log.write_bytes(two_workers[1].read_bytes())
    with pytest.raises(ValueError, match=r"policy: 'a' there, 'b' now"):
        rollout.run(policy, spec(), NINE, evaluation(), log, {"policy": "b"})
    open_one = episode_log.EpisodeLog(log, {"policy": "a"})
    with pytest.raises(ValueError, match="being written by another"):
        rollout.run(policy, spec(), NINE, evaluation(), log, {"policy": "a"})
    open_one.close()
    log.write_text(
        log.read_text(encoding="utf-8").replace('"actions": "', '"actions": "AAAA', 1),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"line 2 is damaged .*do not fit their checksum"):
        rollout.run(policy, spec(), NINE, evaluation(), log, {"policy": "a"})


def test_crashes_are_errors_and_never_failures(tmp_path, expected):
    crash = {1: "once", 2: "always", 3: "kill", 4: "die", 6: "import"}
    environment = spec(crash=crash, marks=str(tmp_path))
    log = tmp_path / "log.jsonl"
    results = rollout.run(policy, environment, NINE, evaluation(), log)
    assert [r.episode.seed for r in results if r.success is None] == [2, 3, 6]
    assert "blew up on 2" in results[2].error
    assert "process died (exit code 3)" in results[3].error
    assert "jax is not imported" in results[6].error
    ran = [0, 1, 4, 5, 7, 8]  # 1 and 4 crashed once, and their second try counts
    assert numbers([results[i] for i in ran]) == [expected[i] for i in ran]
    repaired = rollout.run(policy, spec(), NINE, evaluation(), log)
    assert numbers(repaired) == expected, "what could not run is tried again"


def test_a_hanging_simulator_is_given_up(tmp_path, expected):
    environment = spec(crash={1: "hang"}, marks=str(tmp_path))
    results = rollout.run(policy, environment, episodes(0, 1, 2), evaluation(), timeout=5.0)
    assert "silent for 5 s" in results[1].error
    assert numbers([results[0], results[2]]) == [expected[0], expected[2]]


def test_expert_runs_through_the_same_engine_and_replays():
    results = rollout.run(None, spec(), episodes(0, 1, 2), evaluation())
    assert all(r.success for r in results)
    for result in results:  # a tenth per step and dimension, until 0.05 are left
        goal = np.random.default_rng(result.episode.seed).uniform(-1, 1, 2)
        assert result.steps == np.ceil((np.abs(goal).max() - 0.05) / 0.1)
    videos = rollout.replay(spec(), results, every=4, size=6, replan_steps=5)
    for result, video in zip(results, videos):
        shown = video["frames"]["wrist"][:, 0, 0, 0].tolist()
        assert shown == sorted({*range(0, result.steps + 1, 4), result.steps})
        assert video["frames"]["wrist"].shape[1:] == (6, 6, 3)
        assert len(video["observations"]) == -(-result.steps // 5)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="1 of 3 are repeated"):
        rollout.run(policy, spec(), episodes(1, 1, 2), evaluation())
    with pytest.raises(
        RuntimeError, match=r"none of the 1 episodes could be run(.|\n)*unexpected keyword"
    ):
        rollout.run(policy, spec(colour="red"), episodes(1), evaluation())
    with pytest.raises(FloatingPointError, match=r"for episodes goal/0/1"):
        rollout.run(
            lambda images, state, prompts: np.full((4, 12, 2), np.nan),
            spec(),
            episodes(1),
            evaluation(),
        )


def test_suites_name_their_episodes():
    found = metaworld.episodes(("MT10", "reach-v3"), 2, 7)
    assert len(found) == len(set(found)) == 20
    assert found[1] == envs_base.EpisodeSpec("reach-v3", 0, 8) and found[1].key == "reach-v3/0/8"
    assert envs_base.EpisodeSpec.from_json(json.loads(json.dumps(found[1].to_json()))) == found[1]
    with pytest.raises(ValueError, match="no task reach-v2"):
        metaworld.episodes(("reach-v2",), 1, 0)
