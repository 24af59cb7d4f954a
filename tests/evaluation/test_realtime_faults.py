"""The real server, client and clock with a network that fails. No speed is asserted."""

import math
import types

import numpy as np
import pytest

from lightwam_jax.evaluation import realtime_faults as faults
from lightwam_jax.evaluation import suites as suites_lib
from tests.evaluation import test_rollout as fakes
from tests.evaluation.test_realtime import setting
from tests.evaluation.test_remote import Walker

DT, STEPS = 0.02, 30


@pytest.fixture(scope="module")
def port():
    with faults.served(Walker()) as port:
        yield port


def run(port, name, steps=STEPS):
    fault = next(each for each in faults.faults(DT) if each.name == name)
    how = setting(trained_steps=8, full_steps=8)
    episode = fakes.episodes(3)[0]
    return faults.run(port, fakes.FakeEnv(), episode, how, 4, DT, fault, steps)


@pytest.mark.parametrize("name", ["none", "delay", "jitter", "cut", "half-open"])
def test_what_reaches_the_robot_is_right_whatever_the_network_does(port, name, monkeypatch):
    monkeypatch.setattr(faults, "HOLD_S", 2.0)  # patient: other programs may run here
    steps = 100 if name == "half-open" else STEPS  # a second passes until the client gives it up
    found = run(port, name, steps)
    assert not found.wrong and found.stalled_s is None
    assert found.solved or found.steps + found.holds == steps
    assert found.connections > 1 or name not in ("cut", "half-open")


def test_a_server_that_is_gone_is_reported(port, monkeypatch):
    monkeypatch.setattr(faults, "HOLD_S", 0.3)
    found = run(port, "gone")
    assert not found.wrong and found.stalled_s >= 0.3 - DT and found.holds > 2
    assert faults.text_table([found]).splitlines()[1].endswith(" s")


def test_what_must_not_happen_is_noticed():
    class Playing:
        counts, source = {"requests": 1}, None

    state, outcome = Playing(), faults.Outcome("none")
    env, episode = fakes.FakeEnv(), fakes.episodes(3)[0]
    robot = faults.Robot(env, episode, state, outcome, 60, lambda: None)
    robot.observe()
    for source in ((0, 0), (0, 1), (0, 1), (0, 5)):
        state.source = source
        robot.step(np.zeros(2))
    state.counts["requests"] = 2
    robot.observe()
    for source in ((1, 0), (0, 4)):
        state.source = source
        robot.step(np.zeros(2))
    assert outcome.wrong == [
        "row 1 of plan 0 was executed twice",
        "row 5 of plan 0, 3 steps after its observation",
        "plan 0 was executed after plan 1",
    ]
    assert "wrong: none: row 1 of plan 0 was executed twice" in faults.text_table([outcome])


def test_every_fault_is_run_and_written(tmp_path, monkeypatch):
    asked = []

    def run_(port, env, episode, setting, replan, dt, fault, steps):
        asked.append((port, replan, dt, steps))
        return faults.Outcome(fault.name)

    policy = types.SimpleNamespace(config=types.SimpleNamespace(evaluation=fakes.evaluation()))
    policy.deployed = Walker
    suite = types.SimpleNamespace(env=fakes.spec(), episodes=fakes.episodes(3), fps=10)
    monkeypatch.setattr(suites_lib, "of_config", lambda config, name: suite)
    monkeypatch.setattr(faults.realtime_lib, "setting_of", lambda *arguments: setting())
    monkeypatch.setattr(faults, "run", run_)
    found = faults.evaluate(policy, "demo", tmp_path / "out")
    assert [each.fault for each in found] == [each.name for each in faults.faults(0.1)]
    assert len({port for port, *_ in asked}) == 1 and asked[0][1:] == (5, 0.1, 60)
    assert (tmp_path / "out" / "realtime_real.json").exists()
    assert math.isinf(faults.faults(0.1)[0].after_s)
