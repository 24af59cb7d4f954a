"""The benchmark of LIBERO's expert: what it keeps after a kill, and its summary."""

import concurrent.futures

import pytest

from benchmarks import libero_expert


@pytest.fixture
def played(monkeypatch):
    """Tasks are played here and now, and listed."""
    listed = []

    def play(task, states, seeds, noise, assets):
        listed.append(task)
        found = {"stored": {s: 100 + s for s in states}, "disturbed": {s: None for s in seeds}}
        return {"task": task, "environment": {"assets": assets}, **found}

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, spawn, max_tasks_per_child):
            assert max_tasks_per_child == 1
            super().__init__(workers)

    monkeypatch.setattr(libero_expert, "play", play)
    monkeypatch.setattr(libero_expert.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(libero_expert.os, "environ", {})
    return listed


def test_finished_tasks_are_not_played_again(played, tmp_path):
    path = tmp_path / "x.jsonl"
    arguments = (range(2), range(7, 8), 0.3, "assets", 1, path)
    libero_expert.measure(["a"], *arguments)
    found = libero_expert.measure(["a", "b"], *arguments)
    assert played == ["a", "b"]
    assert found["a"]["stored"] == {"0": 100, "1": 101} and found["b"]["disturbed"] == {"7": None}
    with pytest.raises(ValueError, match=r"states: \[0, 1\] there, \[0\] now"):
        libero_expert.measure(["a"], range(1), *arguments[1:])


def test_the_summary_is_by_suite(monkeypatch):
    monkeypatch.setattr(libero_expert.files, "suite_of", lambda task: task[0])
    found = {
        "x1": {"stored": {"0": 90, "1": None}, "disturbed": {}},
        "x2": {"stored": {"0": 110, "1": 100}, "disturbed": {}},
        "y1": {"stored": {"0": None}, "disturbed": {"7": 300}},
    }
    summary = libero_expert.summary(found)
    assert summary["stored"]["x"]["success_rate"] == 0.75
    assert summary["stored"]["x"]["steps"] == [90, 100, 110]
    assert summary["stored"]["y"] | {"interval": 0} == {
        **{"success_rate": 0.0, "interval": 0, "successes": 0, "episodes": 1, "errors": 0},
        "steps": [],
    }
    assert set(summary["disturbed"]) == {"y"}
