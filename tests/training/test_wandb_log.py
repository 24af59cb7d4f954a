"""Metrics at Weights & Biases, with a stand-in for its package."""

import importlib.util
import json
import sys
import types

import pytest

from lightwam_jax.training import metrics, wandb_log


@pytest.fixture
def service(monkeypatch):
    """What the package was told: calls of init, and rows."""
    told = types.SimpleNamespace(started=[], rows=[], finished=0)

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, row):
            told.rows.append(row)

        def finish(self):
            told.finished += 1

    def init(**given):
        told.started.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return told


def test_the_same_scalars_are_sent_and_a_continued_run_is_the_same_run(service, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for step in (2, 1):  # killed after 2, continued from 1
        writer = metrics.MetricsWriter(workdir, step - 1, wandb="robots")
        writer.write("train", step, {"loss": 0.5, "l1": [1.0, 2.0]})
        writer.close()
    values = {"train/loss": 0.5, "train/l1/0": 1.0, "train/l1/1": 2.0}
    assert service.rows == [values | {"step": 2}, values | {"step": 1}]
    first, second = service.started
    assert first == second and service.finished == 2
    known = json.loads((workdir / "wandb.json").read_text(encoding="utf-8"))["id"]
    assert (first["project"], first["name"], first["id"]) == ("robots", "run", known)
    assert first["resume"] == "allow" and first["dir"] == str(workdir)


def test_off_by_default_and_only_on_the_first_process(service, tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    metrics.MetricsWriter(tmp_path, 0, active=False, wandb="robots").close()
    assert service.started == [] and not (tmp_path / "wandb.json").exists()


def test_a_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wandb_log.check("")
    with pytest.raises(ValueError, match=r"wandb='robots' needs .*requirements-wandb\.txt"):
        wandb_log.check("robots")
