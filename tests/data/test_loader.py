"""Batches: the same whatever the processes and restarts, normalised, complete, exact epochs."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
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

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    mask = (True,) * 6 + (False,)
    made = synthetic.make_config(tmp_path_factory.mktemp("data"), **{"data.delta_mask": mask})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(), []))
        precompute.precompute(made, ("stats", "text", "latents"))
    return made


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three parts of one data set, seven of another, with statistics of their own."""
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


def batches(config, count, **kwargs):
    iterator = loader.train_loader(config, **kwargs)
    out = list(itertools.islice(iterator, count))
    iterator.close()
    return out


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_fit_the_contract_and_the_records(config):
    source = latent_cache.open_cache(config).source("train")
    directory = assets.assets_directory(config)
    _, state, action = assets.load_normalizers(directory, config)
    tasks = latent_cache.open_cache(config).meta["tasks"]
    for batch in batches(config, 2):
        spec.check_batch(batch, config)
        for row, index in enumerate(batch["index"]):
            record = source[int(index)]
            np.testing.assert_array_equal(batch["latents"][row], record["latents"])
            np.testing.assert_array_equal(batch["proprio"][row], state.normalize(record["proprio"]))
            raw = actions_lib.zero_padded_deltas(
                record["actions"], record["action_is_pad"], config.data.delta_mask
            )
            np.testing.assert_array_equal(batch["actions"][row], action.normalize(raw))
            prompt = text_lib.prompt(tasks[record["task"]], config.data.prompt_template)
            context, mask = assets.load_text(directory, config).table([prompt], 24)
            np.testing.assert_array_equal(batch["context"][row], context[0])
            np.testing.assert_array_equal(batch["context_mask"][row], mask[0])


def test_two_processes_share_each_batch_in_order(config):
    whole = batches(config, 4)
    halves = [batches(config, 4, process_index=p, process_count=2) for p in range(2)]
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves]
        assert_equal(batch, {name: np.concatenate([p[name] for p in parts]) for name in batch})


def test_a_batch_may_be_a_single_sample(config):
    one = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1))
    singles = [batch["index"][0] for batch in batches(one, 2 * config.train.batch_size)]
    whole = np.concatenate([batch["index"] for batch in batches(config, 2)])
    np.testing.assert_array_equal(singles, whole)


def test_starting_at_a_step_equals_skipping_to_it(config):
    whole = batches(config, 8)
    for step, batch in enumerate(batches(config, 3, start_step=5), start=5):
        assert_equal(batch, whole[step])
    late = batches(config, 1, process_index=1, process_count=2, start_step=7)[0]
    np.testing.assert_array_equal(late["index"], whole[7]["index"][2:])


def test_epochs_are_permutations_and_differ(config):
    size = latent_cache.open_cache(config).size("train")
    count = 2 * size // config.train.batch_size + 1
    index = np.concatenate([b["index"] for b in batches(config, count)])
    first, second = index[:size], index[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size))
    assert first.tolist() != second.tolist() != list(range(size))


def test_seed_decides_the_order(config):
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert (batches(config, 1)[0]["index"] != batches(other, 1)[0]["index"]).any()


def test_threads_do_not_change_the_order(config):
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=0))
    for a, b in zip(batches(config, 3), batches(single, 3), strict=True):
        assert_equal(a, b)


@pytest.mark.slow
def test_worker_processes_do_not_change_the_order(config):
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    for a, b in zip(batches(config, 5), batches(workers, 5), strict=True):
        assert_equal(a, b)


def test_validation_covers_the_held_out_windows_once(config):
    held_out = latent_cache.open_cache(config).size("val")
    wide = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=6, eval_batches=100)
    )
    got = loader.val_batches(wide)
    assert len(got) == -(-held_out // 6)
    seen = collections.Counter()
    for batch in got:
        spec.check_batch(batch, wide)
        seen.update(batch["index"][batch["valid"]].tolist())
    assert seen == collections.Counter(range(held_out))
    assert not got[len(got) - 1]["valid"].all() or held_out % 6 == 0
    for number, batch in enumerate(got):
        parts = [loader.val_batches(wide, p, 2)[number] for p in range(2)]
        assert_equal(batch, {name: np.concatenate([p[name] for p in parts]) for name in batch})


def test_validation_is_bounded_and_spread(config):
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=1))
    index = np.concatenate([batch["index"] for batch in loader.val_batches(few)])
    assert index[0] == 0 and index[-1] == latent_cache.open_cache(config).size("val") - 1
    none = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=0))
    assert len(loader.val_batches(none)) == 0


def test_fake_source_reads_no_files(tmp_path):
    config = synthetic.make_config(tmp_path / "nothing", **{"data.source": "fake"})
    whole = batches(config, 4)
    for batch in whole:
        spec.check_batch(batch, config)
    assert_equal(whole[3], batches(config, 1, start_step=3)[0])
    half = batches(config, 1, process_index=1, process_count=2)[0]
    np.testing.assert_array_equal(half["latents"], whole[0]["latents"][2:])
    held_out = loader.val_batches(config)
    spec.check_batch(held_out[0], config)
    assert len(held_out) == 4 and held_out[0]["valid"].all()


def test_batch_size_must_divide(config):
    with pytest.raises(ValueError, match="batch_size=4 does not divide over 3 processes"):
        loader.train_loader(config, process_count=3)


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


# A program that ends where training imported what it must not. tensorboardX alone tries torch, and
# is told that there is none.
GUARD = """
import sys
import traceback

class Guard:
    def find_spec(self, name, path, target=None):
        if name == "torch" and "tensorboardX" in str(traceback.extract_stack()):
            raise ModuleNotFoundError(name)

def check():
    assert not {"torch", "tensorflow"} & set(sys.modules)

sys.meta_path.insert(0, Guard())
"""


def test_a_fresh_train_py_reads_a_cache_without_tensorflow_and_torch(config, tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    code = (
        GUARD
        + """
import train
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
config = config_lib.from_json(open(sys.argv[1]).read())
batches = loader.train_loader(config)
assert len(next(batches)["latents"]) == len(loader.val_batches(config)[0]["latents"]) == 4
batches.close()
check()
"""
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "config.json"], cwd=ROOT, check=True)


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
    (tmp_path / "recorder.py").write_text(RECORDER)
    (tmp_path / "tiny.py").write_text(
        "import json\nimport ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({config_lib.to_json(config)!r}))\n"
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
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
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
