"""Mixtures of datasets: exact shares, statistics of their own, the same samples after a kill."""

import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from lightwam_jax import config as config_lib
from lightwam_jax import precompute
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import assets, loader, spec
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import text as text_lib
from tests import synthetic
from tests.data.test_loader import GUARD, ROOT, assert_equal, batches


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three parts of one dataset, seven of another, with statistics of their own."""
    return make_mixture(tmp_path_factory.mktemp("mixture"))


def make_mixture(directory, **overrides):
    entries = {
        "arm": {"path": "arm", "weight": 0.3},
        "bimanual": {
            "path": "bimanual",
            "weight": 0.7,
            "normalization": "z_score",
            "delta_mask": (True,) * 6 + (False,),
        },
    }
    made = synthetic.make_config(
        directory,
        **{
            "data.mixture": entries,
            "data.check_frames": "none",
            "train.batch_size": 10,
            **overrides,
        },
    )

    def read(config):
        return synthetic.make_episodes(6 if config.data.path == "arm" else 7), []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", read)
        precompute.precompute(made, ("stats", "text", "latents"))
    return made


def test_a_mixture_has_exact_shares_and_whole_epochs_of_each_dataset(mixture):
    sizes = [
        latent_cache.open_cache(dataset.config).size("train")
        for dataset in config_lib.datasets(mixture)
    ]
    count = 2 * max(size / share for size, share in zip(sizes, (3, 7))) + 1
    got = batches(mixture, int(count))
    rows = [[], []]
    for batch in got:
        spec.check_batch(batch, mixture)
        assert collections.Counter(batch["dataset"].tolist()) == {0: 3, 1: 7}
        for dataset, row in zip(batch["dataset"], batch["index"]):
            rows[dataset].append(int(row))
    for size, seen in zip(sizes, rows):
        first, second = seen[:size], seen[size : 2 * size]
        assert sorted(first) == sorted(second) == list(range(size))
        assert first != second != list(range(size))
    assert rows[0][: sizes[0]] != [row for row in rows[1] if row < sizes[0]][: sizes[0]]


def test_datasets_have_their_own_statistics_and_transforms(mixture):
    directory = assets.assets_directory(mixture)
    datasets = [dataset.config for dataset in config_lib.datasets(mixture)]
    for batch in [*batches(mixture, 2), *loader.val_batches(mixture)]:
        for row, (number, index) in enumerate(zip(batch["dataset"], batch["index"])):
            opened = latent_cache.open_cache(datasets[number])
            record = opened.source("val" if "valid" in batch else "train")[int(index)]
            _, state, action = assets.load_normalizers(directory, datasets[number])
            np.testing.assert_array_equal(batch["latents"][row], record["latents"])
            np.testing.assert_array_equal(batch["proprio"][row], state.normalize(record["proprio"]))
            actions = actions_lib.from_config(datasets[number]).forward(
                record["actions"], record["proprio"], record["action_is_pad"]
            )
            np.testing.assert_array_equal(batch["actions"][row], action.normalize(actions))
            prompt = text_lib.prompt(
                opened.meta["tasks"][record["task"]], mixture.data.prompt_template
            )
            context, _ = assets.load_text(directory, mixture).table([prompt], 24)
            np.testing.assert_array_equal(batch["context"][row], context[0])


def test_a_policy_speaks_the_units_of_one_dataset(mixture):
    """What `Policy.load(embodiment=...)` does with the config and assets of a checkpoint."""
    for dataset in config_lib.datasets(mixture):
        own = config_lib.of_embodiment(mixture, dataset.name)
        assert own == dataset.config
        loaded = assets.load_assets(assets.assets_directory(mixture), own)
        _, state, action = assets.load_normalizers(assets.assets_directory(mixture), own)
        np.testing.assert_array_equal(loaded.state.scale, state.scale)
        np.testing.assert_array_equal(loaded.action.offset, action.offset)
        assert loader.val_batches(own)[0]["latents"].shape[0] == 10  # open loop, on its own windows
    for wanted in ("", "humanoid"):
        with pytest.raises(ValueError, match="none of those of this run: 'arm', 'bimanual'"):
            config_lib.of_embodiment(mixture, wanted)
    alone = config_lib.datasets(mixture)[0].config
    assert config_lib.of_embodiment(alone) == alone


def test_a_mixture_is_a_function_of_seed_and_step(mixture):
    spec.check_batch(spec.fake_batch(mixture, 2), mixture)
    whole = batches(mixture, 6)
    assert_equal(batches(mixture, 1, start_step=5)[0], whole[5])
    halves = [batches(mixture, 6, process_index=p, process_count=2) for p in range(2)]
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves]
        assert_equal(batch, {name: np.concatenate([p[name] for p in parts]) for name in batch})
    other = dataclasses.replace(mixture, seed=mixture.seed + 1)
    assert (batches(other, 1)[0]["index"] != whole[0]["index"]).any()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0), (0.2, 0.3, 0.5), (0.1, 0.7, 1 / 3)])
def test_shares_are_even_and_exact(weights):
    shares = loader._Shares(weights)
    counts, wanted = np.zeros(len(weights)), np.array(weights) / sum(weights)
    for index in range(2000):
        dataset, number = shares[index]
        assert number == counts[dataset]
        counts[dataset] += 1
        assert (abs(counts - wanted * (index + 1)) < len(weights)).all()
    far = 10**15
    dataset, number = shares[far]
    assert abs(number - far * wanted[dataset]) < len(weights)


def test_shares_are_those_of_grain_where_it_is_exact():
    sets = [grain.MapDataset.range(dataset * 1000, dataset * 1000 + 1000) for dataset in range(3)]
    for weights in ((1.0, 2.0, 1.5), (3.0, 1.0, 1.0)):
        theirs = grain.MapDataset.mix(sets, weights)
        shares = loader._Shares(weights)
        for index in range(300):
            dataset, number = shares[index]
            assert theirs[index] == dataset * 1000 + number


def test_validation_takes_held_out_windows_of_every_dataset(mixture):
    sizes = [
        latent_cache.open_cache(dataset.config).size("val")
        for dataset in config_lib.datasets(mixture)
    ]
    wide = dataclasses.replace(mixture, train=dataclasses.replace(mixture.train, eval_batches=100))
    for run, counts in (
        (wide, sizes),
        (
            dataclasses.replace(mixture, train=dataclasses.replace(mixture.train, eval_batches=1)),
            (5, 5),
        ),
    ):
        seen = collections.Counter()
        for batch in loader.val_batches(run):
            spec.check_batch(batch, run)
            seen.update(
                zip(
                    batch["dataset"][batch["valid"]].tolist(),
                    batch["index"][batch["valid"]].tolist(),
                )
            )
        assert max(seen.values()) == 1
        assert [sum(dataset == m for dataset, _ in seen) for m in (0, 1)] == list(counts)


# Notes which samples every step got and, at the step KILL, kills itself as nothing can prevent.
RECORDER = (
    GUARD
    + """
import json, multiprocessing, os, pathlib, signal
import train
from absl import app
from lightwam_jax.data import loader

original, seen, kill = loader.train_loader, pathlib.Path("seen.jsonl"), int(os.environ["KILL"])

class Recorded:
    def __init__(self, config, process_index, process_count, step):
        self.batches, self.step = original(config, process_index, process_count, step), step

    def __next__(self):
        batch = next(self.batches)
        workers = [child.pid for child in multiprocessing.active_children()]
        row = [self.step, batch["dataset"].tolist(), batch["index"].tolist(), workers]
        with seen.open("a") as file:
            file.write(json.dumps(row) + chr(10))
        if self.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self.step += 1
        return batch

    def close(self):
        self.batches.close()
        check()

if __name__ == "__main__":
    loader.train_loader = Recorded
    app.run(train.main)
"""
)


@pytest.mark.slow
def test_killed_training_resumes_with_exactly_the_samples_that_were_left(tmp_path):
    """Through train.py, with a mixture and two worker processes; these die with the training."""
    steps, every, kill = 12, 3, random.randint(7, 10)
    config = make_mixture(
        tmp_path,
        **{
            "data.workers": 2,
            "data.prefetch": 40,
            "train.steps": steps,
            "train.log_every": 4,
            "train.checkpoint_every": every,
            "train.eval_every": 0,
            "model.num_layers": 1,
            "model.adapter_layers": (0,),
            "model.lora_layers": (0,),
        },
    )
    (tmp_path / "recorder.py").write_text(RECORDER, encoding="utf-8")
    (tmp_path / "tiny.py").write_text(
        "import json\nimport ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({config_lib.to_json(config)!r}))\n",
        encoding="utf-8",
    )
    logs, log = [], tmp_path / "seen.jsonl"
    for at, code in ((kill, -signal.SIGKILL), (-1, 0)):
        done = subprocess.run(
            [sys.executable, "recorder.py", "--config=tiny.py", "--workdir=run"],
            cwd=tmp_path,
            env=os.environ | {"KILL": str(at), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        logs.append([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()])
        log.unlink()

    single = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    wanted = [
        [step, batch["dataset"].tolist(), batch["index"].tolist()]
        for step, batch in enumerate(batches(single, steps))
    ]
    killed, resumed = ([row[:3] for row in log] for log in logs)
    assert killed == wanted[: kill + 1]
    start = resumed[0][0]
    assert start in (kill // every * every, kill // every * every - every)
    assert resumed == wanted[start:]

    workers = logs[0][-1][3]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the training"
        time.sleep(0.1)
