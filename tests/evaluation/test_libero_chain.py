"""From recording to the report, by the user's own commands: on LIBERO's assets or stand-ins."""

import json
import os
import subprocess
import sys

import pytest

from lightwam_jax.envs.libero import files as libero_files
from tests.test_end_to_end import ROOT, SMALL, run

pytestmark = [pytest.mark.sim, pytest.mark.slow]
# One of the suite object, one of spatial, each with its number there.
TASKS = {
    "pick_up_the_milk_and_place_it_in_the_basket": 7,
    "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate": 2,
}
FAST = {"rendering": "fast", "image_size": 32}
TINY = SMALL | {
    "data.canvas": "(32,64)",
    "data.camera_size": "(32,32)",
    "data.num_frames": 9,
    "train.eval_every": 0,
    "train.checkpoint_every": 4,
    "evaluation.max_steps": 24,
    "evaluation.batch": 2,
    "evaluation.workers": 1,
}


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")


def assets():
    """Returns (directory, its name in a manifest): stand-ins where LIBERO's own are not there."""
    try:
        libero_files.assets_directory()
    except FileNotFoundError:
        return "tests/libero_standins", "stand-in"
    return None, "LIBERO"


def refused(*command):
    """Runs a command that has to fail and returns what it says."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    return done.stderr


def test_record_precompute_train_evaluate(tmp_path):
    tasks, workdir, (directory, kind) = ",".join(TASKS), tmp_path / "run", assets()
    said = run(
        "-m",
        "lightwam_jax.envs.record",
        "--suite",
        "libero",
        "--tasks",
        tasks,
        "--episodes",
        "2",
        "--env",
        json.dumps(FAST | {"assets": directory}),
        "--out",
        str(tmp_path / "episodes"),
    )
    assert said.count("2 kept of") == 2
    about = json.loads(
        (tmp_path / "episodes" / "meta" / "recording.json").read_text(encoding="utf-8")
    )
    assert about["environment"]["assets"] == kind and {*about["tried"]} == {*TASKS}

    config = [
        "--config",
        "configs/libero_standin.py:object",
        f"--config.data.path={tmp_path / 'episodes'}",
        f"--config.data.cache={tmp_path / 'cache'}",
        *(f"--config.{key}={value}" for key, value in TINY.items()),
    ]
    run("-m", "lightwam_jax.precompute", *config, "--what", "all")
    run("train.py", *config, "--workdir", str(workdir))
    evaluate = [
        "evaluate.py",
        "--workdir",
        str(workdir),
        "--mode",
        "libero",
        "--tasks",
        tasks,
        "--episodes",
        "1",
        "--env",
    ]
    out = run(*evaluate, json.dumps({"image_size": 32, "assets": directory}))
    assert all(name in out for name in ("expert", "spatial ", "object ", *TASKS))

    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert summary["episodes"] == 2 and summary["errors"] == 0
    assert {*summary["tasks"]} == {*TASKS} and [*summary["groups"]] == ["object", "spatial"]
    assert all(task["expert"]["episodes"] == 1 for task in summary["tasks"].values())
    environment = summary["manifest"]["environment"]
    assert environment["assets"] == kind and environment["protocol"]["name"] == "lightwam"
    for suite in summary["groups"]:
        unlike = summary["published"][suite]
        assert [*unlike] == ["not_comparable"]
        assert any("stand-in" in reason for reason in unlike["not_comparable"]) == (
            kind == "stand-in"
        )
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert ("stand-in" in page) == (kind == "stand-in") and "not comparable" in page
    assert "data:video/mp4;base64," in page
    assert "498/500" not in page and "491/500" not in page, "those published of LIBERO itself"
    for suite, (task, number) in zip(summary["groups"], TASKS.items()):
        theirs = json.loads((workdir / f"summary_libero_{suite}.json").read_text(encoding="utf-8"))
        assert theirs.get("assets", "LIBERO") == kind
        (name,) = theirs["task_results"]
        assert name == f"libero_{suite}_{number}"
        assert theirs["task_results"][name]["task_description"] == task.replace("_", " ")

    # Without assets nothing runs, and the user is told where to get them.
    error = refused(*evaluate, json.dumps({"assets": str(tmp_path)}))
    assert "git clone https://github.com/Lifelong-Robot-Learning/LIBERO" in error


def test_recording_without_assets_says_how_to_get_them(tmp_path):
    error = refused(
        "-m",
        "lightwam_jax.envs.record",
        "--suite",
        "libero",
        "--tasks",
        next(iter(TASKS)),
        "--env",
        json.dumps({"assets": str(tmp_path)}),
        "--out",
        str(tmp_path / "episodes"),
    )
    assert "git clone https://github.com/Lifelong-Robot-Learning/LIBERO" in error
    assert not (tmp_path / "episodes").exists()
