"""LIBERO results in the form of the reference's, and beside the numbers it published."""

import json

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.evaluation import libero_published, report, worker

SAUCES = (
    "alphabet_soup",
    "cream_cheese",
    "salad_dressing",
    "bbq_sauce",
    "ketchup",
    "tomato_sauce",
    "butter",
    "milk",
    "chocolate_pudding",
    "orange_juice",
)
OBJECT = tuple(f"pick_up_the_{sauce}_and_place_it_in_the_basket" for sauce in SAUCES)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up package: LIBERO-Object's ten tasks and one of LIBERO-90."""
    (tmp_path / "benchmark").mkdir()
    table = {f"libero_{suite}": [] for suite in libero_files.SUITES}
    table |= {"libero_object": list(OBJECT), "libero_90": ["KITCHEN_SCENE1_open_the_drawer"]}
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text(
        f"libero_task_map = {table}\n", encoding="utf-8"
    )
    monkeypatch.setattr(libero_files, "package", lambda: tmp_path)
    libero_files.tasks.cache_clear()
    yield
    libero_files.tasks.cache_clear()


def played_of(tasks, episodes=50, failed=0, errors=0):
    """`episodes` of each task at two seconds each; of the first, some fail and some cannot run."""
    found = []
    for task in tasks:
        for i in range(episodes):
            episode, first = envs_base.EpisodeSpec(task, i, i), task == tasks[0]
            found.append(
                worker.failed_to_run(episode, "broken")
                if first and i < errors
                else worker.EpisodeResult(
                    episode,
                    not (first and i < errors + failed),
                    40,
                    "",
                    None,
                    2.0,
                    i,
                    np.zeros((40, 7)),
                )
            )
    return found


def manifest(**changes):
    environment = {
        "assets": "LIBERO",
        "rendering": "full",
        "image_size": 256,
        "versions": {"mujoco": "3.8.1"},
        "protocol": {"settle": 30, "max_steps": {"object": 400, "90": 400}},
    }
    environment |= changes.pop("environment", {})
    return {
        "suite": "libero",
        "config": "libero_object",
        "step": 12500,
        "replan_steps": 10,
        "max_steps": 400,
        "environment": environment,
        **changes,
    }


def test_the_reference_could_have_written_it(package, tmp_path):
    """Keys, units and names of its eval_logs/summary_libero_object.json."""
    played = played_of(OBJECT, failed=2)
    assert libero_published.write_summaries(tmp_path, played, manifest(), "runs/x") == [
        tmp_path / "summary_libero_object.json"
    ]
    content = json.loads((tmp_path / "summary_libero_object.json").read_text(encoding="utf-8"))
    assert list(content) == ["run_id", "ckpt", "config", "suite_stats", "task_results", "overall"]
    assert content["run_id"] == "libero_object_step_012500" and content["ckpt"] == "runs/x"
    assert content["suite_stats"] == {
        "libero_object": {
            "total_tasks": 10,
            "total_trials": 500,
            "total_successes": 498,
            "total_time": 1000.0,
            "max_time": 100.0,
        }
    }
    assert content["overall"] == {
        "average_success_rate": pytest.approx(99.6),
        "total_time": 1000.0,
        "average_task_time": 100.0,
    }
    assert content["task_results"]["libero_object_0"] == {
        "success_rate": 96.0,
        "duration": 100.0,
        "total_episodes": 50,
        "successes": 48,
        "task_description": "pick up the alphabet soup and place it in the basket",
    }
    assert content["task_results"]["libero_object_9"]["task_description"].endswith(
        "orange juice and place it in the basket"
    )


def test_every_suite_has_its_file_and_stand_ins_and_errors_are_told(package, tmp_path):
    played = played_of(OBJECT[3:5], 4, errors=3) + played_of(("KITCHEN_SCENE1_open_the_drawer",), 4)
    paths = libero_published.write_summaries(
        tmp_path, played, manifest(environment={"assets": "stand-in"}), "runs/x"
    )
    assert [path.name for path in paths] == ["summary_libero_object.json", "summary_libero_90.json"]
    content = json.loads(paths[0].read_text(encoding="utf-8"))
    assert content["assets"] == "stand-in"
    assert list(content["task_results"]) == ["libero_object_3", "libero_object_4"]
    assert content["task_results"]["libero_object_3"]["errors"] == 3
    assert content["suite_stats"]["libero_object"]["total_trials"] == 5
    nothing = [worker.failed_to_run(one.episode, "broken") for one in played_of(OBJECT[:1], 2)]
    (path,) = libero_published.write_summaries(tmp_path, nothing, manifest(), "runs/x")
    assert json.loads(path.read_text(encoding="utf-8"))["overall"]["average_success_rate"] is None
    assert libero_published.write_summaries(tmp_path, played, manifest(suite="metaworld"), "") == []


def test_published_numbers_stand_beside_ours(package):
    found = libero_published.published(played_of(OBJECT, failed=5, errors=1), manifest())["object"]
    assert (found["successes"], found["episodes"]) == (498, 500)
    assert found["success_rate"] == pytest.approx(0.996)
    assert found["interval"] == pytest.approx(report.wilson_interval(498, 500))
    assert (found["ours"]["successes"], found["ours"]["episodes"]) == (494, 499)
    assert "summary_libero_object.json" in found["source"]
    assert "3.3.2 there, 3.8.1 here" in found["remark"]
    same = libero_published.published(
        played_of(OBJECT), manifest(environment={"versions": {"mujoco": "3.3.2"}})
    )
    assert same["object"]["remark"] == ""
    header, row = libero_published.table(same)
    assert header[2].startswith("published") and "100.0 %  500/500" in row[1]
    assert "99.6 %  498/500, 95 % interval 98.6 to 99.9 %" in row[2]
    assert (
        libero_published.published(played_of(("KITCHEN_SCENE1_open_the_drawer",)), manifest()) == {}
    )
    assert libero_published.published(played_of(OBJECT), manifest(suite="demo")) == {}
    counts = np.array(list(libero_published.PUBLISHED.values()))
    assert 100 * (counts[:, 0] / counts[:, 1]).mean() == pytest.approx(97.2, abs=0.051), "the paper"


@pytest.mark.parametrize(
    "changes, tasks, reason",
    [
        ({"environment": {"assets": "stand-in"}}, OBJECT, "made with stand-in assets"),
        ({"environment": {"rendering": "fast"}}, OBJECT, "rendering 'fast'"),
        ({"environment": {"image_size": 128}}, OBJECT, "cameras of 128 pixels, 256 there"),
        (
            {"environment": {"protocol": {"settle": 10, "max_steps": {"object": 280}}}},
            OBJECT,
            "10 steps to settle, 30 there; at most 280 steps, 400 there",
        ),
        ({"replan_steps": 5}, OBJECT, "a plan every 5 steps, 10 there"),
        ({"max_steps": 100}, OBJECT, "at most 100 steps, 400 there"),
        ({}, OBJECT[:7], "3 of the suite's tasks are missing"),
    ],
)
def test_another_evaluation_is_not_compared(package, changes, tasks, reason):
    found = libero_published.published(played_of(tasks), manifest(**changes))
    assert "; ".join(found["object"].pop("not_comparable")) == reason
    assert not found["object"], "no number that could be mistaken for a comparison"
    assert libero_published.table(found | {"object": {"not_comparable": [reason]}})[1] == (
        "object",
        "",
        "not comparable",
        reason,
    )


@pytest.mark.sim
def test_tasks_have_the_references_numbers():
    """As in its logs of the real benchmark."""
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    assert libero_files.tasks("object") == OBJECT
    assert [libero_files.instruction(libero_files.tasks("10")[i]) for i in (1, 9)] == [
        "put both the cream cheese box and the butter in the basket",
        "put the yellow and white mug in the microwave and close it",
    ]
