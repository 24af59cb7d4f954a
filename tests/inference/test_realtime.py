"""Chunks that arrive late: one rule after the other, then random schedules of all at once."""

import subprocess
import sys
import types

import numpy as np
import pytest

from lightwam_jax.inference import realtime as realtime_lib
from lightwam_jax.inference.realtime import Realtime

KINDS = ("delta", "absolute", "gripper")


def make(horizon=8, dt=0.1, kinds=KINDS, probes=0.2, **changes):
    """A `Realtime` that replans every 4 steps and has measured `probes` seconds."""
    made = Realtime(horizon, dt, kinds, **{"replan": 4, "warn": lambda text: None} | changes)
    for _ in range(5 if probes is not None else 0):
        made.latency.add(probes)
    return made


def chunk(start, horizon=8, width=3):
    """Row i is start + i, in every dimension."""
    return np.repeat(start + np.arange(horizon, dtype=np.float32)[:, None], width, axis=1)


def begin(state, plan, now=0.0):
    """Asks at `now` and receives at once."""
    number = state.request(now)
    assert state.receive(number, plan, now) is True


def actions(state, times):
    return [state.action(now) for now in times]


def test_asks_when_no_more_is_left_than_a_plan_takes():
    state = make(probes=0.2)  # two steps
    begin(state, chunk(0))
    asked = []
    for step in range(4):
        asked.append(state.request(step / 10))
        state.action(step / 10)
    assert asked == [None, None, 1, None], "with two of four left, and only once"
    assert state.receive(1, chunk(100), 0.4)
    assert state.source == (0, 3) and state.action(0.4)[2] == 102 and state.source == (1, 2)


def test_latency_is_the_95_percent_quantile_of_the_last_fifty():
    state = make(probes=None)
    assert state.delay == 1, "nothing measured: one step more than nothing"
    for expected, seconds in ((2, 0.1), (2, 0.1), (2, 0.1), (2, 0.1), (1, 0.1), (4, 0.301)):
        state.latency.add(seconds)
        assert state.delay == expected, "one more step while fewer than five are measured"
    for _ in range(48):
        state.latency.add(0.3)
    assert state.latency.p95 == 0.3 and state.delay == 3, (
        "0.3 / 0.1 is 3 steps in spite of rounding"
    )
    for _ in range(3):
        state.latency.add(0.5)
    assert state.latency.p95 == 0.5 and len(state.latency) == 50


def test_a_plan_in_time_is_executed_as_it_is():
    plan = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    for splice in realtime_lib.SPLICES:
        state = make(splice=splice, probes=0.0, gripper_band=((-1,) * 3, (1,) * 3))
        for start in range(3):
            begin(state, plan + start, start)
            assert state.request(start) is None
            np.testing.assert_array_equal(actions(state, [start] * 4), plan[:4] + start)
        assert state.counts == dict.fromkeys(realtime_lib.COUNTS, 0) | {"requests": 3, "deepest": 4}


def late(state, new, steps=2, **first):
    """Executes 4 rows of a first plan, of which `steps` while the second one is on its way."""
    begin(state, first.get("plan", chunk(0)))
    done = actions(state, np.arange(4 - steps) / 10)
    number = state.request(0.2)
    done += actions(state, 0.2 + np.arange(steps) / 10)
    assert state.receive(number, new, 0.2 + steps / 10)
    return np.array(done)


def test_deltas_keep_the_displacement_that_the_new_plan_wanted():
    state, new = make(), chunk(10)
    done = late(state, new)
    rest = np.array(actions(state, [0.4] * 6))
    # Rows 0 and 1 wanted 10 + 11, executed were 2 + 3: 16 more on the next step, and only there.
    np.testing.assert_allclose(rest[:, 0], [12 + 16, 13, 14, 15, 16, 17])
    np.testing.assert_allclose(done[2:, 0].sum() + rest[:, 0].sum(), new[:, 0].sum())
    spread = make(spread=2)
    late(spread, new)
    np.testing.assert_allclose(np.array(actions(spread, [0.4] * 3))[:, 0], [20, 21, 14])


def test_what_a_limit_cuts_off_is_left_to_the_next_steps():
    state = make(limits=((-20,) * 3, (20,) * 3))
    late(state, chunk(10))
    rest = np.array(actions(state, [0.4] * 6))
    np.testing.assert_allclose(rest[:, 0], [20, 20, 15, 15, 16, 17])
    state = make(limits=((-5,) * 3, (5,) * 3))  # rows beyond the limit stay as planned
    late(state, chunk(10))
    np.testing.assert_allclose(np.array(actions(state, [0.4] * 6))[:, 0], [12, 13, 14, 15, 16, 17])
    state = make(limits=((-5,) * 3, (5,) * 3))
    late(state, chunk(-10))  # 24 too far: as much back as the limit allows
    np.testing.assert_allclose(np.array(actions(state, [0.4] * 2))[:, 0], [-8, -7])


def test_a_rate_holds_from_command_to_command_also_at_the_seam():
    state = make(rate=[2, 1.5, None])
    late(state, chunk(10))  # planned after 3: 12 + 16, 13, ...
    rest = np.array(actions(state, [0.4] * 6))
    np.testing.assert_allclose(rest[:, 0], [5, 7, 9, 11, 13, 15])
    assert (np.diff(rest[:, 1]) <= 1.5 + 1e-6).all() and rest[0, 1] == 4.5
    np.testing.assert_allclose(rest[:, 2], np.arange(12, 18))
    assert state.counts["limited"] == 6
    still = state.action(0.9)  # stops at once; from standing still it starts slowly
    np.testing.assert_allclose(still, [0, rest[-1, 1], 17])
    begin(state, chunk(100), 1.0)
    np.testing.assert_allclose(state.action(1.0), [2, rest[-1, 1] + 1.5, 100])
    state.reset()
    begin(state, chunk(100), 2.0)
    assert state.action(2.0).tolist() == [100] * 3, "nothing was sent before an episode"


def test_what_a_rate_cut_off_is_made_up_for():
    state = make(rate=[1, None, None])
    plan = chunk(0)
    plan[2:, 0] = 9  # 0, 1, then 2, 3 in place of 9, 9
    done = late(state, chunk(3), plan=plan)
    assert done[:, 0].tolist() == [0, 1, 2, 3]
    # Rows 0 and 1 wanted 3 + 4, moved were 2 + 3: 2 more on 5, and no more than 1 beyond 3.
    assert [row.action[0] for row in state._queue][:2] == [7, 6]
    assert state.action(0.4)[0] == 4


def test_without_binding_a_rate_changes_no_bit():
    plan = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    done = []
    for rate in (None, [100] * 3, [None] * 3):
        state = make(rate=rate)
        done.append(np.concatenate([late(state, plan), actions(state, [0.4] * 6)]))
        assert state.counts["limited"] == 0
    np.testing.assert_array_equal(done[0], done[1])
    np.testing.assert_array_equal(done[0], done[2])


def test_absolute_targets_fade_and_grippers_do_not():
    state, new = make(), chunk(10)
    late(state, new)  # rows 4 to 7 of the old plan are left
    rest = np.array(actions(state, [0.4] * 6))
    np.testing.assert_allclose(
        rest[:, 1], [0.25 * 12 + 0.75 * 4, 0.5 * 13 + 0.5 * 5, 0.75 * 14 + 0.25 * 6, 15, 16, 17]
    )
    np.testing.assert_allclose(rest[:, 2], [12, 13, 14, 15, 16, 17])


def test_a_gripper_is_not_moved_by_a_command_near_the_middle():
    new = chunk(0)
    new[:, 2] = [1, 1, 0.45, 0.55, 0.7, 0.5, 0.5, 0.2]
    state = make(gripper_band=((0.4,) * 3, (0.6,) * 3))
    late(state, new)
    rest = np.array(actions(state, [0.4] * 6))
    np.testing.assert_allclose(rest[:, 2], [3, 3, 0.7, 0.5, 0.5, 0.2])  # 3: the last command
    np.testing.assert_allclose(rest[3:, 0], new[5:, 0])


@pytest.mark.parametrize(
    "closing, row",
    [((0, 0, 1, 1, 1, 1, 1, 1), 2), ((0, 1, 0, 1, 1, 1, 1, 1), 3), ((1, 1, 1, 1, 1, 1, 0, 0), 0)],
)
def test_a_gripper_that_should_have_closed_closes_where_the_plan_did(closing, row):
    state = make(probes=0.3, gripper_band=((0.4,) * 3, (0.6,) * 3))
    old, new = chunk(0), chunk(10)
    old[:, 2], new[:, 2] = 0, closing
    done = late(state, new, steps=3, plan=old)
    rest = np.array(actions(state, [0.5] * (8 - row)))
    assert rest[:, 2].tolist() == list(closing)[row:] and state.source == (1, 7)
    owed = new[:row, 0].sum() - done[1:, 0].sum()
    assert rest[0, 0] == pytest.approx(new[row, 0] + owed), "from where the robot is, to there"
    np.testing.assert_allclose(rest[1:, 0], new[row + 1 :, 0])
    again = make(probes=0.3, gripper_band=((0.4,) * 3, (0.6,) * 3))
    old[:, 2] = 1  # it is closed already: nothing was missed
    late(again, new, steps=3, plan=old)
    again.action(0.5)
    assert again.source == (1, 3)


def test_other_splices():
    state = make(splice="index")
    late(state, chunk(10))
    np.testing.assert_array_equal(actions(state, [0.4] * 6), chunk(10)[2:])
    state = make(splice="append")
    late(state, chunk(10))
    np.testing.assert_array_equal(actions(state, [0.4] * 4), chunk(10)[:4])
    state = make(splice="append")
    begin(state, chunk(0))
    actions(state, [0, 0])
    state.receive(state.request(0.2), chunk(10), 0.2)  # before the old rows are executed
    np.testing.assert_array_equal(actions(state, [0.3] * 6)[1:3], [[3] * 3, [10] * 3])
    state = make(splice="sync")
    begin(state, chunk(0))
    assert [state.request(0.1 * step) for step in range(4) if state.action(0) is not None] == [
        *(None,) * 3,
        1,
    ]
    still = state.action(0.4)
    np.testing.assert_array_equal(still, [0, 3, 3])
    state.receive(1, chunk(10), 0.5)
    np.testing.assert_array_equal(actions(state, [0.5] * 4), chunk(10)[:4])
    assert state.counts["holds"] == 1 and state.counts["skipped"] == 0


def test_rows_behind_replan_are_for_plans_that_come_late():
    state = make(trained_steps=6)
    begin(state, chunk(0))
    actions(state, [0, 0])
    assert state.request(0.2) == 1
    rows = [state.action(0.3)[1] for _ in range(5)]
    assert rows == [2, 3, 4, 5, 5] and state.counts["holds"] == 1, "none behind the trained ones"
    assert state.counts["deepest"] == 6
    state.receive(1, chunk(10), 0.7)
    assert state.action(0.7)[1] == 10 + 4, "four were executed, whatever the clock says"


def test_beyond_the_trained_steps_it_replans_sooner_and_says_what_to_train():
    said = []
    state = make(trained_steps=5, warn=said.append)
    late(state, chunk(10))
    assert [row[1] for row in actions(state, [0.4] * 4)][-1] == 14 and state.action(0.5)[0] == 0
    assert state.counts["shortened"] == 1
    (text,) = said
    assert "prefix_steps=6" in text and "the 3 trained steps" in text
    state.receive(state.request(0.6), chunk(0), 0.6)
    late_again = state.request(0.6)
    assert late_again is None and len(said) == 1, "each cause is told once"
    said.clear()
    weak = make(full_steps=4, warn=said.append)
    late(weak, chunk(10))
    assert len(said) == 1 and "prefix_steps=6" in said[0] and "little weight" in said[0]
    assert weak.counts["shortened"] == 0
    said.clear()
    none = make(trained_steps=2, replan=2, probes=0.2, warn=said.append)
    begin(none, chunk(0))
    number = none.request(0)
    actions(none, [0, 0.1])
    assert none.receive(number, chunk(10), 0.2) is False and none.counts["discarded"] == 1
    assert "sync" in said[0] and none.action(0.2)[0] == 0
    assert none.request(0.3) is not None, "asks again at once"
    fresh = make(splice="sync", trained_steps=2, full_steps=1, warn=said.append)
    begin(fresh, chunk(0))
    assert len(actions(fresh, [0] * 4)) == 4 and fresh.counts["holds"] == 0 and len(said) == 1


def test_trained_steps_follow_from_the_loss():
    loss = dict(temporal_weighting=True, prefix_steps=8, tail_weight=0.0)
    depth = lambda **other: realtime_lib.trained_depth(types.SimpleNamespace(**loss | other), 32)
    assert depth() == (8, 8)
    assert depth(tail_weight=0.1) == (32, 8)
    assert depth(temporal_weighting=False) == (32, 32)
    assert depth(prefix_steps=50) == (32, 32)


def test_late_twins_and_replies_from_before_a_reset_are_dropped():
    state = make(probes=0.2)
    begin(state, chunk(0))
    actions(state, [0, 0.1])
    assert state.request(0.2) == 1
    actions(state, [0.2, 0.3])
    assert state.request(0.59) is None and state.request(0.6) == 2, "after twice the latency"
    actions(state, [0.6])
    assert state.receive(2, chunk(20), 0.7) and not state.receive(1, chunk(10), 0.7)
    assert not state.receive(2, chunk(20), 0.7) and state.counts["late"] == 2
    assert state.action(0.7)[1] != 10 + 3 and state.source == (2, 1)
    number = state.request(0.8) or state.request(1.8)
    actions(state, [0.9] * 3)
    number = number if number is not None else state.request(1.0)
    state.reset()
    assert not state.receive(number, chunk(30), 1.1) and state.action(1.1) is None
    assert state.source is None and not state.ready and state.hold() is None
    assert state.request(1.1) == number + 1


def test_failed_and_impossible_chunks_are_asked_for_again():
    said = []
    state = make(warn=said.append)
    bad = (
        chunk(0)[:7],
        chunk(0, width=2),
        chunk(0) * np.nan,
        [["x"]],
        None,
        np.full((8, 3), np.inf),
    )
    for attempt, plan in enumerate(bad):
        assert state.request(attempt) == attempt
        assert state.receive(attempt, plan, attempt) is False
    assert state.counts["failed"] == len(bad) and len(said) == 1 and "(7, 3)" in said[0]
    number = state.request(10)
    state.failed(number)
    state.failed(number)
    assert state.counts["failed"] == len(bad) + 1 and state.action(10) is None
    begin(state, chunk(0), 11)


def test_holding_still_ends_with_an_error_after_hold_s():
    state = make(hold_s=0.5)
    begin(state, chunk(0))
    actions(state, [0] * 8)
    for now in (1.0, 1.1, 1.4):
        np.testing.assert_array_equal(state.action(now), [0, 7, 7])
    with pytest.raises(realtime_lib.Stalled, match=r"no plan for 0\.50 s"):
        state.action(1.5)
    told = []
    state = make(hold_s=0.5, on_stall=told.append)
    assert actions(state, [0, 0.4, 0.5, 0.6]) == [None] * 4, "nothing to hold: nothing is sent"
    assert told == [0.5, 0.6] and state.counts["holds"] == 0
    begin(state, chunk(0), 0.6)
    actions(state, [0.7] * 8)
    state.action(0.8)
    assert len(told) == 2, "a plan ends the wait"


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(kinds=("delta", "velocity")), "'velocity'"),
        (dict(kinds=()), "each action dimension"),
        (dict(splice="blend"), "'blend'; expected one of conserve, index, append, sync"),
        (dict(dt=0.0), "dt=0.0"),
        (dict(hold_s=0), "hold_s=0"),
        (dict(replan=9), "replan=9"),
        (dict(replan=0), "replan=0"),
        (dict(trained_steps=0), "trained_steps=0"),
        (dict(spread=0), "spread=0"),
        (dict(rate=(1, 2)), "expected 3 numbers above 0"),
        (dict(rate=(1, 0, None)), "expected 3 numbers above 0"),
        (dict(rate=(1, np.nan, 1)), "expected 3 numbers above 0"),
    ],
)
def test_refuses_what_makes_no_sense(changes, said):
    with pytest.raises(ValueError, match=said):
        make(**changes)


def test_it_needs_no_jax():
    code = (
        "import sys; import lightwam_jax.inference.realtime, lightwam_jax.inference.runner;"
        "import lightwam_jax.evaluation.realtime_episode;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
