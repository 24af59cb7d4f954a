"""A control loop with a policy in another thread. Waits for events, never asserts a speed."""

import threading
import time

import numpy as np
import pytest

from lightwam_jax.inference import realtime as realtime_lib
from lightwam_jax.inference.runner import Runner

DT = 0.005


class Robot:
    """One dimension, moved by what it is sent; ends the run after `limit` actions."""

    def __init__(self, limit=None):
        self.position, self.sent, self.limit = 0.0, [], limit
        self.threads = set()

    def observe(self):
        self.threads.add(threading.current_thread().name)
        return {"state": np.array([self.position])}

    def step(self, action):
        self.threads.add(threading.current_thread().name)
        self.sent.append(np.array(action))
        self.position += float(action[0])
        return len(self.sent) == self.limit


class Client:
    """openpi's interface; moves the robot to `goal`. `script`: what else the k-th call does."""

    def __init__(self, goal=1.0, script=None):
        self.goal, self.script, self.calls = goal, script or {}, 0
        self.threads = set()

    def infer(self, observation):
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        if act := self.script.get(self.calls):
            act()
        left = self.goal - observation["state"][0]
        row = np.array([[left / 8, self.calls]], np.float32)
        return {"actions": np.repeat(row, 8, axis=0), "server_timing": {"infer_ms": 0.1}}


def make(**changes):
    values = dict(replan=4, hold_s=0.3, warn=lambda text: None) | changes
    return realtime_lib.Realtime(8, DT, ("delta", "gripper"), **values)


def test_a_client_drives_the_robot_while_it_plans():
    robot, client = Robot(limit=60), Client()
    with Runner(make(), client, robot.observe, robot.step) as runner:
        assert runner.run() == 60
    assert robot.threads == {threading.current_thread().name} and client.threads == {"policy"}
    assert len(robot.sent) == 60, "step ended the run: nothing was sent after it"
    assert abs(robot.position - 1) < 0.1
    assert len(runner.realtime.latency) > realtime_lib.PROBES
    first = int(robot.sent[0][1])
    assert first == realtime_lib.PROBES + 2, "probes and their warm-up move nothing"
    assert not runner._thread.is_alive()


def test_a_function_is_a_policy_too_and_stop_leaves_the_robot_still():
    robot = Robot()
    runner = Runner(make(), lambda seen: np.full((8, 2), 0.25), robot.observe, robot.step)
    threading.Timer(0.1, runner.stop).start()
    steps = runner.run()
    assert len(robot.sent) == steps + 1
    np.testing.assert_allclose(robot.sent[-1], [0, 0.25])
    runner.close()
    assert not runner._thread.is_alive()
    robot = Robot()
    with Runner(make(), lambda seen: np.ones((8, 2)), robot.observe, robot.step) as runner:
        assert runner.run(steps=5) == 5 and len(robot.sent) == 6


def test_errors_of_the_policy_are_asked_again_and_told(caplog):
    def fail():
        raise RuntimeError("Error in inference server")

    client = Client(script=dict.fromkeys((9, 10), fail))
    robot = Robot(limit=40)
    with Runner(make(hold_s=5), client, robot.observe, robot.step) as runner:
        runner.run()
    assert runner.realtime.counts["failed"] == 2 and len(robot.sent) == 40
    assert isinstance(runner.error, RuntimeError)
    assert caplog.text.count("Error in inference server") == 1, "the same error is told once"


def test_a_policy_that_hangs_ends_in_a_stall_with_the_robot_still():
    hang = threading.Event()
    client, robot = Client(script={9: lambda: hang.wait(20)}), Robot()
    with pytest.raises(realtime_lib.Stalled, match="holding still"):  # noqa: SIM117
        with Runner(make(), client, robot.observe, robot.step) as runner:
            threading.Timer(0.6, hang.set).start()
            runner.run()
    assert [float(action[0]) for action in robot.sent[-3:]] == [0, 0, 0]
    assert runner.realtime.counts["holds"] > 3


def test_a_stall_names_what_the_policy_raised():
    def fail():
        raise ConnectionError("server gone")

    client, robot = Client(script={n: fail for n in range(8, 1000)}), Robot()
    with Runner(make(hold_s=0.05), client, robot.observe, robot.step) as runner:
        with pytest.raises(realtime_lib.Stalled) as caught:
            runner.run()
        assert "server gone" in str(caught.value.__cause__)
    assert len(robot.sent) >= 4


def test_errors_before_the_first_motion():
    def fail():
        raise RuntimeError("no such model")

    robot = Robot()
    runner = Runner(make(), Client(script={1: fail}), robot.observe, robot.step)
    with runner, pytest.raises(RuntimeError, match="no such model"):
        runner.run()
    hang, wait = threading.Event(), dict(start_timeout_s=0.05)
    slow = Client(script={3: lambda: hang.wait(20)})
    with Runner(make(), slow, robot.observe, robot.step, **wait) as runner:
        with pytest.raises(TimeoutError, match=r"no plan within 0\.05 s"):
            runner.run()
        hang.set()
    bad = lambda seen: np.full((8, 2), np.nan)
    runner = Runner(make(), bad, robot.observe, robot.step, **wait)
    with runner, pytest.raises(TimeoutError):
        runner.run()
    assert not robot.sent


def test_stopped_while_the_latency_is_measured_nothing_moves():
    hang, robot = threading.Event(), Robot()
    client = Client(script={3: lambda: hang.wait(20)})
    with Runner(make(), client, robot.observe, robot.step) as runner:
        threading.Timer(0.1, runner.stop).start()
        began = time.monotonic()
        assert runner.run() == 0
        assert time.monotonic() - began < 10, "not the 20 s of the call, nor those of the start"
        hang.set()
    assert client.calls == 3 and not robot.sent


def test_an_error_of_the_robot_is_not_followed_by_another_step():
    sent = []

    def broken(action):
        sent.append(action)
        raise OSError("robot gone")

    runner = Runner(make(), Client(), Robot().observe, broken)
    with runner, pytest.raises(OSError, match="robot gone"):
        runner.run()
    assert len(sent) == 1


def test_each_run_is_an_episode_of_its_own():
    """A plan that was asked for in the first run arrives in the second: it is not executed."""
    gate, robot = threading.Event(), Robot()
    client = Client(script={8: lambda: gate.wait(20)})
    with Runner(make(hold_s=5), client, robot.observe, robot.step) as runner:
        runner.run(steps=6)  # the 8th call is on its way
        gate.set()
        before = len(robot.sent)
        runner.run(steps=6)
    assert {int(action[1]) for action in robot.sent[:before]} == {7}
    assert 8 not in {int(action[1]) for action in robot.sent[before:]}
    assert client.calls >= 9


def test_slow_steps_are_counted_and_not_hurried_after():
    robot = Robot(limit=6)

    def slow(action):
        time.sleep(3 * DT)
        return robot.step(action)

    with Runner(make(), Client(), robot.observe, slow) as runner:
        assert runner.run() == 6
    assert runner.overruns == 6
