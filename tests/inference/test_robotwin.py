"""The RoboTwin adapter against a task with RoboTwin's interface, in process and over TCP."""

import base64
import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest

from configs import base
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.data import assets, normalize
from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.inference import robotwin, safety

ROOT = pathlib.Path(__file__).parents[2]


class FakeTask:
    """What RoboTwin's tasks offer a policy; solved after `solved_after` actions."""

    def __init__(self, solved_after=1000, step_lim=50, size=(24, 32)):
        self.solved_after, self.step_lim, self.size = solved_after, step_lim, size
        self.renders, self.actions = 0, []

    def setup(self, seed):
        self.take_action_cnt, self.eval_success = 0, False
        self.joints = np.random.default_rng(seed).normal(size=14)
        self.seed = seed

    def get_instruction(self):
        return f"pick up bottle {self.seed % 2}"

    def get_obs(self):
        self.renders += 1
        rng = np.random.default_rng([self.seed, self.take_action_cnt])
        cameras = {
            f"{side}_camera": {"rgb": rng.integers(0, 256, (*self.size, 3), np.uint8)}
            for side in ("head", "left", "right", "front")
        }
        return {"observation": cameras, "joint_action": {"vector": self.joints.copy()}}

    def take_action(self, action, action_type="qpos"):
        if self.take_action_cnt == self.step_lim or self.eval_success:
            raise AssertionError("an action after the end of the episode")
        assert action_type == "qpos" and action.shape == (14,)
        self.take_action_cnt += 1
        self.joints = np.asarray(action, np.float64)
        self.actions.append(action)
        self.eval_success = self.take_action_cnt >= self.solved_after


class FakePolicy:
    """Plans 8 actions that depend on everything it is given; `seen` keeps that."""

    def __init__(self):
        data = types.SimpleNamespace(cameras=tuple(robotwin.CAMERAS), action_horizon=8)
        self.config = types.SimpleNamespace(data=data)
        self.seen = []

    def act(self, images, state, prompts):
        self.seen.append((images, state, prompts))
        pixels = sum((k + 1) * image.mean() for k, image in enumerate(images.values()))
        start = 0.5 * state[:, None] + pixels / 1e3 + len(prompts[0]) + int(prompts[0][-1])
        return np.float32(start + np.arange(8)[None, :, None] / 10)


def run(task, model, seeds=(3,)):
    """RoboTwin's loop over episodes; `robotwin` stands for the policy's package."""
    for seed in seeds:
        task.setup(seed)
        robotwin.reset_model(model)
        while task.take_action_cnt < task.step_lim:
            observation = task.get_obs()
            before = task.take_action_cnt
            robotwin.eval(task, model, observation)
            assert task.take_action_cnt > before, "eval has to act"
            if task.eval_success:
                break
    return np.stack(task.actions)


@pytest.fixture
def served():
    """(policy, connected client) of a server in a thread."""
    policy = FakePolicy()
    server = robotwin.Server(robotwin.Model(policy, replan_steps=6), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    client = robotwin.get_model({"port": server.server_address[1]})
    yield policy, client
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_plan_is_executed_without_looking_and_then_made_anew():
    policy, task = FakePolicy(), FakeTask()
    actions = run(task, robotwin.Model(policy, replan_steps=6))
    assert len(actions) == 50 and len(policy.seen) == task.renders == 9  # 8 x 6, and 2 of the last
    np.testing.assert_allclose(np.diff(actions[:6, 0]), 0.1, rtol=1e-4)
    for number, (images, state, prompts) in enumerate(policy.seen[1:], start=1):
        np.testing.assert_array_equal(state[0], actions[6 * number - 1])  # where it had got to
        assert images["cam_left_wrist"].shape == (1, 24, 32, 3)
        assert prompts == ["pick up bottle 1"]


def test_each_camera_goes_to_its_place():
    task = FakeTask()
    task.setup(0)
    observation = task.get_obs()
    request = robotwin.encode_observation(observation, "x")
    for ours, theirs in (
        ("cam_high", "head"),
        ("cam_left_wrist", "left"),
        ("cam_right_wrist", "right"),
    ):
        image = observation["observation"][f"{theirs}_camera"]["rgb"]
        np.testing.assert_array_equal(request["images"][ours], image)
    assert set(request["images"]) == {"cam_high", "cam_left_wrist", "cam_right_wrist"}


def test_an_episode_that_ends_in_mid_plan_leaves_nothing_to_the_next():
    policy, task = FakePolicy(), FakeTask(solved_after=8)
    actions = run(task, robotwin.Model(policy, replan_steps=6), seeds=(3, 4, 3))
    assert len(actions) == 24 and len(policy.seen) == 6  # two plans an episode, the second cut
    np.testing.assert_array_equal(actions[:8], actions[16:])
    assert np.abs(actions[8:16] - actions[:8]).max() > 0.1


def test_both_forms_give_the_same_actions(served):
    policy, client = served
    inside = run(FakeTask(solved_after=20), robotwin.Model(FakePolicy(), replan_steps=6), (1, 2))
    outside = run(FakeTask(solved_after=20), client, (1, 2))
    np.testing.assert_array_equal(inside, outside)
    assert len(policy.seen) == 8 and policy.seen[0][0]["cam_high"].dtype == np.uint8


def test_messages_are_those_of_robotwin(served):
    """By hand, as script/eval_policy_client.py of RoboTwin writes and reads them."""
    _, client = served
    task = FakeTask()
    task.setup(0)
    request = robotwin.encode_observation(task.get_obs(), "bottle 1")

    def pack(value):
        if isinstance(value, np.ndarray):
            return {
                "__numpy_array__": True,
                "data": base64.b64encode(value.tobytes()).decode(),
                "dtype": str(value.dtype),
                "shape": value.shape,
            }
        return {k: pack(v) for k, v in value.items()} if isinstance(value, dict) else value

    with socket.create_connection(client._socket.getpeername(), 10) as connection:
        for _ in range(2):  # a connection serves many requests
            sent = json.dumps({"cmd": "get_action", "obs": pack(request)}).encode()
            connection.sendall(len(sent).to_bytes(4, "big"))
            connection.sendall(sent)
            file = connection.makefile("rb")
            reply = json.loads(file.read(int.from_bytes(file.read(4), "big")))
            result = reply["res"]
            assert result["__numpy_array__"] is True and result["shape"] == [6, 14]
            values = np.frombuffer(base64.b64decode(result["data"]), result["dtype"])
            np.testing.assert_array_equal(
                values.reshape(6, 14), robotwin.Model(FakePolicy(), 6).get_action(request)
            )


def test_errors_reach_the_simulator_and_the_server_goes_on(served):
    _, client = served
    with pytest.raises(RuntimeError, match=r"cmd is '__init__'; expected one of get_action"):
        client.call("__init__")
    with pytest.raises(RuntimeError, match="KeyError: 'images'"):
        client.call("get_action", {})
    assert client.call("reset_model") is None
    with socket.create_connection(client._socket.getpeername(), 10) as connection:
        connection.sendall((2**31).to_bytes(4, "big"))
        assert connection.recv(1) == b""  # refused
    assert client.call("reset_model") is None


def test_what_is_no_message_is_refused_in_words(served):
    _, client = served
    bad = {"__numpy_array__": True, "data": "AAAA", "dtype": "object", "shape": [1]}
    frames = [b"{", b"[1]", json.dumps({"cmd": "get_action", "obs": bad}).encode()]
    with socket.create_connection(client._socket.getpeername(), 10) as connection:
        file = connection.makefile("rwb")
        said = []
        for content in frames:
            file.write(len(content).to_bytes(4, "big") + content)
            file.flush()
            said.append(robotwin.receive(file)["error"])
    assert "the message is list" in said[1] and "dtype 'object'" in said[2]
    assert not any("Traceback" in text for text in said)


def test_a_bad_request_does_not_reach_the_policy():
    policy, task = FakePolicy(), FakeTask()
    task.setup(0)
    good = robotwin.encode_observation(task.get_obs(), "bottle 1")
    model = robotwin.Model(policy, replan_steps=6)
    bad = {
        "cam_left_wrist is no image": {"images": good["images"] | {"cam_left_wrist": [1]}},
        r"shape \[3\]; expected 14": {"state": np.zeros(3)},
        "expected 14 numbers": {"state": np.full(14, np.nan)},
        "the prompt is no text": {"prompt": 3},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            model.get_action(good | change)
    assert policy.seen == []
    limits = safety.Limits.none(14)
    limits = dataclasses.replace(limits, high=np.full(14, -100, np.float32))
    guarded = robotwin.Model(policy, 6, safety.Guard(limits, 8))
    assert (guarded.get_action(good) == -100).all()


def test_what_does_not_fit_is_refused():
    model = robotwin.Model(FakePolicy(), replan_steps=6)
    task = FakeTask()
    task.setup(0)
    observation = task.get_obs()
    observation["joint_action"]["vector"] = np.zeros(16)
    with pytest.raises(ValueError, match="16 numbers; expected 14"):
        robotwin.eval(task, model, observation)
    observation = task.get_obs()
    del observation["observation"]["left_camera"]["rgb"]
    with pytest.raises(ValueError, match="no rgb of left_camera"):
        robotwin.eval(task, model, observation)
    with pytest.raises(ValueError, match="replan_steps is 9; the policy plans 8"):
        robotwin.Model(FakePolicy(), replan_steps=9)
    with pytest.raises(ValueError, match="neither workdir"):
        robotwin.get_model({"task_name": "beat_block_hammer"})
    with pytest.raises(ValueError, match=r"key replan: since version 0\.2\.0, replan_steps"):
        robotwin.get_model({"workdir": "runs/x", "replan": 8})
    other = FakePolicy()
    other.config.data.cameras = ("scene", "wrist")
    with pytest.raises(ValueError, match="the policy sees scene, wrist"):
        robotwin.Model(other, replan_steps=6)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        with pytest.raises(ConnectionError, match="no policy answers at localhost"):
            robotwin.Client(port=free.getsockname()[1])
    bad = FakePolicy()
    bad.act = lambda images, state, prompts: np.full((1, 8, 14), np.nan)
    with pytest.raises(ValueError, match="NaN"):
        robotwin.eval(task, robotwin.Model(bad, replan_steps=6), task.get_obs())


def test_robotwins_environment_needs_numpy_only():
    code = (
        "import sys; absent = ('jax', 'flax', 'PIL', 'ml_dtypes', 'msgpack', 'websockets');"
        "sys.modules.update(dict.fromkeys(absent));"
        "from lightwam_jax.inference.robotwin import eval, get_model, reset_model;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'tqdm', 'absl'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_real_policy_drives_it():
    """A tiny model, three cameras in RoboTwin's layout, z-scores and absolute joints."""
    c = base.get_config(
        "tiny",
        dtype="float32",
        action_dim=14,
        proprio_dim=14,
        num_layers=2,
        latent_channels=8,
        lora_layers=(0, 1),
        adapter_layers=(0, 1),
    )
    c.data.update(
        cameras=tuple(robotwin.CAMERAS),
        layout="robotwin",
        canvas=(96, 80),
        text_len=32,
        num_frames=9,
        frame_stride=2,
        action_horizon=8,
    )
    c.evaluation.replan_steps = 4
    config = config_lib.from_config_dict(c)
    rng = np.random.default_rng(0)
    model = build.build_model(config.model)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config.model))
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes)
    unit = normalize.z_score(np.zeros(14), np.full(14, 0.3))
    clips = rng.integers(0, 256, (4, 5, 32, 64, 3), np.uint8)
    parts = assets.Assets(
        state=unit,
        action=unit,
        statistics={},
        text_encoder=(text_lib.HashedTextEncoder(config.model.text_dim)),
        codec=pca.PcaCodec.fit(clips, 8),
    )
    policy = policy_lib.Policy(model, params, config, parts)
    task = FakeTask(step_lim=10)
    actions = run(task, robotwin.Model(policy, config.evaluation.replan_steps))
    assert actions.shape == (10, 14) and task.renders == 3 and np.isfinite(actions).all()
    assert policy.traces == 1
