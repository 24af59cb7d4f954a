"""The directory of a run: which configs continue it, and what goes into it."""

import dataclasses
import json
import os

import ml_dtypes
import numpy as np
import pytest

from lightwam_jax import config as config_lib
from lightwam_jax.training import not_finite, workdir
from tests import synthetic

MAY = """name evaluation.episodes evaluation.env mesh.data mesh.fsdp mesh.frozen
    optimizer.accum_steps data.workers data.threads data.prefetch data.codec_weights
    data.text_weights data.action_kinds model.remat model.scan_unroll model.attention train.steps
    train.log_every
    train.eval_every train.eval_batches train.checkpoint_every train.keep_last train.keep_every
    train.stuck_after_s"""
MAY_NOT = """seed optimizer.lr optimizer.ema_decay optimizer.warmup_steps data.path data.cache
    data.encode_online data.text_len data.augment.crop model.dtype model.lora_rank
    model.attention_mask train.batch_size train.init train.trainable loss.shift demo.workers
    train.steps_more rename data.workers.more"""


@pytest.mark.parametrize("keys, may", [(MAY, True), (MAY_NOT, False)])
def test_what_may_change_leaves_the_next_step_as_it_was(keys, may):
    wrong = [key for key in keys.split() if bool(workdir.MAY_CHANGE.match(key)) != may]
    assert not wrong


@pytest.fixture
def config(tmp_path):
    made = synthetic.make_config(tmp_path)
    assets = tmp_path / "cache" / "assets"
    (assets / "text").mkdir(parents=True)
    (assets / "stats.json").write_text("{}", encoding="utf-8")
    (assets / "text" / "prompts").write_text("a", encoding="utf-8")
    return made


def batch():
    return {
        "actions": np.arange(6, dtype=np.float32).reshape(3, 2),
        "latents": np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16),
        "index": np.arange(3),
    }


def test_assets_are_those_of_the_cache_and_one_row_of_a_batch(config, tmp_path):
    for _ in range(2):  # the second time in place of the first
        workdir.write_assets(config, tmp_path / "run", batch())
    assets = tmp_path / "run" / "assets"
    assert (assets / "text" / "prompts").read_text(encoding="utf-8") == "a"
    assert sorted(p.name for p in assets.iterdir()) == ["example_batch.npz", "stats.json", "text"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["assets"]
    example = np.load(assets / "example_batch.npz")
    assert example["actions"].tolist() == [[0, 1]] and example["index"].tolist() == [0]
    assert example["latents"].dtype == np.float32 and example["latents"].tolist() == [[0, 1]]


def test_a_run_continues_on_its_own_cache_and_config_only(config, tmp_path, caplog):
    run = tmp_path / "run"
    workdir.check_same_run(config, run)  # nothing there yet
    workdir.write_reports(config, run, [("lora", 5, 3), ("total", 5, 3)])
    workdir.write_assets(config, run, batch())
    assert config_lib.from_json((run / "config.json").read_text(encoding="utf-8")) == config
    assert json.loads((run / "params.json").read_text(encoding="utf-8"))[0] == {
        "group": "lora",
        "total": 5,
        "trainable": 3,
    }
    other = dataclasses.replace(config, seed=43)
    (run / "checkpoints").mkdir()
    workdir.check_same_run(other, run)  # started, nothing saved
    (run / "checkpoints" / "4").mkdir()
    workdir.check_same_run(config, run)
    with pytest.raises(ValueError, match=r"config\.seed: 42 so far, 43 now"):
        workdir.check_same_run(other, run)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    assert "learning-rate schedule" not in caplog.text
    workdir.check_same_run(longer, run)
    assert f"from {config.train.steps} to 9: the learning-rate schedule" in caplog.text
    prompts, copy = (
        place / "text" / "prompts" for place in (tmp_path / "cache/assets", run / "assets")
    )
    prompts.write_text("b", encoding="utf-8")  # of the same size, and as old
    os.utime(prompts, ns=(copy.stat().st_atime_ns, copy.stat().st_mtime_ns))
    with pytest.raises(ValueError, match=r"prompts is not what the run .* the cache was rebuilt"):
        workdir.check_same_run(config, run)


def test_what_is_known_of_a_bad_step_is_kept(tmp_path):
    batch = {"index": np.array([1, 2]), "actions": np.array([[0.0], [np.inf]])}
    row = {"loss": float("nan")}
    said = not_finite.report(synthetic.make_config(), tmp_path, tmp_path / "6", 7, batch, row)
    assert "step 7 is not finite: loss nan\n" in said and "Repair them, rebuild" in said
    assert json.loads((tmp_path / "not_finite.json").read_text(encoding="utf-8")) == {
        "step": 7,
        "samples": [1, 2],
        "not_finite_data": ["actions of [2]"],
        "metrics": {"loss": "nan"},
    }
