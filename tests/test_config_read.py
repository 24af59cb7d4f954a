"""Reading configs: allowed values, unknown keys, and what was made before version 0.2.0."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data.caches import journal
from lightwam_jax.training import workdir

ROOT = Path(__file__).parent.parent


def tree(**changes):
    """The defaults as a nested dict; a__b=1 sets a.b."""
    found = config_lib.defaults("tiny")
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return found


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data__orientation=["up"]), r"data.orientation\[0\] is 'up'; expected one of ''"),
        (dict(data__action_as=("delta",)), r"data.action_as\[0\] is 'delta'; .* 'delta_state'"),
        (dict(model__layer_sources=[["x"]]), r"layer_sources\[0\]\[0\] is 'x'; .*'adapted'"),
        (dict(data__canvas=(64,)), r"config.data.canvas is \(64,\); expected 2 values"),
        (dict(data__cameras=("a", 3)), r"cameras\[1\] is 3 \(int\); expected str"),
        (dict(data__cameras="scene"), r"cameras is 'scene' \(str\); expected tuple"),
        (dict(loss__downsample=True), "downsample is True; expected one of 1, 2, 4"),
        (dict(data__source="demo"), "'demo'; .*; since version 0.2.0 it is data.source=lerobot"),
        (dict(data__pixels=True), "pixels is not a config key; since .* it is data.encode_online"),
        (
            dict(data__mixture={"my-arm": {"fields": {"colour": "bgr"}}}),
            "data.fields.channel_order",
        ),
        (dict(demo={}), "config.demo is not .* the flags of lightwam_jax.envs.record"),
        (dict(data__colour="bgr"), "colour is not a config key; known keys: "),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        config_lib.from_config_dict(tree(**changes))


def test_values_are_of_the_types_of_the_annotations():
    read = config_lib.from_config_dict(
        tree(data__gripper_closed_open=[1, -1], optimizer__lr=1, data__canvas=[64, 64])
    )
    assert read.data.gripper_closed_open == (1.0, -1.0) and read.data.canvas == (64, 64)
    assert isinstance(read.data.gripper_closed_open[0], float) and read.optimizer.lr == 1.0
    assert config_lib.from_config_dict(base.get_config("tiny")) == config_lib.Config(
        model=config_lib.model_variant("tiny")
    )


OLD = tree(
    data__pixels=False, data__member="", data__fields__colour="rgb", evaluation__replan=10, demo={}
)
REFUSED = (
    r"was made before version 0.2.0, when config keys had other names \(data.pixels is now "
    r"data.encode_online; data.member is now data.dataset; data.fields.colour is now "
    r"data.fields.channel_order; evaluation.replan is now evaluation.replan_steps; demo is now the "
    r"flags of lightwam_jax.envs.record\): train it again, or use the version it was made with$"
)


def test_old_checkpoints_are_refused(tmp_path):
    params = {"w": np.zeros(2, np.float32)}
    checkpoint.save_params(tmp_path / "7", params, {"config": OLD})
    with pytest.raises(ValueError, match=f"/7 {REFUSED}"):
        checkpoint.load_params(tmp_path / "7")


def test_keys_that_came_later_have_their_defaults_in_saved_configs(tmp_path):
    without = tree()
    del without["data"]["action_kinds"]
    checkpoint.save_params(tmp_path / "7", {"w": np.zeros(2, np.float32)}, {"config": without})
    assert checkpoint.load_params(tmp_path / "7").config == config_lib.from_config_dict(tree())
    with pytest.raises(ValueError, match=r"config\.data lacks action_kinds"):
        config_lib.from_config_dict(without)  # a config that is written now has to have it
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(without), encoding="utf-8")
    workdir.check_same_run(config_lib.from_config_dict(tree()), tmp_path)


def test_old_runs_are_not_continued(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(OLD), encoding="utf-8")
    with pytest.raises(ValueError, match=REFUSED):
        workdir.check_same_run(config_lib.from_config_dict(tree()), tmp_path)


def test_old_logs_of_episodes_are_not_called_damaged(tmp_path):
    """Their lines have other keys too; the manifest is read first."""

    def damaged(entry):
        raise ValueError(entry)

    path = tmp_path / "trained.jsonl"
    path.write_text('{"manifest": {"replan": 4}}\n{"digest": 3}\n', encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"before version 0\.2\.0.*replan_steps\): delete it, or go"
    ):
        journal.Journal(path, {"replan_steps": 4}, "go elsewhere", damaged)
    assert path.read_bytes() == before
    path.write_text('{"manifest": {"replan_steps": 4}}\n{"digest": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        journal.Journal(path, {"replan_steps": 4}, "go elsewhere", damaged)


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_flags_name_what_they_need(tmp_path):
    given = ("evaluate.py", "--workdir", str(tmp_path))
    modes = "the modes are demo, libero, metaworld, open_loop, realtime, visualize\n"
    assert run(*given) == (2, f"error: --mode is needed; {modes}")
    assert run(*given, "--mode=video") == (2, f"error: --mode video: unknown; {modes}")
    given = ("train.py", "--config=configs/demo.py", "--workdir", str(tmp_path))
    code, said = run(*given, "--config.train.steps=5", "--config.evaluation.replan=3")
    new = "since version 0.2.0 it is evaluation.replan_steps"
    assert (code, said) == (2, f"error: config.evaluation.replan is not a config key; {new}\n")
