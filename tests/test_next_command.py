"""The next command that each command prints: it keeps the config, and it parses."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import demo, hdf5_robot, lerobot_robot
from lightwam_jax import command_line, next_command
from lightwam_jax import config as config_lib
from tests.test_command_line import _FORKS

ROOT = Path(__file__).parent.parent
SPLITS = [{"train": [1] * 19, "val": [1]}, {"train": [1] * 19, "val": [1]}]
ROW = {"kind": "eval", "step": 500, "l1_mean": 0.12345, "steps": 1234.0}


def config(make=lerobot_robot.get_config, name="tiny"):
    return config_lib.from_config_dict(make(name))


def commands(text):
    """The printed commands, without `python`."""
    lines = [line for line in text.splitlines() if line.startswith("next: python ")]
    assert lines and text.splitlines()[-1] == lines[-1]
    return [line.removeprefix("next: python ") for line in lines]


def test_each_stage_leads_to_the_next():
    c, given = config(), ["--config=configs/mine.py:tiny", "--config.data.threads", "3"]
    argv = ["precompute.py", "--what", "stats", *given, "--process_index=0"]
    said = next_command.after_precompute(c, ["stats"], SPLITS, argv)
    kept = shlex.join(given)
    assert said == (
        "split: 38 training and 2 held-out episodes\n"
        f"next: python -m lightwam_jax.precompute {kept} --what all"
    )
    said = next_command.after_precompute(c, ["all"], SPLITS, argv)
    assert said.endswith(f"next: python train.py {kept} --workdir runs/lerobot_tiny")
    said = next_command.after_training(c, "runs/a b", [{"kind": "train"}, ROW])
    assert "L1 0.1235 at step 500" in said and "1,234 held-out actions" in said
    assert said.endswith("next: python evaluate.py --workdir 'runs/a b' --mode open_loop")
    said = next_command.after_open_loop(c, "runs/x")
    assert said == "next: python -m lightwam_jax.inference.server --workdir runs/x"
    said = next_command.after_open_loop(config(demo.get_config, "state_fusion"), "runs/x")
    assert said == "next: python evaluate.py --workdir runs/x --mode demo"


def test_nothing_held_out_is_said():
    said = next_command.after_training(config(), "runs/x", [])
    assert "no episode is held out (config.data.val_fraction)" in said
    said = next_command.after_training(config(demo.get_config, "state_fusion"), "runs/x", [])
    assert said.endswith("--mode demo")


def test_a_large_model_is_told_which_weights_it_needs():
    c, argv = config(hdf5_robot.get_config, "own"), ["x", "--config", "configs/mine.py"]
    said = next_command.after_precompute(c, ["stats"], SPLITS, argv)
    assert "converters vae, t5 (with --tokenizer tokenizer.json)\n" in said
    assert "--config.data.codec_weights=weights/vae" in said
    assert "--config.data.text_weights=weights/umt5" in said
    data = dataclasses.replace(c.data, codec_weights="v", text_weights="t")
    there = dataclasses.replace(c, data=data)
    said = next_command.after_precompute(there, ["stats"], SPLITS, argv)
    assert "weights" not in said
    said = next_command.after_precompute(there, ["all"], SPLITS, argv)
    assert "converters dit\n" in said and "--config.train.init=weights/wan21 " in said


@pytest.mark.parametrize(
    "given",
    [
        ["--config=configs/demo.py"],
        ["--config", "configs/demo.py"],
        ["--config", "configs/demo.py", "--config.data.canvas", "(64, 128)"],
        ["--config", "configs/demo.py", "--config.data.encode_online", "--config.name=a b"],
        ["--config", "configs/demo.py", "--noconfig.data.gripper_snap"],
    ],
)
def test_changed_keys_are_repeated_as_they_were_given(given, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["train.py", "--workdir", "runs/x", *given, "--profile=1:2"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_string("profile", None, "", flag_values=values)
    command_line.parse(argv, values)
    monkeypatch.setattr(flags, "FLAGS", values)
    assert next_command._config_flags(argv) == given


def test_advice_names_the_config_that_was_given():
    argv = ["train.py", "--config=configs/mine.py:tiny", "--workdir", "runs/x"]
    said = next_command.with_config_given("run precompute --config CONFIG --what all", argv)
    assert said == "run precompute --config=configs/mine.py:tiny --what all"
    evaluating = ["evaluate.py", "--workdir", "runs/x"]
    assert "--config CONFIG" in next_command.with_config_given("--config CONFIG", evaluating)


def test_the_printed_commands_parse(tmp_path):
    """Each goes to the command's own flags, `--only_check_args`: they end before any work."""
    argv = ["x", "--config", "configs/hdf5_robot.py", "--config.data.canvas", "(224, 448)"]
    c, workdir = config(hdf5_robot.get_config, "own"), tmp_path / "a run"
    workdir.mkdir()
    said = [next_command.after_precompute(c, [what], SPLITS, argv) for what in ("stats", "all")]
    said += [next_command.after_training(c, workdir, [ROW])]
    said += [next_command.after_open_loop(c, workdir)]
    lines = [command.removeprefix("-m ") for text in said for command in commands(text)]
    assert len(lines) == 4
    done = subprocess.run(
        [sys.executable, "-c", _FORKS],
        input="\n".join(f"{line} --only_check_args" for line in lines),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ended = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line.strip("[]").split()[0] for line in ended] == ["0"] * 4, done.stdout
