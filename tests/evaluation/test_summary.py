"""summary.json and the manifest in it, number by number."""

import dataclasses
import json
import types

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import report, suites
from tests.evaluation.test_report import result
from tests.inference.test_policy import make_config


def made_suite_run():
    """A `suites.SuiteRun` of three episodes of two tasks."""
    return suites.SuiteRun(
        suite="libero",
        env=envs_base.EnvSpec("module:make", {"size": 8}),
        episodes=tuple(
            envs_base.EpisodeSpec(t, i, s) for t, i, s in (("b", 4, 9), ("a", 2, 9), ("a", 4, 10))
        ),
        fps=20.0,
        demonstrated={"a": (0, 5)},
        expert_tasks=(),
        groups={},
    )


def test_a_manifest_says_what_was_run(monkeypatch):
    config = make_config()
    changes = dict(first_seed=9, episodes=3, replan_steps=5, max_steps=77, batch=6, workers=4)
    config = dataclasses.replace(
        config, name="mine", evaluation=dataclasses.replace(config.evaluation, **changes)
    )
    answers = {"status": " M file", "rev-parse": "abc123\n"}
    git = lambda command, **kwargs: types.SimpleNamespace(stdout=answers[command[1]])
    monkeypatch.setattr(report, "subprocess", types.SimpleNamespace(run=git))
    monkeypatch.setattr(report, "PACKAGES", ("numpy", "no-such-package"))
    got = report.manifest(config, 7, "weights", "1 x cpu", made_suite_run(), {"gl": "1"}, "550")
    assert got.pop("python").count(".") == 2 and got.pop("platform")
    want = {
        "config": "mine",
        "model": config.model.variant,
        "step": 7,
        "weights": "weights",
        "seeds": [9, 11],
        "replan_steps": 5,
        "max_steps": 77,
        "batch": 6,
        "workers": 4,
        "device": "1 x cpu",
        "driver": "550",
        "commit": "abc123+",
        "packages": {"numpy": np.__version__, "no-such-package": "not installed"},
    }
    of_suite = {
        "suite": "libero",
        "tasks": ["b", "a"],
        "env": {"factory": "module:make", "kwargs": {"size": 8}},
        "initial_states": [2, 4],
        "demonstrated_seeds": {"a": (0, 5)},
        "environment": {"gl": "1"},
    }
    assert got == want | of_suite
    answers["status"] = ""
    alone = report.manifest(config, 7, "weights", "1 x cpu")
    assert set(alone) - set(want) == {"python", "platform"}
    assert (alone["commit"], alone["driver"]) == ("abc123", None)


def test_a_log_is_of_one_policy_and_of_what_decides_an_episode():
    decisive = (
        "suite",
        "env",
        "environment",
        "replan_steps",
        "max_steps",
        "batch",
        "device",
        "driver",
    )
    manifest = {key: f"value of {key}" for key in (*decisive, "packages", "workers", "step")}
    got = report.log_manifest(manifest, "expert")
    assert got == {
        "policy": "expert",
        **{key: f"value of {key}" for key in (*decisive, "packages")},
    }


def test_summary_holds_what_the_project_promises(tmp_path):
    """Every number another, so that none can stand in the place of its neighbour."""
    path, manifest = tmp_path / "summary.json", {"replan_steps": 4}
    trained, untrained, expert = (
        report.Rate(40, 50, 2),
        report.Rate(5, 51, 1),
        report.Rate(9, 10, 0),
    )
    tasks = {
        "trained": {"a": report.Rate(1, 4, 0), "b": report.Rate(0, 0, 3)},
        "untrained": {"a": report.Rate(3, 4, 1)},
    }
    groups = {"trained": {"g": report.Rate(1, 2, 0)}, "untrained": {"g": report.Rate(0, 2, 0)}}
    summary = report.write_summary(
        path, trained, untrained, expert, 12.34, manifest, tasks, groups, {"paper": 1}
    )
    assert json.loads(path.read_text(encoding="utf-8")) == summary
    # Of Wilson's formula with 1.96, worked out elsewhere.
    near = lambda *bounds: pytest.approx(bounds, abs=1e-4)
    assert summary.pop("interval") == near(0.66964, 0.88758)
    assert summary.pop("untrained_interval") == near(0.04259, 0.20979)
    assert summary.pop("expert_interval") == near(0.59584, 0.98212)
    found = summary.pop("tasks")
    assert list(found) == ["a", "b"] and list(found["b"]) == ["trained"]
    assert found["a"]["untrained"].pop("interval") == near(0.30064, 0.95441)
    assert found["a"]["untrained"] == {
        "success_rate": 0.75,
        "successes": 3,
        "episodes": 4,
        "errors": 1,
    }
    assert found["a"]["trained"]["success_rate"] == 0.25
    assert found["b"]["trained"] == {
        "success_rate": None,
        "interval": [0.0, 1.0],
        "successes": 0,
        "episodes": 0,
        "errors": 3,
    }
    found = summary.pop("groups")["g"]
    assert (found["trained"]["success_rate"], found["untrained"]["success_rate"]) == (0.5, 0)
    assert summary == {
        "success_rate": 0.8,
        "untrained_success_rate": 5 / 51,
        "expert_success_rate": 0.9,
        "expert_episodes": 10,
        "episodes": 50,
        "errors": 2,
        "seconds": 12.3,
        "published": {"paper": 1},
        "manifest": {"replan_steps": 4},
    }
    without = report.write_summary(path, trained, untrained, None, 1, manifest)
    assert not [key for key in without if key.startswith("expert")]
    assert without["tasks"] == {} and not {"groups", "published"} & set(without)


def test_rates_of_tasks_and_groups():
    results = []
    for task, success in (("b", True), ("a", False), ("b", False), ("a", None), ("c", True)):
        one = result(len(results), success)
        results.append(
            dataclasses.replace(one, episode=envs_base.EpisodeSpec(task, 0, len(results)))
        )
    assert report.by_task(results) == {
        "b": report.Rate(1, 2, 0),
        "a": report.Rate(0, 1, 1),
        "c": report.Rate(1, 1, 0),
    }
    assert list(report.by_task(results)) == ["b", "a", "c"]
    groups = {"second": ["c", "a"], "nobody": ["d"], "first": ["b"]}
    assert report.by_group(results, groups) == {
        "second": report.Rate(1, 2, 1),
        "first": report.Rate(1, 2, 0),
    }


def test_times_are_means_over_the_episodes_that_have_them():
    timed = [types.SimpleNamespace(times=t) for t in ({"reset": 1.0}, {}, {"reset": 2.0})]
    assert report.mean_times(timed) == {"reset": 1.5}
    assert report.mean_times(timed[1:2]) == {}
