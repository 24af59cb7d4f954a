"""Mistakes in flags and configs: one line, exit code 2, before anything slow or written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app, flags
from ml_collections import config_flags

from configs import base
from lightwam_jax import command_line, config_read
from lightwam_jax import config as config_lib

ROOT = Path(__file__).parent.parent
DEMO = f"--config={ROOT}/configs/demo.py"


def parse(*arguments, config=True):
    argv, values = ["train.py", *arguments], flags.FlagValues()
    if config:
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_integer("samples", 1, "", lower_bound=1, flag_values=values)
    return command_line.parse(argv, values), values


def problem(*arguments, **options):
    with pytest.raises(config_read.ConfigError) as caught:
        parse(*arguments, **options)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps=3"], "there is no flag --steps; did you mean --config.train.steps?"),
        (["--train.steps=3"], "did you mean --config.train.steps?"),
        (["--batch_sise=3"], "did you mean --config.train.batch_size?"),
        (["--lr=1"], "did you mean --config.optimizer.lr?"),
        (["--eps=1"], "--config.model.eps or --config.optimizer.eps?"),
        (["--wrkdir=x"], "there is no flag --wrkdir; did you mean --workdir?"),
        (["--zzzzzz"], "there is no flag --zzzzzz; --help lists the flags"),
        (["--samples=0"], "--samples=0"),
        (["--config.train.stps=3"], "config.train.stps is not a config key; did you mean 'steps'?"),
        (["--config.trian.steps=3"], "config.trian is not a config key; did you mean 'train'?"),
        (["--config.train.steps.x=3"], "config.train.steps is a value and has no keys"),
        (["--config.train.steps=many"], "invalid literal for int() with base 10: 'many'"),
        (["--config.train.steps=1.5"], "1.5"),
        (["--config.data.canvas=3"], "config.data.canvas is (3,); expected 2 values"),
        (["--config.data.canvas=(3,"], "canvas"),
        (["--config.optimizer.lr=fast"], "fast"),
    ],
)
def test_wrong_flags_are_one_line(arguments, words):
    assert words in problem(DEMO, *arguments)


def test_flags_without_a_config():
    assert problem("--config.train.steps=3") == "--config.train.steps needs --config=FILE as well"
    assert "did you mean --workdir?" in problem("--work_dir=3", config=False)
    rest, values = parse(DEMO, "--config.train.steps=3", "more")
    assert rest == ["train.py", "more"] and values.config.train.steps == 3
    needed = flags.IllegalFlagValueError(
        "flag --workdir=None: Flag --workdir must have a value other than None."
    )
    assert command_line._short(needed) == "--workdir is needed; --help says more"


@pytest.mark.parametrize(
    "place, words",
    [
        ("configs/dmo.py", "no such file; did you mean configs/demo.py?"),
        ("nothing.py", "no such file; there are configs/ablations.py, configs/base.py"),
        ("configs/libero.py:kitchen", "kitchen: expected one of spatial, object, goal, 10, all"),
        ("configs/hdf5_robot.py:nobody", "nobody"),
        ("configs/demo.py:x", "x: expected one of state_fusion, flow_dit"),
        ("configs/metaworld.py:x", "get_config takes no :ARGUMENT"),
        ("configs", "no such file"),
    ],
)
def test_configs_that_are_not_there(place, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = problem(f"--config={place}")
    assert words in said and place.partition(":")[0] in said
    assert problem("--config", place) == said


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config():\n  return undefined\n", "line 2: NameError: name 'undefined'"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n  return None\n", "returned a NoneType; expected a ConfigDict"),
        ("def get_config(name):\n  return name\n", "needs an argument"),
        ("def get_config():\n  return {}['a']\n", "line 2: KeyError: 'a'"),
        ("def get_config():\n  return int('a')\n", "line 2: ValueError: invalid literal"),
        (
            "from configs import base\ndef get_config():\n  c = base.get_config()\n"
            "  c.train.steps = 'many'\n  return c\n",
            "line 4: TypeError",
        ),
        (
            "from configs import base\ndef get_config():\n  return base.get_config('huge')\n",
            "line 3: ValueError: model variant 'huge' is unknown",
        ),
    ],
)
def test_errors_in_config_files_name_the_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    said = problem(f"--config={path}")
    assert words in said and str(path) in said


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("data.val_fraction", 1.0, "val_fraction is 1.0; expected 0 to below 1"),
        ("data.val_fraction", -0.1, "val_fraction"),
        ("data.val_fraction", float("nan"), "val_fraction is nan"),
        ("data.frame_stride", 0, "frame_stride is 0; expected 1 or more"),
        ("data.action_horizon", -8, "action_horizon"),
        ("data.num_frames", 0, "num_frames"),
        ("data.text_len", 0, "text_len"),
        ("data.canvas", (0, 64), "canvas is (0, 64)"),
        ("data.camera_size", (-1, 64), "camera_size"),
        ("data.prefetch", 0, "prefetch"),
        ("data.workers", -1, "workers"),
        ("data.fields.fps", -1.0, "fields.fps"),
        ("data.gripper_dims", (7,), "gripper_dims names [7]; the actions have dimensions 0 to 6"),
        ("data.gripper_dims", (-1,), "gripper_dims"),
        ("data.prompt_template", "do it", "has no {task}"),
        ("data.prompt_template", "do {task} {now}", "has {now}"),
        ("data.augment.crop", 0.0, "crop is 0.0; expected above 0 to 1"),
        ("train.steps", 0, "train.steps is 0; expected 1 or more"),
        ("train.steps", -5, "train.steps"),
        ("train.batch_size", 0, "batch_size is 0"),
        ("train.log_every", 0, "log_every"),
        ("train.keep_last", -1, "keep_last"),
        ("train.stuck_after_s", -1.0, "stuck_after_s is -1.0; expected 0 to 1e+06"),
        ("optimizer.lr", 0.0, "lr is 0.0; expected above 0"),
        ("optimizer.lr", -1e-3, "lr is -0.001"),
        ("optimizer.lr", float("nan"), "lr is nan"),
        ("optimizer.lr", float("inf"), "lr is inf"),
        ("optimizer.b2", 1.0, "b2"),
        ("optimizer.ema_decay", 1.5, "ema_decay"),
        ("optimizer.accum_steps", 0, "accum_steps"),
        ("optimizer.warmup_steps", -1, "warmup_steps"),
        ("loss.lambda_action", -1.0, "lambda_action"),
        ("evaluation.episodes", 0, "episodes"),
        ("evaluation.replan_steps", 0, "replan_steps"),
        ("evaluation.workers", 0, "evaluation.workers"),
        ("model.num_layers", 0, "num_layers"),
        ("model.adapter_layers", (99,), "adapter_layers names [99]"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_values_out_of_range_are_named(key, value, words):
    tree = base.get_config("tiny")
    with tree.unlocked():
        tree.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError) as caught:
        config_lib.from_config_dict(tree)
    assert words in str(caught.value) and f"config.{key}" in str(caught.value)


def test_a_directory_that_cannot_be_written_is_refused_and_none_is_made(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(config_read.ConfigError, match=r"--out=.*file is no directory"):
            command_line.check_directory(place, "--out")
    command_line.check_directory(tmp_path / "new" / "deeper", "--out")
    for check in (command_line.check_directory, command_line.check_new):
        with pytest.raises(config_read.ConfigError, match=r"gs://.*expected a directory, not an"):
            check("gs://bucket/run", "--out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(config_read.ConfigError, match="no right to write"):
        command_line.check_directory(tmp_path / "new", "--out")


def test_usage_errors_are_one_line(capsys):
    for raised, code, words in (
        (app.UsageError("unexpected"), 2, "error: unexpected\n"),
        (config_read.ConfigError("wrong"), 2, "error: wrong\n"),
    ):
        with pytest.raises(SystemExit) as ended, command_line.one_line():
            raise raised
        assert ended.value.code == code and capsys.readouterr().err == words


# Each command in a fork of one process, in which nothing slow is imported yet.
_FORKS = """
import os, runpy, shlex, sys
import absl.app, ml_collections, numpy
for line in sys.stdin.read().splitlines():
    if not (pid := os.fork()):
        sys.argv = shlex.split(line)
        run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            slow = sorted({"jax", "torch", "tensorflow", "orbax", "grain"} & set(sys.modules))
            print(f"[{ended.code} {' '.join(slow)}]", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
_MISTAKES = {
    "train.py --config configs/demo.py --workdir OUT --steps=3": "--config.train.steps",
    "train.py --config configs/demo.py --workdir OUT --config.optimizer.lr=-1": "lr is -1",
    "train.py --config configs/demo.py --workdir FILE": "FILE is no directory",
    "train.py --config configs/demo.py --workdir hdfs://b/run": "hdfs:// is not supported",
    "train.py --config configs/demo.py --workdir OUT --profile=x": "FIRST:LAST",
    "train.py --config configs/demo.py": "--workdir is needed",
    "evaluate.py --workdir DIR --mode demo --env=3": "--env=3: expected JSON",
    "evaluate.py --workdir http://b/run --mode demo": "http:// is not supported",
    "evaluate.py --workdir DIR --mode demo --out gs://b/run": "expected a directory, not an",
    "evaluate.py --workdir OUT --mode demo": "no such directory",
    "evaluate.py --mode demo": "--workdir is needed",
    "evaluate.py --mode demo --workdir DIR --out FILE": "FILE is no directory",
    "lightwam_jax.precompute --config configs/none.py": "no such file",
    "lightwam_jax.precompute": "--config is needed",
    "lightwam_jax.envs.record --suite demo": "--out is needed",
    "lightwam_jax.inference.server --prt=3": "did you mean --port?",
    "lightwam_jax.inference.skew --samples=0 --workdir DIR": "--samples=0",
}


def test_every_command_says_it_in_one_line_before_the_slow_imports(tmp_path):
    (tmp_path / "file").touch()
    places = {"OUT": tmp_path / "out", "FILE": tmp_path / "file", "DIR": tmp_path}

    def filled(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    done = subprocess.run(
        [sys.executable, "-c", _FORKS],
        input="\n".join(map(filled, _MISTAKES)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(_MISTAKES), done.stdout
    for said, ended, words in zip(lines[::2], lines[1::2], _MISTAKES.values()):
        assert said.startswith("error: ") and filled(words) in said and ended == "[2 ]"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, count", [([], 0), (["--verbosity=0"], 1)])
def test_what_libraries_report_of_every_file_is_not_shown(given, count):
    script = (
        "from absl import logging\n"
        "from lightwam_jax import command_line\n"
        "def main(argv):\n"
        "    logging.info('Finished load')\n"
        "    logging.warning('Damaged')\n"
        "command_line.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("Finished load") == count and done.stderr.count("Damaged") == 1
