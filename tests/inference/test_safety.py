"""The guard lets nothing through that is not finite, of the right shape and within its limits."""

import json
import types

import numpy as np
import pytest

from lightwam_jax.inference import safety
from lightwam_jax.inference.arrays import WireError
from tests import served

INF = np.inf


def limits(low=(-INF,) * 3, high=(INF,) * 3, rate=(INF,) * 3, start=(-1,) * 3):
    row = lambda x: np.array(x, np.float32)
    return safety.Limits(row(low), row(high), row(rate), np.array(start))


def test_what_is_not_finite_is_never_repaired():
    guard = safety.Guard(limits(low=(0,) * 3, high=(1,) * 3), 4)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        chunk = np.full((4, 3), 0.5)
        chunk[2, 1] = value
        with pytest.raises(WireError, match=r"dimensions \[1\], steps \[2\]") as caught:
            guard.check(chunk)
        assert caught.value.code == "not_finite"
    for shape in ((3, 3), (4, 2), (4, 3, 1), (12,)):
        with pytest.raises(WireError, match=r"expected \[4, 3\]") as caught:
            guard.check(np.zeros(shape))
        assert caught.value.code == "limits"


def test_clamps_count_what_they_change():
    guard = safety.Guard(limits(low=(-1, -INF, 0), high=(1, 2, INF)), 2)
    plan, changed = guard.check(np.array([[-3.0, -30, -1], [0.5, 3, 9]]))
    np.testing.assert_array_equal(plan, np.float32([[-1, -30, 0], [0.5, 2, 9]]))
    assert plan.dtype == np.float32
    assert {kind: count.tolist() for kind, count in changed.items()} == {
        "snapped": [0, 0, 0],
        "clamped": [1, 1, 1],
        "limited": [0, 0, 0],
    }
    with pytest.raises(WireError, match=r"limits: .*\{'clamped': \[0\]\}"):
        safety.Guard(limits(high=(1, INF, INF)), 1, refuse=True).check(np.array([[2.0, 0, 0]]))
    inside = np.float32([[0.1, 0.2, 0.3]])
    plan, _ = safety.Guard(limits(high=(1, INF, INF)), 1, refuse=True).check(inside)
    np.testing.assert_array_equal(plan, inside)


def test_rates_hold_from_step_to_step_and_from_the_state():
    guard = safety.Guard(limits(rate=(1, INF, 0.5), start=(-1, -1, 1)), 4)
    chunk = np.array([[0, 0, 3], [3, 9, 3], [3, 0, 3], [2.5, 0, 3.0]])
    plan, changed = guard.check(chunk, state=np.array([7.0, 1.0]))
    np.testing.assert_allclose(plan[:, 0], [0, 1, 2, 2.5])
    np.testing.assert_allclose(plan[:, 1], chunk[:, 1])
    np.testing.assert_allclose(plan[:, 2], [1.5, 2, 2.5, 3])
    assert changed["limited"].tolist() == [2, 0, 3]
    free, _ = guard.check(chunk)  # without a state the first step is free
    np.testing.assert_allclose(free[0], chunk[0])


def test_the_limits_hold_whatever_the_rate():
    """A robot that stands beyond them is not led along them from outside."""
    guard = safety.Guard(limits(low=(-1,) * 3, high=(1,) * 3, rate=(0.1,) * 3, start=(0, 1, 2)), 4)
    for state in ([5.0, -5, 0.3], [1.05, -1.05, 1]):
        for chunk in (np.zeros((4, 3)), np.full((4, 3), 9.0), np.full((4, 3), -0.95)):
            plan, _ = guard.check(chunk, np.array(state))
            assert (np.abs(plan) <= 1).all()
            assert (np.abs(np.diff(plan, axis=0)) <= 0.1 + 1e-6).all()
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, rate = -rng.uniform(0, 3, 3), rng.uniform(1e-3, 2, 3)
        high = low + rng.uniform(0, 3, 3)
        guard = safety.Guard(limits(low, high, rate, (0, 1, -1)), 6)
        plan, _ = guard.check(rng.normal(size=(6, 3)) * 4, rng.normal(size=3) * 4)
        assert (plan >= guard.limits.low).all() and (plan <= guard.limits.high).all()


def test_grippers():
    def check(column, **gripper):
        given = safety.Gripper((0,), **gripper)
        guard = safety.Guard(limits(), len(column), given)
        plan, changed = guard.check(np.array([[x, 0.5, 0] for x in column]))
        assert (plan[:, 1] == 0.5).all()
        return plan[:, 0].tolist(), int(changed["snapped"][0])

    noise = [0.45, 0.55, 0.45, 0.65, 0.45, 0.35, 0.55]
    assert check(noise) == (pytest.approx(noise), 0)
    assert check(noise, mode="snap") == ([0, 1, 0, 1, 0, 0, 1], 7)
    assert check(noise, mode="hysteresis") == ([0, 0, 0, 1, 1, 0, 0], 7)
    assert check([1.0, 0.0], mode="hysteresis") == ([1, 0], 0)
    assert check([0.1, 0.9], mode="snap", closed_open=(1.0, -1.0)) == ([1, 1], 2)
    assert check([-0.1, 0.1], mode="snap", closed_open=(1.0, -1.0)) == ([-1, 1], 2)
    assert check([0.02, 0.5], closed_within=0.05) == ([0, 0.5], 1)
    with pytest.raises(ValueError, match="'soft' is unknown"):
        safety.Guard(limits(), 1, safety.Gripper(mode="soft"))


def test_the_same_plan_gives_the_same_result_whatever_came_before():
    guard = safety.Guard(limits(rate=(0.1, 0.3, INF)), 8, safety.Gripper((2,), mode="hysteresis"))
    chunks = np.random.default_rng(0).normal(size=(5, 8, 3))
    first = [guard.check(chunk)[0] for chunk in chunks]
    again = [guard.check(chunk)[0] for chunk in chunks[::-1]][::-1]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(guard.check(first[0])[0], first[0])


def test_limits_that_exclude_everything_are_refused():
    for wrong in (limits(low=(1, 0, 0), high=(0, 1, 1)), limits(rate=(1, 0, 1))):
        with pytest.raises(ValueError, match="exclude every action"):
            safety.Guard(wrong, 4)
    with pytest.raises(ValueError, match=r"\[1\]"):
        safety.Guard(limits(high=(1, np.nan, 1)), 4)


def test_the_trainings_range_becomes_the_robots_again():
    """Grippers 0..1 are commands again; differences to a state lie around the recorded states."""
    data = served.config(
        action_as=("absolute", "delta_state", "absolute", "absolute"),
        action_state_dims=(0, 4, 0, 0),
        gripper_dims=(3,),
        gripper_closed_open=(0.08, 0.0),
    ).data
    action = {"global_min": [-1, -0.5, 0, 0], "global_max": [1, 0.25, 10, 1]}
    state = {"global_min": [0] * 4 + [2], "global_max": [0] * 4 + [4]}
    made = safety.from_statistics(action, state, data)
    np.testing.assert_allclose(made.low, [-1.2, 1.5 - 0.275, -1, -0.008], rtol=1e-6)
    np.testing.assert_allclose(made.high, [1.2, 4.25 + 0.275, 11, 0.088], rtol=1e-6)
    assert np.isinf(made.rate).all() and made.start.tolist() == [-1, 4, -1, -1]
    # Targets that the model sees as they are start from the state that the config names.
    kinds = ("absolute", "delta", "absolute", "gripper")
    data = served.config(action_kinds=kinds, action_state_dims=(3, 0, 9, 1)).data
    made = safety.from_statistics(action, state, data)
    assert made.start.tolist() == [3, -1, -1, -1]
    assert made.low.tolist() == pytest.approx([-1.2, -0.575, -1, -0.1])


def test_a_file_of_limits(tmp_path):
    path = tmp_path / "limits.json"
    path.write_text(
        json.dumps({"low": [None, -5, "none"], "rate": [0.1, None, None]}), encoding="utf-8"
    )
    made = safety.from_file(path, limits(low=(-1,) * 3, high=(1,) * 3))
    assert made.low.tolist() == [-1, -5, -INF] and made.high.tolist() == [1, 1, 1]
    assert made.rate[0] == np.float32(0.1) and np.isinf(made.rate[1:]).all()
    assert json.loads(json.dumps(made.as_dict()))["low"] == [-1, -5, None]


def test_a_file_of_limits_that_is_none_says_where_and_why(tmp_path):
    path = tmp_path / "limits.json"
    three = "expected a list of 3, one for each action dimension"
    for wrong, message in (
        ("{", "is no JSON file"),
        ("[1]", r"the file is \[1\], 1 of them; expected a map of low, high and rate"),
        ('{"lo": []}', "the key 'lo'; expected low, high, rate and made_from"),
        ('{"low": [1]}', rf"low is \[1\], 1 of them; {three}"),
        ('{"low": []}', f"low is .*, 0 of them; {three}"),
        ('{"high": "none"}', f"high is 'none'; {three}"),
        ('{"rate": 0}', f"rate is 0; {three}"),
        ('{"rate": false}', f"rate is False; {three}"),
        ('{"low": {"0": 1}}', f"low is .*; {three}"),
        ('{"low": [1, "2", 3]}', r"low\[1\] is '2'; expected a number, null or \"none\""),
        ('{"rate": [1, true, 3]}', r"rate\[1\] is True; expected a number"),
        ('{"rate": [1, 1, [3]]}', r"rate\[2\] is \[3\], 1 of them; expected a number"),
        ('{"high": [NaN, 1, 1]}', r"high\[0\] is nan; expected a number"),
        ('{"high": [Infinity, 1, 1]}', r"high\[0\] is inf; expected a number"),
        ('{"high": [1e39, 1, 1]}', r"high\[0\] is 1e\+39; expected a number"),
        (f'{{"high": [1{"0" * 400}, 1, 1]}}', r"high\[0\] is 1000.*; expected a number"),
    ):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            safety.from_file(path, limits())
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no JSON file"):
        safety.from_file(path, limits())


def test_proposed_rates_are_taken_from_recorded_plans_and_tried_on_others():
    rng = np.random.default_rng(0)
    chunks = np.cumsum(rng.uniform(-1, 1, (2000, 8, 3)), axis=1) * (1, 2, 0)
    made = safety.propose(chunks, limits())
    np.testing.assert_allclose(made.rate[:2], (1.5, 3), rtol=0.01)
    assert np.isinf(made.rate[2])
    guard = safety.Guard(made, 8)
    share, by_dimension = safety.touched(chunks[:200], np.zeros((200, 5)), guard)
    assert share == 0 and by_dimension.tolist() == [0, 0, 0]
    wild = chunks[:200].copy()
    wild[:50, 4, 1] += 100
    share, by_dimension = safety.touched(wild, np.zeros((200, 5)), guard)
    assert share == 0.25 and by_dimension.tolist() == [0, 0.25, 0]


def test_limits_from_recorded_episodes():
    """From the training's episodes; grippers jump; tried on the episodes that were held out."""
    rng = np.random.default_rng(0)
    config = served.config(gripper_dims=(3,))

    def episode(scale=1.0):
        actions = np.cumsum(rng.uniform(-0.1, 0.1, (40, 4)), axis=0).clip(-1, 1)
        actions[:, 3] = np.arange(40) > 20
        return types.SimpleNamespace(length=40, action=actions * scale, state=np.zeros((40, 5)))

    training = [episode() for _ in range(30)]
    chunks, states = safety.recorded_plans(training[:1], 8)
    assert chunks.shape == (40, 8, 4) and states.shape == (40, 5)
    np.testing.assert_allclose(chunks[38], training[0].action[[38] + [39] * 7], rtol=1e-6)
    made, share, _ = safety.calibrate(config, served.STATISTICS, training, [episode()])
    np.testing.assert_allclose(made.rate[:3], 0.15, rtol=0.01)
    assert np.isinf(made.rate[3]) and share == 0
    assert safety.calibrate(config, served.STATISTICS, training, [episode(2.0)])[1] > 0.1
    with pytest.raises(ValueError, match=r"set config\.data\.val_fraction"):
        safety.calibrate(config, served.STATISTICS, training, [])
