"""Whole runs of the tiny model on fake data: kills, restarts, other devices, mistakes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax import sharding
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import loader
from lightwam_jax.training import chips, loop, not_finite, validation
from lightwam_jax.training import metrics as metrics_lib
from lightwam_jax.training import step as step_lib
from tests import synthetic

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = synthetic.make_config(**{
    "data.source": "fake", "data.cache": "", "data.canvas": (32, 32), "data.text_len": 4,
    "model.num_layers": 1, "model.adapter_layers": (0,), "model.lora_layers": (0,),
    "model.dtype": "float32", "optimizer.lr": 1e-3, "optimizer.warmup_steps": 4,
    "optimizer.ema_decay": 0.9, "train.batch_size": 8, "train.steps": 18,
    # Windows of 3 and checkpoints every 4 steps: most restarts happen in the middle of a window.
    "train.log_every": 3, "train.checkpoint_every": 4, "train.eval_every": 6,
    "train.eval_batches": 2})  # fmt: skip
TIMINGS = ("ms_step", "ms_data", "ms_device", "ms_host", "samples_per_s", "mfu",
           "tflop_per_s_per_device")  # fmt: skip


def rows(workdir):
    """The rows of a run without what differs between two equal runs."""
    return [{k: v for k, v in row.items() if k not in TIMINGS}
            for row in metrics_lib.read_rows(workdir / "metrics.jsonl")]  # fmt: skip


def change(**sections):
    """CONFIG with values changed: change(train={"steps": 3})."""
    return dataclasses.replace(CONFIG, **{
        name: dataclasses.replace(getattr(CONFIG, name), **values)
        for name, values in sections.items()})  # fmt: skip


@contextlib.contextmanager
def batches_changed(edit):
    """Passes every training batch through edit(step, batch) before the loop sees it."""
    original = loader.train_loader

    class Edited:
        def __init__(self, config, process_index, process_count, step):
            self._it, self._step = original(config, process_index, process_count, step), step

        def __next__(self):
            batch = edit(self._step, next(self._it))
            self._step += 1
            return batch

        def close(self):
            self._it.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "train_loader", Edited)
        yield


MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs on the first of the fake devices, unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda c: MAKE_MESH(c, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.train(CONFIG, workdir) == loop.Outcome(18, None)
    return workdir


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """CONFIG as a file for --config."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text("import json\nimport ml_collections\n\ndef get_config():\n    text = "
                    f"{config_lib.to_json(CONFIG)!r}\n"
                    "    return ml_collections.ConfigDict(json.loads(text))\n",
                    encoding="utf-8")  # fmt: skip
    return path


def command(config_file, workdir, *flags):
    return [sys.executable, str(ROOT / "train.py"), f"--config={config_file}",
            f"--workdir={workdir}", *flags]  # fmt: skip


def test_run_leaves_everything_it_should(whole):
    train = [row for row in rows(whole) if row["kind"] == "train"]
    assert [row["step"] for row in train] == [3, 6, 9, 12, 15, 18]
    assert all(row["grad_norm"] > 0 for row in train)
    last = rows(whole)[-1]
    assert last["kind"] == "eval" and last["step"] == 18
    assert len(last["l1"]) == len(last["mse"]) == CONFIG.model.action_dim
    assert config_lib.from_json((whole / "config.json").read_text(encoding="utf-8")) == CONFIG
    table = {
        row["group"]: row for row in json.loads((whole / "params.json").read_text(encoding="utf-8"))
    }
    assert 0 < table["total"]["trainable"] < table["total"]["total"]
    assert table["backbone"]["trainable"] == 0
    kept = sorted(int(path.name) for path in (whole / "checkpoints").iterdir())
    assert kept == [16, 18]
    policy = checkpoint.load_params(whole)
    assert policy.config == CONFIG and policy.meta["next_batch"] == 18
    assert "after step 18" in (whole / "training.html").read_text(encoding="utf-8")
    example = np.load(policy.assets / "example_batch.npz")
    assert example["actions"].shape == (1, CONFIG.data.action_horizon, CONFIG.model.action_dim)


def test_a_run_goes_on_in_the_middle_of_a_log_window(whole, tmp_path):
    """From step 16, one step into the window of rows 16 to 18, to the same rows and bits."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "18")
    with batches_changed(lambda step, batch: asked.append(step) or batch):
        asked = []
        assert loop.train(CONFIG, workdir) == loop.Outcome(18, None)
    assert asked == [16, 17]
    assert rows(workdir) == rows(whole)
    a, b = (checkpoint.load_params(path) for path in (workdir, whole))
    assert a.meta["arrays"] == b.meta["arrays"] and a.meta["next_batch"] == 18


def test_validation_is_of_the_average_and_over_all_batches(monkeypatch):
    state = step_lib.TrainState(
        step=jnp.int32(0), halted=jnp.zeros((), bool), trainable={"w": jnp.float32(5)},
        frozen={"f": jnp.float32(100)}, opt_state=None, ema={"w": jnp.float32(7)})  # fmt: skip
    batches = [{"x": np.float32([value]), "index": np.array([0])} for value in (1, 2, 6)]
    run = types.SimpleNamespace(config=CONFIG, mesh=sharding.make_mesh(CONFIG.mesh),
                                encoder=None, model=None, validation=batches)  # fmt: skip

    def errors(model, params, batch, config, grippers, noise):
        assert noise is None, "this head draws no noise"
        assert set(batch) == {"x"}, "the sample ids stay on the host"
        return {"value": params["w"] + params["f"] + batch["x"][0]}

    monkeypatch.setattr(validation, "open_loop_errors", errors)
    monkeypatch.setattr(validation, "mean_errors", lambda sums: [float(s["value"]) for s in sums])
    monkeypatch.setattr(validation, "validation_row", lambda means, grippers: means)
    assert loop._validator(run)(state) == [108, 109, 113]
    without = dataclasses.replace(state, ema=None)
    assert loop._validator(run)(without) == [106, 107, 111]


@pytest.mark.slow  # as are the twenty kills of test_faults.py
def test_killed_and_stopped_run_equals_an_uninterrupted_one(whole, config_file, tmp_path):
    # Killed at a random moment after the first checkpoint had a chance ...
    killed_after = random.randint(1, 4)
    process = subprocess.Popen(command(config_file, tmp_path), cwd=ROOT, start_new_session=True,
                               env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
                               stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while len(metrics_lib.read_rows(tmp_path / "metrics.jsonl")) < killed_after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert rows(tmp_path)[-1]["step"] < 18

    # ... then told to stop, from within, while step 14 is being prepared ...
    def stop(step, batch):
        if step == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with batches_changed(stop):
        assert loop.train(CONFIG, tmp_path) == loop.Outcome(15, signal.SIGTERM)
    assert checkpoint.find_checkpoint(tmp_path).name == "15"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    # ... and finished.
    assert loop.train(CONFIG, tmp_path) == loop.Outcome(18, None)
    assert rows(tmp_path) == rows(whole)
    a, b = (checkpoint.load_params(path).params for path in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_eight_devices_give_the_losses_of_one(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
    loop.train(change(train={"checkpoint_every": 0}), tmp_path)
    for eight, one in zip(rows(tmp_path), rows(whole), strict=True):
        assert eight["step"] == one["step"]
        for name in set(one) - {"kind"}:
            np.testing.assert_allclose(eight[name], one[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_profile_and_utilisation_of_a_window(tmp_path, monkeypatch, capsys):
    peak = chips.Chip(1e12, 1e12, 1e12, 1e12)
    monkeypatch.setattr(chips, "of_kind", lambda kind: peak)
    loop.train(change(train={"steps": 3, "eval_every": 0}), tmp_path, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    row = metrics_lib.read_rows(tmp_path / "metrics.jsonl")[0]
    assert 0 < row["mfu"] == pytest.approx(row["tflop_per_s_per_device"])
    assert "GiB per device by the compiler's report" in capsys.readouterr().out


def test_finished_run_is_left_alone(whole, capsys):
    before = (whole / "metrics.jsonl").read_text(encoding="utf-8")
    assert loop.train(CONFIG, whole) == loop.Outcome(18, None)
    assert "raise config.train.steps" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_text(encoding="utf-8") == before


def test_contradicting_config_is_refused(whole):
    with pytest.raises(ValueError, match="another config") as error:
        loop.prepare(
            change(
                optimizer={"lr": 5.0},
                train={"log_every": 1},
                data={"codec_weights": "moved", "text_weights": "moved"},
            ),
            whole,
        )
    assert "config.optimizer.lr: 0.001 so far, 5.0 now" in str(error.value)
    assert "log_every" not in str(error.value) and "moved" not in str(error.value)
    assert config_lib.from_json((whole / "config.json").read_text(encoding="utf-8")) == CONFIG


def test_step_that_is_not_finite_stops_the_run_with_the_last_good_state(whole, tmp_path):
    def poison(step, batch):
        if step == 7:
            actions = batch["actions"].copy()
            actions[2] = np.nan
            batch = {**batch, "actions": actions, "action_is_pad": batch["action_is_pad"] & False}
        return batch

    with batches_changed(poison), pytest.raises(FloatingPointError) as error:
        loop.train(CONFIG, tmp_path)
    with contextlib.closing(loader.train_loader(CONFIG, start_step=7)) as batches:
        index = next(batches)["index"].tolist()
    for words in ("step 7 is not finite", "loss nan", "grad_norm nan", f"batch: {index}",
                  f"actions of [{index[2]}]", "rebuild the cache"):  # fmt: skip
        assert words in str(error.value)
    kept = json.loads((tmp_path / "not_finite.json").read_text(encoding="utf-8"))
    assert kept["step"] == 7 and kept["samples"] == index
    assert kept["metrics"]["grad_norm"] == "nan" and len(kept["not_finite_data"]) == 1
    good = checkpoint.load_params(tmp_path)
    assert good.meta["step"] == 7 and len(good.meta["window"]) == 1
    assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(good.params))
    assert rows(tmp_path) == [row for row in rows(whole) if row["step"] <= 6]


def test_samples_of_a_mixture_are_named_with_their_data_set():
    mixed = change(data={"source": "lerobot", "mixture": {"arm": {}, "hand": {}}})
    batch = {"index": np.array([3, 3, 0]), "dataset": np.array([1, 0, 1], np.int32)}
    assert not_finite.sample_names(mixed, batch).tolist() == ["hand 3", "arm 3", "hand 0"]


def test_start_from_base_weights(tmp_path, whole):
    given = params_lib.flatten(checkpoint.load_params(whole).params)
    base = {path: np.asarray(x) for path, x in given.items()
            if path.startswith("dit/") and not re.search("lora|adapters", path)}  # fmt: skip
    checkpoint.save_params(tmp_path / "base", params_lib.unflatten(base))
    run = loop.prepare(change(train={"init": str(tmp_path / "base")}), tmp_path / "run")
    run.checkpoints.close()
    head = params_lib.flatten(params_lib.canonical(run.state.trainable))
    for path in [p for p in base if p.startswith("dit/head/")]:
        np.testing.assert_array_equal(head[path], base[path])
    assert jax.tree.leaves(run.state.frozen)[0].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("flags", "words"), [
    (["--config.optimizer.lr=abc"], None),
    (["--config.train.batch_size=12"], "error: config.train.batch_size=12 cannot be split"),
    (["--profile=17"], "error: --profile=17; expected FIRST:LAST"),
    (["--config.train.init=INIT"], "error: INIT"),  # damaged: known late, after the clean-up began
])  # fmt: skip
def test_mistakes_are_one_line(config_file, tmp_path, flags, words):
    # With much to clean up: threads still at work when the program ends would complain after it.
    for step in range(300):
        (tmp_path / "x" / "checkpoints" / f"{step}{ocp.utils.TMP_DIR_SUFFIX}").mkdir(parents=True)
    (tmp_path / "init" / "meta").mkdir(parents=True)
    flags = [flag.replace("INIT", str(tmp_path / "init")) for flag in flags]
    words = words and words.replace("INIT", str(tmp_path / "init"))
    done = subprocess.run(command(config_file, tmp_path / "x", *flags), cwd=ROOT, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0
    if words:
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith(words)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("started", [False, True])
def test_base_weights_that_are_not_there_are_seen_first(tmp_path, started):
    place = types.SimpleNamespace(started=lambda: started)
    config = synthetic.make_config(**{"train.init": str(tmp_path / "wan21")})
    says = r"^config.train.init='.*wan21': no checkpoint in .*python -m converters dit --in"
    with contextlib.nullcontext() if started else pytest.raises(FileNotFoundError, match=says):
        loop._check_init(config, place)  # a run that goes on does not read them


@pytest.mark.parametrize(
    "frozen, source, init, warned",
    [
        ({"blocks": 0}, "lerobot", "", True),
        ({"blocks": 0}, "lerobot", "weights/wan21", False),
        ({"blocks": 0}, "fake", "", False),
        ({}, "lerobot", "", False),
    ],
)
def test_frozen_parameters_that_stay_random_are_a_warning(frozen, source, init, warned):
    config = synthetic.make_config(**{"data.source": source, "train.init": init})
    assert ("WARNING: the frozen ones" in loop._origin(config, frozen)) == warned
