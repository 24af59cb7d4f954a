"""The parts of an evaluation's report, one by one, and how demonstrations are recorded."""

import json
import types

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record
from lightwam_jax.evaluation import closed_loop, report, worker


def ran(seed, success, steps=40, task="a", prompt="go"):
    episode = envs_base.EpisodeSpec(task, 0, seed)
    if success is None:
        return worker.failed_to_run(episode, "it broke")
    return worker.EpisodeResult(episode, success, steps, prompt, None, 1.0, 0, np.zeros((steps, 2)))


RUNS = {
    "trained": [ran(0, True, 10), ran(1, False, 99), ran(2, True, 21, "b"), ran(3, None, task="b")],
    "untrained": [ran(0, False), ran(1, False), ran(2, False, 40, "b"), ran(3, True, 40, "b")],
    "expert": [ran(2, True, 7, "b"), ran(3, False, 8, "b")],
}


def test_the_table_has_a_row_for_every_episode():
    head, *rows = closed_loop._table(RUNS)
    assert head == ("episode", "instruction", "trained", "steps", "untrained", "expert", "steps")
    assert rows == [
        ["a/0/0", "go", "solved", 10, "not solved", "no expert", ""],
        ["a/0/1", "go", "not solved", 99, "not solved", "no expert", ""],
        ["b/0/2", "go", "solved", 21, "not solved", "solved", 7],
        ["b/0/3", "go", "could not run", 0, "solved", "not solved", 8],
    ]
    two = {name: RUNS[name] for name in ("trained", "untrained")}
    head, *rows = closed_loop._table(two)
    assert head == ("episode", "instruction", "trained", "steps", "untrained")
    assert rows[0] == ["a/0/0", "go", "solved", 10, "not solved"]


def test_rates_of_groups_stand_before_those_of_tasks():
    head, *rows = closed_loop._task_table(RUNS, {"both": ["a", "b"]})
    assert head == ("task", "trained", "untrained", "expert")
    assert [row[0] for row in rows] == ["both", "a", "b"]
    assert rows[1][1:] == ("50 % (9 to 91), 1 of 2", "0 % (0 to 66), 0 of 2", "no expert")
    assert rows[2][1].endswith("1 of 1, 1 could not run") and rows[2][3].endswith("1 of 2")
    assert rows[0][1].endswith("2 of 3, 1 could not run") and rows[0][2].endswith("1 of 4")


def test_facts_and_headline_are_of_the_right_policy():
    rates = {name: report.rate(records) for name, records in RUNS.items()}
    policy = types.SimpleNamespace(params={"w": np.zeros((1500, 1000))}, step=12345)
    facts = closed_loop._facts(policy, RUNS, rates, 125.4)
    assert [number for number, _ in facts] == [
        "25 %",
        "50 %",
        "16",  # mean of 10 and 21 steps, those that solved it, is 15.5
        "1.50 M",
        "12,345",
        "2 min 05 s",
    ]
    assert facts[1][1] == "scripted expert, episodes of its tasks"
    none = {name: [ran(0, False)] for name in ("trained", "untrained")}
    rates = {name: report.rate(records) for name, records in none.items()}
    assert [number for number, _ in closed_loop._facts(policy, none, rates, 60)][1] == "none"
    setup = types.SimpleNamespace(demonstrated=None)
    assert closed_loop._headline(report.Rate(40, 50, 2), setup) == (
        "80 %",
        "of 50 episodes solved from camera images and an instruction "
        "(95 % interval 67 to 89 %). 2 more could not be run.",
    )
    setup.demonstrated = {"a": (0, 9)}
    said = closed_loop._headline(report.Rate(40, 50, 0), setup)[1]
    assert "none of which was demonstrated" in said and "could not" not in said


@pytest.mark.parametrize(
    "count, shown",
    [(1, [0]), (2, [0, 4]), (4, [0, 2, 1, 4]), (5, [0, 2, 1, 3, 4]), (8, [0, 2, 1, 3, 4, 5])],
)
def test_a_quarter_of_what_is_shown_are_failures(count, shown):
    records = [
        ran(seed, success, prompt=prompt)
        for seed, (success, prompt) in enumerate(
            [(True, "x"), (True, "x"), (True, "y"), (True, "y"), (False, "x"), (False, "x")]
        )
    ]
    assert [one.episode.seed for one in closed_loop.choose(records, count)] == shown
    assert [one.episode.seed for one in closed_loop.choose(records[4:], 2)] == [4, 5]


def test_a_replay_becomes_an_episode_step_by_step():
    seen = [
        {
            "images": {c: np.full((2, 2, 3), 10 * k + i, np.uint8) for i, c in enumerate("sw")},
            "state": np.float32([k, -k]),
        }
        for k in range(4)
    ]
    one = ran(5, True, 4)
    episode = closed_loop._as_episode(one, {"observations": seen})
    assert (episode.id, episode.task, episode.length) == ("a/0/5", "go", 4)
    assert episode.state.tolist() == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert episode.images["s"][:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert episode.images["w"][:, 0, 0, 0].tolist() == [1, 11, 21, 31]
    assert episode.action is one.actions


def test_means_of_imagined_futures_leave_out_what_is_past_the_end(monkeypatch, tmp_path):
    found = [types.SimpleNamespace(length=n) for n in (29, 5)]
    policy = types.SimpleNamespace(
        config=types.SimpleNamespace(data=types.SimpleNamespace(num_frames=9))
    )
    asked, drawn = [], []

    def future(policy, windows):
        asked.extend(windows)
        n = len(windows)
        valid = np.zeros((n, 4), bool)
        valid[:, :2], valid[0, 2] = True, True  # the last offset is reached by none
        values = np.arange(4.0) + 10 * np.arange(n)[:, None]
        measured = {name: values + k for k, name in enumerate(("codec", "predicted", "still"))}
        return {
            "valid": valid,
            "offsets": np.array([0, 2, 4, 6]),
            "psnr": measured,
            "ssim": {name: -each for name, each in measured.items()},
        }

    for name in ("future", "future_sheet", "future_film", "save_png", "save_mp4"):
        work = future if name == "future" else lambda *given, **named: drawn.append(given)
        monkeypatch.setattr(closed_loop.visualize, name, work)
    monkeypatch.setattr(closed_loop.report, "curve_chart", lambda *given, **named: None)
    closed_loop.draw_future(policy, tmp_path, found)
    assert [start for episode, start in asked if episode is found[0]] == [4, 10, 16, 0, 20, 7, 13]
    assert {start for episode, start in asked if episode is found[1]} == {0} and len(asked) == 14
    assert drawn[0][1] == [0, 3, 6], "other episodes, and other moments of them"
    numbers = json.loads((tmp_path / "future.json").read_text())
    assert numbers["offsets"] == [2, 4] and numbers["windows"] == [14, 1]
    assert numbers["psnr"] == {"codec": [66, 2], "predicted": [67, 3], "still": [68, 4]}
    assert numbers["ssim"]["predicted"] == [-67, -3]


def test_learning_curves_are_of_training_and_of_validation(monkeypatch, tmp_path):
    rows = [
        {"kind": "train", "step": 1, "loss": 3.0, "loss_video": 1.0, "loss_action": 2.0},
        {"kind": "eval", "step": 2, "l1": [0.5, 0.25], "l1_step": [9.0]},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {}
    monkeypatch.setattr(
        closed_loop.report,
        "curve_chart",
        lambda path, series, *given, **named: drawn.update({path.name: series}),
    )
    assert len(closed_loop._curves(tmp_path, tmp_path)) == 2
    assert drawn == {
        "loss.png": {"total": ([1], [3.0]), "video": ([1], [1.0]), "action": ([1], [2.0])},
        "validation.png": {"dimension 0": ([2], [0.5]), "dimension 1": ([2], [0.25])},
    }
    metrics.write_text(json.dumps(rows[0]) + "\n")
    assert len(closed_loop._curves(tmp_path, tmp_path)) == 1


# ---- recording -----------------------------------------------------------------------------------


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
        got = record.demonstrate(env, envs_base.EpisodeSpec("a", 0, 3), noise, 60)
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
        record.demonstrate(env, envs_base.EpisodeSpec("a", 0, seed), noise, steps)
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


def test_failed_demonstrations_are_replaced_by_the_seeds_that_follow():
    """Even seeds are solved; jobs are handed out ahead, and those left over count for nothing."""
    asked = []

    def apply_async(function, arguments):
        ((episode,),) = (arguments,)
        asked.append(episode)
        arrays = {name: np.full((2, 1), episode.seed) for name in ("state", "action", "scene")}
        return types.SimpleNamespace(get=lambda: (episode.seed % 2 == 0, "go", arrays))

    pool, tried = types.SimpleNamespace(apply_async=apply_async), {"a": 0}
    first = envs_base.EpisodeSpec("a", 4, 7)
    found = list(record._solved(pool, first, 3, 2, tried, 20))
    assert [one.id for one in found] == ["a/4/8", "a/4/10", "a/4/12"]
    assert tried == {"a": 6}, "7 to 12"
    assert [e.seed for e in asked] == list(range(7, 7 + len(asked))) and {
        e.init for e in asked
    } == {4}
    assert [(one.fps, one.task, set(one.images)) for one in found] == [(20.0, "go", {"scene"})] * 3
    assert found[1].state[0, 0] == 10


def test_an_expert_that_fails_too_often_ends_the_recording():
    failed = types.SimpleNamespace(get=lambda: (False, "go", {}))
    pool, tried = types.SimpleNamespace(apply_async=lambda *given: failed), {"a": 0}
    with pytest.raises(RuntimeError, match=r"solved 0 of 11 episodes of a: give less --noise"):
        list(record._solved(pool, envs_base.EpisodeSpec("a", 0, 0), 5, 2, tried, 20))
