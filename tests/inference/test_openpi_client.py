"""openpi's client as it is published, in an interpreter of its own, asks the policy server.

`make setup-client` makes that interpreter.
"""

import json
import pathlib
import threading
import time

import numpy as np
import pytest

from benchmarks import openpi_client
from lightwam_jax.envs.demo import tabletop
from lightwam_jax.inference import wire
from tests import served as served_lib
from tests.inference.test_server import FRAME_POLICIES
from tests.served import StandIn, observe, plan, serving, wanted

ROOT = pathlib.Path(__file__).parents[2]
FRAMES = ROOT / "tests" / "serving"
PYTHON = ROOT / ".venv-client" / "bin" / "python"
# Also none where the interpreter is too new for numpy below 2 and nothing could be installed.
INSTALLED = list(PYTHON.parents[1].glob("lib/python*/site-packages/openpi_client-*.dist-info"))

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(not INSTALLED, reason="no openpi-client: make setup-client"),
]


class Asking:
    """A body that only gives observations; keeps what the client made of each."""

    def __init__(self, observations):
        self._left, self.found, self.metadata, self.waited_s = list(observations), [], None, None
        self.begun = threading.Event()

    def __call__(self, asked):
        kind = asked.pop("ask")
        if kind == "begin":
            self.begun.set()
        elif kind == "connected":
            self.metadata, self.waited_s = asked["metadata"], asked["waited_s"]
        elif kind == "next":
            return {"observation": self._left.pop(0) if self._left else None}
        else:
            self.found.append(asked.get("reply", asked.get("text")))
        return {}


def ask(running, observations, **options):
    body = Asking(observations)
    openpi_client.run(PYTHON, running.url, body, timeout_s=60, **options)
    return body


def test_the_client_is_the_one_that_the_frames_were_made_with():
    made_by = json.loads((FRAMES / "fixtures.json").read_text(encoding="utf-8"))["made_by"]
    wanted_name = f"openpi_client-{made_by['openpi-client']}.dist-info"
    assert [path.name for path in INSTALLED] == [wanted_name]


@pytest.mark.parametrize("cameras, width", sorted({each[:2] for each in FRAME_POLICIES.values()}))
def test_every_frame_s_observation_is_answered(cameras, width):
    names = [name for name, each in FRAME_POLICIES.items() if each[:2] == (cameras, width)]
    sent = [wire.decode((FRAMES / f"{name}.bin").read_bytes()) for name in names]
    policy = StandIn(served_lib.config(cameras, state=width))
    with serving(policy, default_prompt="do something") as running:
        body = ask(running, sent)
    assert body.metadata == running.service.described
    assert len(body.found) == len(names)
    for observation, reply in zip(sent, body.found):
        images, state = taken_apart(observation, cameras)
        prompt = observation.get("prompt", "do something")
        np.testing.assert_array_equal(reply["actions"], plan(images, state, prompt))
        assert reply["actions"].dtype == np.float32
        assert reply.get("step") == observation.get("step")


def taken_apart(observation, cameras):
    """({camera: uint8 [h,w,3]}, state) of what openpi's clients send."""
    if "images" in observation:  # ALOHA, channels first
        images = {camera: observation["images"][camera].transpose(1, 2, 0) for camera in cameras}
        return images, observation["state"]
    images = {camera: observation[f"observation/{camera}"] for camera in cameras}
    if "observation/state" in observation:
        return images, observation["observation/state"]
    parts = ("observation/joint_position", "observation/gripper_position")
    return images, np.concatenate([observation[part] for part in parts])


def test_after_a_refusal_the_client_goes_on():
    with serving() as running:
        body = ask(running, [observe(1), observe(2) | {"state": np.zeros(3)}, observe(3)])
    first, refused, third = body.found
    np.testing.assert_array_equal(first["actions"], wanted(observe(1)))
    assert refused.startswith("Error in inference server:\nbad_state: ")
    np.testing.assert_array_equal(third["actions"], wanted(observe(3)))


def test_a_client_that_is_there_before_the_server_is_ready_waits():
    with serving(ready=False) as running:
        body, failed = Asking([observe(4)]), []

        def robot():
            try:
                openpi_client.run(PYTHON, running.url, body, timeout_s=60)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=robot)
        thread.start()
        assert body.begun.wait(60)
        time.sleep(1.0)
        assert thread.is_alive() and body.metadata is None and not running.policy.calls
        running.call(running.server.ready)
        thread.join(60)
    assert not failed and body.waited_s > 0.5
    np.testing.assert_array_equal(body.found[0]["actions"], wanted(observe(4)))


class Recorded(tabletop.TabletopEnv):
    """Keeps what it showed."""

    def __init__(self):
        super().__init__(16)
        self.shown = []

    def observe(self):
        self.shown.append(super().observe())
        return self.shown[-1]


def test_the_broker_plays_each_plan_s_first_actions_in_order():
    env, episodes = Recorded(), tabletop.episodes(tabletop.TASKS, 1, 0)
    body = openpi_client.Body(env, episodes, most_steps=10)
    with serving() as running:
        openpi_client.run(PYTHON, running.url, body, episodes=1, replan_steps=4, timeout_s=60)
    shown = env.shown[1:]  # without that of the reset
    plans = [plan(o["images"], o["state"], o["prompt"]) for o in shown[::4]]
    assert len(shown) == 10 and len(running.policy.calls) == 3
    expected = np.concatenate([chunk[:4] for chunk in plans])[:10]
    np.testing.assert_array_equal(np.stack(body.actions[episodes[0]]), expected)


class Expert(StandIn):
    """Plans what the scripted expert would do now."""

    def __init__(self, env):
        super().__init__()
        self._env = env

    def act(self, images, state, prompts, return_taps=False, rows=None):
        if not state.any():  # measured at the start
            return np.zeros((len(prompts), served_lib.HORIZON, 4), np.float32)
        np.testing.assert_array_equal(state, self._env.state[None])
        return np.tile(self._env.expert_action(), (1, served_lib.HORIZON, 1))


def test_runtime_and_agent_solve_scenes_of_the_demo():
    env, episodes = tabletop.TabletopEnv(16), tabletop.episodes(tabletop.TASKS, 2, 0)
    body = openpi_client.Body(env, episodes, tabletop.MOST_STEPS)
    with serving(Expert(env)) as running:
        openpi_client.run(PYTHON, running.url, body, episodes=2, replan_steps=1, timeout_s=120)
    assert body.successes == dict.fromkeys(episodes, True)


def test_a_robot_that_fails_says_why():
    with serving() as running, pytest.raises(RuntimeError, match="bad_prompt: "):
        body = openpi_client.Body(NoPrompt(16), tabletop.episodes(tabletop.TASKS, 1, 0), 10)
        openpi_client.run(PYTHON, running.url, body, episodes=1, timeout_s=60)


class NoPrompt(tabletop.TabletopEnv):
    def observe(self):
        return {key: value for key, value in super().observe().items() if key != "prompt"}
