"""Batches: the same whatever the processes and restarts, normalised, complete, exact epochs."""

import collections
import dataclasses
import itertools
import pathlib
import subprocess
import sys

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
    (tmp_path / "config.json").write_text(config_lib.to_json(config), encoding="utf-8")
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
