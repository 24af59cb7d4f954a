"""The parts of an evaluation's report, one by one."""

import json
import types

import numpy as np
import pytest

from lightwam_jax import html_report
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import closed_loop, draw, report, tables, worker


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
    head, *rows = tables.episodes(RUNS)
    assert head == ("episode", "instruction", "trained", "steps", "untrained", "expert", "steps")
    assert rows == [
        ["a/0/0", "go", "solved", 10, "not solved", "no expert", ""],
        ["a/0/1", "go", "not solved", 99, "not solved", "no expert", ""],
        ["b/0/2", "go", "solved", 21, "not solved", "solved", 7],
        ["b/0/3", "go", "could not run", 0, "solved", "not solved", 8],
    ]
    two = {name: RUNS[name] for name in ("trained", "untrained")}
    head, *rows = tables.episodes(two)
    assert head == ("episode", "instruction", "trained", "steps", "untrained")
    assert rows[0] == ["a/0/0", "go", "solved", 10, "not solved"]


def test_rates_of_groups_stand_before_those_of_tasks():
    head, *rows = tables.tasks(RUNS, {"both": ["a", "b"]})
    assert head == ("task", "trained", "untrained", "expert")
    assert [row[0] for row in rows] == ["both", "a", "b"]
    assert rows[1][1:] == ("50 % (9 to 91), 1 of 2", "0 % (0 to 66), 0 of 2", "no expert")
    assert rows[2][1].endswith("1 of 1, 1 could not run") and rows[2][3].endswith("1 of 2")
    assert rows[0][1].endswith("2 of 3, 1 could not run") and rows[0][2].endswith("1 of 4")


def test_facts_and_headline_are_of_the_right_policy():
    rates = {name: report.rate(played) for name, played in RUNS.items()}
    policy = types.SimpleNamespace(params={"w": np.zeros((1500, 1000))}, step=12345)
    facts = tables.facts(policy, RUNS, rates, 125.4)
    assert [number for number, _ in facts] == [
        "25 %",
        "50 %",
        "16",  # mean of 10 and 21 steps, those that solved it, is 15.5
        "1.0 s",  # without the episode that could not run
        "1.50 M",
        "12,345",
        "2 min 05 s",
    ]
    assert facts[1][1] == "scripted expert, episodes of its tasks"
    none = {name: [ran(0, False)] for name in ("trained", "untrained")}
    rates = {name: report.rate(played) for name, played in none.items()}
    assert [number for number, _ in tables.facts(policy, none, rates, 60)][1] == "none"
    suite_run = types.SimpleNamespace(demonstrated=None, instruction="right")
    assert tables.headline(report.Rate(40, 50, 2), suite_run) == (
        "80 %",
        "of 50 episodes solved from camera images and an instruction "
        "(95 % interval 67 to 89 %). 2 more could not be run.",
    )
    suite_run.demonstrated = {"a": (0, 9)}
    said = tables.headline(report.Rate(40, 50, 0), suite_run)[1]
    assert "none of which was demonstrated" in said and "could not" not in said
    suite_run.instruction = "other"
    said = tables.headline(report.Rate(1, 50, 0), suite_run)[1]
    assert "though the policy was given the instruction of another task" in said


@pytest.mark.parametrize(
    "count, shown",
    [(1, [0]), (2, [0, 4]), (4, [0, 2, 1, 4]), (5, [0, 2, 1, 3, 4]), (8, [0, 2, 1, 3, 4, 5])],
)
def test_a_quarter_of_what_is_shown_are_failures(count, shown):
    results = [
        ran(seed, success, prompt=prompt)
        for seed, (success, prompt) in enumerate(
            [(True, "x"), (True, "x"), (True, "y"), (True, "y"), (False, "x"), (False, "x")]
        )
    ]
    assert [one.episode.seed for one in tables.choose(results, count)] == shown
    assert [one.episode.seed for one in tables.choose(results[4:], 2)] == [4, 5]


def test_every_task_is_shown_and_its_failure_where_there_is_room():
    results = [
        ran(seed, success, task=task)
        for seed, (task, success) in enumerate(
            [("a", True), ("a", True), ("a", False), ("b", True), ("c", False), ("b", False)]
        )
    ]
    for count, shown in ((2, [0, 4]), (3, [0, 3, 4]), (4, [0, 3, 4, 2]), (5, [0, 3, 4, 2, 5])):
        assert [one.episode.seed for one in tables.choose(results, count)] == shown
    assert len(tables.choose(results, 9)) == 6


def test_a_control_is_a_table_of_the_policy_alone():
    head, *rows = tables.episodes({"trained": RUNS["trained"][:1]})
    assert head == ("episode", "instruction", "trained", "steps")
    assert rows == [["a/0/0", "go", "solved", 10]]


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
    of = types.SimpleNamespace
    policy = of(config=of(data=of(num_frames=9), loss=of(lambda_video=0.5)))
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

    monkeypatch.setattr(draw, "future", future)
    for module, name in (
        (draw, "future_grid"),
        (draw, "future_video"),
        (draw, "save_mp4"),
        (html_report, "save_png"),
    ):
        monkeypatch.setattr(module, name, lambda *given, **named: drawn.append(given))
    monkeypatch.setattr(html_report, "curve_chart", lambda *given, **named: None)
    closed_loop.draw_future(policy, tmp_path, found)
    assert [start for episode, start in asked if episode is found[0]] == [4, 10, 16, 0, 20, 7, 13]
    assert {start for episode, start in asked if episode is found[1]} == {0} and len(asked) == 14
    assert drawn[0][1] == [0, 3, 6], "other episodes, and other moments of them"
    numbers = json.loads((tmp_path / "future.json").read_text(encoding="utf-8"))
    assert numbers["offsets"] == [2, 4] and numbers["windows"] == [14, 1]
    assert numbers["psnr"] == {"codec": [66, 2], "predicted": [67, 3], "still": [68, 4]}
    assert numbers["ssim"]["predicted"] == [-67, -3] and numbers["lambda_video"] == 0.5
    assert numbers["nearer"] == {"psnr": [0, 0], "ssim": [14, 1]}, "than the first frame repeated"


def test_learning_curves_are_of_training_and_of_validation(monkeypatch, tmp_path):
    rows = [
        {"kind": "train", "step": 1, "loss": 3.0, "loss_video": 1.0, "loss_action": 2.0},
        {"kind": "eval", "step": 2, "l1": [0.5, 0.25], "l1_step": [9.0]},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    drawn = {}
    monkeypatch.setattr(
        html_report,
        "curve_chart",
        lambda path, series, *given, **named: drawn.update({path.name: series}),
    )
    assert len(closed_loop._curves(tmp_path, tmp_path)) == 2
    assert drawn == {
        "loss.png": {"total": ([1], [3.0]), "video": ([1], [1.0]), "action": ([1], [2.0])},
        "validation.png": {"dimension 0": ([2], [0.5]), "dimension 1": ([2], [0.25])},
    }
    metrics.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert len(closed_loop._curves(tmp_path, tmp_path)) == 1
