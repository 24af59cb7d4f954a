"""Late plans in virtual time: without latency as `rollout`, with it as a world that goes on."""

import contextlib
import itertools
import json
import types

import numpy as np
import pytest

from lightwam_jax import html_report
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import realtime, realtime_episode, report, rollout, worker
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference import realtime as inference_realtime
from tests.evaluation import test_rollout as fakes
from tests.inference.test_policy import make_config

KINDS = ("delta", "delta")


def setting(execution="conserve", latency=(0,), **changes):
    values = dict(horizon=12, kinds=KINDS, trained_steps=12, full_steps=12)
    values |= dict(limits=((-1.0, -1.0), (1.0, 1.0)))
    return realtime_episode.Setting(execution, latency, **values | changes)


def play(player, env, episode, replan_steps=5, max_steps=60, plan=None):
    """Returns (result, the steps at which plans were asked for)."""
    running, asked, chunk = player(env, episode, replan_steps, max_steps), [], None
    try:
        while True:
            seen = running.send(chunk)
            asked.append(env.steps)
            images = {camera: np.stack([image] * 4) for camera, image in seen["images"].items()}
            fill = [seen["state"]] * 4, [seen["prompt"]] * 4
            chunk = (plan or fakes.policy)(images, np.stack(fill[0]), fill[1])[0]
    except StopIteration as end:
        return end.value, asked


@pytest.mark.parametrize("execution", inference_realtime.SPLICES)
def test_without_latency_every_execution_is_the_synchronous_engine(execution):
    for episode in fakes.NINE:
        expected, asked = play(worker.play, fakes.FakeEnv(), episode)
        env = fakes.FakeEnv()
        result, again = play(setting(execution).player, env, episode)
        assert result.checksum == expected.checksum and again == asked
        assert fakes.numbers([result]) == fakes.numbers([expected])
        assert env.renders == 1 + len(asked) - 1, "only what the policy sees is rendered"
        assert result.counts["deepest"] == min(5, result.steps)


def row_numbers(images, state, prompts):
    """Plans whose second dimension is the number of the row, in hundredths; nothing is reached."""
    del images, state, prompts
    return np.repeat(np.stack([np.full(12, 1e-4), np.arange(12) / 100], 1)[None], 4, 0)


def rows_executed(execution, late, steps):
    """Returns (rows, steps at which plans were asked for, result)."""
    how, episode = setting(execution, (late,), kinds=("delta", "gripper")), fakes.episodes(3)[0]
    result, asked = play(how.player, fakes.FakeEnv(), episode, 5, steps, row_numbers)
    return np.rint(100 * result.actions[:, 1]).astype(int).tolist(), asked, result


def test_the_world_goes_on_while_a_plan_is_computed():
    rows, asked, result = rows_executed("index", 2, 15)
    assert asked == [0, 3, 8, 13], "two steps before five rows of a plan are executed"
    assert rows == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]
    assert result.counts["skipped"] == 4 and result.counts["holds"] == 0
    rows, asked, result = rows_executed("sync", 2, 15)
    assert asked == [0, 5, 12] and result.counts["holds"] == 4
    assert rows == [0, 1, 2, 3, 4, 4, 4, 0, 1, 2, 3, 4, 4, 4, 0]
    assert result.actions[5:7, 0].tolist() == [0, 0], "the gripper keeps its command"


def test_a_latency_longer_than_the_rows_between_two_plans():
    rows, asked, result = rows_executed("index", 7, 16)
    assert asked == [0, 1, 8, 15], "as soon as a plan is there, the next one is asked for"
    assert rows == [*range(8), *range(7, 12), 11, 11, 5] and result.counts["holds"] == 2
    assert result.counts["deepest"] == 12


def test_drawn_latencies_depend_on_the_episode_alone():
    player, episode = setting("conserve", (1, 2, 3)).player, fakes.episodes(3)[0]
    one, asked = play(player, fakes.FakeEnv(), episode, plan=row_numbers)
    env = fakes.FakeEnv()
    play(player, env, fakes.episodes(4)[0], plan=row_numbers)
    two, again = play(player, env, episode, plan=row_numbers)
    assert one.checksum == two.checksum and asked == again and one.counts == two.counts
    assert len({after - before for before, after in itertools.pairwise(asked[1:])}) > 1
    with pytest.raises(ValueError, match="expert"):
        next(player(env, episode, 5, 60, True))


def test_latencies():
    assert realtime.latency_steps("0", 10) == (0,) and realtime.latency_steps("3", 10) == (3,)
    assert realtime.latency_steps("1-3", 10) == (1, 2, 3)


def test_measured_latencies(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text("[0, 99.5, 100, 101, 300]", encoding="utf-8")
    assert realtime.latency_steps(str(file), 10) == (0, 1, 1, 2, 3)
    for text in ("", "-1", "3-1", "1.5", str(tmp_path / "absent.json")):
        with pytest.raises(ValueError, match="--latency"):
            realtime.latency_steps(text, 10)
    for content in ("[]", "{}", "[-1]", "[[1]]", '["x"]', "3"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="milliseconds"):
            realtime.latency_steps(str(file), 10)


def stub(**data):
    """What `realtime` needs of a `Policy`: walks to the goal of `fakes.FakeEnv`."""
    config = make_config(data={"action_horizon": 12, **data}, action_dim=2)
    config = types.SimpleNamespace(
        name="fake", seed=0, model=config.model, loss=config.loss, data=config.data
    )
    config.evaluation = fakes.evaluation(suite="demo", episodes=4, workers=1, max_steps=40)
    ends = dict(global_min=[-1.0, 0.0], global_max=[1.0, 2.0])
    made = types.SimpleNamespace(config=config, params={"w": np.zeros(3)}, step=7)
    made.demonstrated = None
    made.assets = types.SimpleNamespace(statistics={"action": {"default": ends}})
    made.deployed = lambda: made
    made.warm_up = lambda sizes: None
    made.act = lambda images, state, prompts: fakes.policy(images, state, prompts)
    return made


def test_latencies_that_no_plan_has_are_refused(tmp_path):
    file = tmp_path / "measured.json"
    for value, said in (("Infinity", "inf"), ("-Infinity", "-inf"), ("NaN", "nan"), ("-3", "-3")):
        file.write_text(f"[10, {value}, 20]", encoding="utf-8")
        with pytest.raises(ValueError, match=f"measured.json holds {said}; expected milliseconds"):
            realtime.latency_steps(str(file), 10)
        with pytest.raises(ValueError, match=rf"--latency {value.lower()}: expected steps \(2\)"):
            realtime.latency_steps(value.lower(), 10)


def test_settings_come_from_config_and_statistics():
    found = realtime.setting_of(stub(), "index", (2,))
    assert found.kinds == ("absolute", "absolute") and found.horizon == 12
    assert (found.trained_steps, found.full_steps) == (8, 8)
    assert found.limits == ((-1.0, 0.0), (1.0, 2.0)) and found.latency == (2,)
    np.testing.assert_allclose(found.gripper_band, [[-0.2, 0.8], [0.2, 1.2]])
    own = stub(action_kinds=("delta", "gripper"), gripper_dims=(1,), gripper_closed_open=(5, 1))
    found = realtime.setting_of(own, "conserve", (2,), spread=2)
    assert found.kinds == ("delta", "gripper") and found.spread == 2
    assert found.limits == ((-1.0, -3.0), (1.0, 5.0)), "as the robot is sent it"
    assert realtime.setting_of(own, "sync", (0,), kinds=KINDS).kinds == KINDS
    for kinds in (("delta",), ("delta", "speed")):
        with pytest.raises(ValueError, match="one of delta, absolute, gripper for each of the 2"):
            realtime.setting_of(own, "sync", (0,), kinds=kinds)


def result(seed, success, actions, **counts):
    episode = envs_base.EpisodeSpec("a", 0, seed)
    return worker.played(episode, success, "go", list(np.float32(actions)), 0.1, counts)


def test_numbers_of_a_cell():
    about = setting("index", (1, 2), kinds=("delta", "gripper"), limits=((-2, 0), (2, 1)))
    results = [
        result(0, True, [[0, 0], [1, 9], [1, 0]], holds=2, skipped=4, deepest=6, shortened=1),
        result(1, False, [[0, 0], [2, 0]], holds=1, deepest=3),
        worker.failed_to_run(envs_base.EpisodeSpec("a", 0, 2), "broke"),
    ]
    cell = realtime.cell_of("1-2", about, results)
    assert cell.rate == report.Rate(1, 2, 1) and cell.mean_latency == 1.5 and cell.steps == 3
    assert (cell.holds, cell.skipped, cell.shortened, cell.deepest) == (1.5, 2, 0.5, 6)
    assert cell.jump == pytest.approx(np.quantile([0.25, 0, 0.5], 0.95))
    empty = realtime.cell_of("1", about, results[2:])
    assert empty.steps is None and empty.jump == 0 and empty.rate.episodes == 0
    head, first, second = realtime.text_table([cell, empty]).splitlines()
    assert head.split()[:3] == ["latency", "execution", "solved"]
    assert "50 % (9 to 91), 1 of 2, 1 could not run" in first and " 3.0 " in first
    assert " - " in second
    assert json.loads(json.dumps(cell.to_json()))["rate"]["successes"] == 1


def test_the_chart_has_a_line_per_execution(tmp_path, monkeypatch):
    drawn, real = [], html_report.chart

    @contextlib.contextmanager
    def chart(*arguments):
        with real(*arguments) as axes:
            yield axes
            drawn.append(axes)

    monkeypatch.setattr(html_report, "chart", chart)
    cells = [
        realtime.cell_of(str(late), setting(name, (late,)), [result(0, solved, [[0, 0]] * 2)])
        for late, name, solved in ((2, "sync", 0), (0, "sync", 1), (0, "index", 1), (2, "index", 1))
    ]
    cells.append(realtime.cell_of("1-3", setting("sync", (1, 2, 3)), [result(0, True, [[0, 0]])]))
    realtime.chart(tmp_path / "c.png", cells, 0.1)
    assert (tmp_path / "c.png").stat().st_size > 5000
    (axes,) = drawn
    lines = [bars.lines[0].get_xydata() for bars in axes.containers]
    np.testing.assert_allclose(lines[0], [[0, 100], [2, 0]], atol=0.1)
    np.testing.assert_allclose(lines[1], [[0, 100], [2, 100]], atol=0.1)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["sync: the robot waits", "index: late rows skipped"]
    assert "100 ms" in axes.get_xlabel() and axes.get_xticks().tolist() == [0, 2]


def test_a_whole_evaluation_writes_its_files_and_continues(tmp_path, monkeypatch):
    policy = stub(action_kinds=KINDS)
    run = suites_lib.SuiteRun(
        "demo", fakes.spec(), tuple(fakes.episodes(0, 1, 2, 3)), 10, None, (), {}
    )
    monkeypatch.setattr(suites_lib, "of_config", lambda *arguments: run)
    arguments = policy, "demo", tmp_path, ["0", "2"], ["conserve"], 0.0
    cells = realtime.evaluate(*arguments)
    direct = rollout.run(policy.act, fakes.spec(), run.episodes, policy.config.evaluation)
    log = tmp_path / "report" / "realtime_conserve_0.jsonl"
    first, *lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert first["manifest"]["realtime"]["kinds"] == list(KINDS)
    found = {line["seed"]: line["checksum"] for line in lines}
    assert found == {r.episode.seed: r.checksum for r in direct}, "as without `Realtime`"
    assert [(c.latency, c.execution) for c in cells] == [("0", "conserve"), ("2", "conserve")]
    assert cells[1].skipped > 0 and cells[0].skipped == 0
    content = json.loads((tmp_path / "realtime.json").read_text(encoding="utf-8"))
    assert [cell["rate"] for cell in content["cells"]] == [report.numbers(c.rate) for c in cells]
    assert content["execution"]["trained_steps"] == 8 and content["manifest"]["step"] == 7
    assert (tmp_path / "realtime.png").exists()
    assert "conserve" in (tmp_path / "realtime.html").read_text(encoding="utf-8")
    policy.act = None  # everything is in the logs
    again = realtime.evaluate(*arguments)
    assert again == cells
    with pytest.raises(ValueError, match=r"realtime\.kinds"):
        realtime.evaluate(*arguments, kinds=("absolute", "absolute"))
    with pytest.raises(ValueError, match="--execution blend"):
        realtime.evaluate(policy, "demo", tmp_path, ["0"], ["blend"], 0.0)
