"""Recording with the demo's expert, which needs no simulator of its own; Meta-World: see there."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lightwam_jax.data import doctor, lerobot
from lightwam_jax.evaluation import record, worker
from lightwam_jax.evaluation.envs import demo
from tests import synthetic

ROOT = pathlib.Path(__file__).parent.parent


def config_of(path):
    return synthetic.make_config(
        path.parent,
        **{
            "data.source": "lerobot",
            "data.path": str(path),
            "data.check_frames": "all",
            "model.action_dim": 4,
            "model.proprio_dim": 5,
        },
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A data set of three episodes, recorded through the command line."""
    out = tmp_path_factory.mktemp("record") / "episodes"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lightwam_jax.evaluation.record",
            "--suite",
            "demo",
            "--episodes",
            "3",
            "--first_seed",
            "5",
            "--noise",
            "0.3",
            "--workers",
            "2",
            "--env",
            '{"image_size": 32}',
            "--out",
            str(out),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_projects_own_reader_and_doctor_accept_it(recorded):
    path, said = recorded
    config = config_of(path)
    found, problems = lerobot.read(config)
    assert len(found) == 3 and not problems
    assert not [p for p in doctor.examine(config).problems if p.severity == "error"]
    assert json.loads((path / "meta" / "info.json").read_text())["codebase_version"] == "v2.1"
    about = json.loads((path / "meta" / "recording.json").read_text())
    assert about["first_seed"] == 5 and about["tried"]["tabletop"] >= 3
    assert f"3 kept of {about['tried']['tabletop']}" in said
    assert about["environment"]["versions"]["mujoco"]


def test_recorded_is_what_happened(recorded):
    """States and pictures of the disturbed episode, beside the expert's undisturbed actions."""
    episode = lerobot.read(config_of(recorded[0]))[0][0]
    env = demo.make(image_size=32)
    success, prompt, arrays = record.demonstrate(env, worker.Episode("tabletop", 0, 5), 0.3, 60)
    assert success and prompt == episode.task
    np.testing.assert_array_equal(arrays["state"], episode.state)
    np.testing.assert_array_equal(arrays["action"], episode.action)
    shown = episode.frames("scene", [0, episode.length - 1]).astype(float)
    assert np.abs(shown - arrays["scene"][[0, -1]]).mean() < 8, "H.264 loses a little"
    _, _, clean = record.demonstrate(env, worker.Episode("tabletop", 0, 5), 0.0, 60)
    assert not np.array_equal(clean["state"][:20], arrays["state"][:20]), "nothing was disturbed"


def test_mistakes_are_told_before_anything_is_recorded(recorded):
    with pytest.raises(FileExistsError, match="exists"):
        record.record("demo", ("all",), 1, recorded[0], image_size=16)
    with pytest.raises(ValueError, match="no task juggle"):
        record.record("demo", ("juggle",), 1, recorded[0].parent / "other")
    with pytest.raises(ValueError, match="no suite 'none'; expected one of demo, libero"):
        record.record("none", ("all",), 1, recorded[0].parent / "other")
    with pytest.raises(TypeError, match="bogus"):  # as where a simulator's files are missing
        record.record("demo", ("all",), 1, recorded[0].parent / "other", bogus=1)
    assert not list(recorded[0].parent.glob("other*"))


def test_recorders_and_suites_import_neither_jax_nor_a_simulator():
    code = (
        "import sys; from lightwam_jax.evaluation import envs, record, worker\n"
        "from lightwam_jax.evaluation.envs import metaworld\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'jax', 'flax', 'metaworld', 'gymnasium', 'mujoco'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
