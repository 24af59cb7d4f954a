"""Checkpoints of a run in a bucket (in memory), of a few numbers."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import bucket as bucket_lib
from lightwam_jax import sharding
from lightwam_jax.checkpoint import places, storage, working_copy
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.training import workdir
from tests import buckets, synthetic

CONFIG = synthetic.make_config(**{"data.source": "fake", "data.cache": "",
                                  "train.checkpoint_every": 2, "train.keep_last": 2,
                                  "train.keep_every": 4})  # fmt: skip
FROZEN = {"f": np.arange(4, dtype=np.float32)}
TARGETS = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)},
           "frozen": {"f": jax.ShapeDtypeStruct((4,), jnp.float32)}}  # fmt: skip


@pytest.fixture
def address(monkeypatch, tmp_path):
    monkeypatch.setattr(working_copy, "SCRATCH", str(tmp_path / "scratch"))
    return buckets.in_memory(monkeypatch)


@pytest.fixture
def run(address, tmp_path):
    """Opens the run on a machine of its own; what is open at the end is closed."""
    opened = []

    def on(machine):
        place = places.opened(address, tmp_path / machine)
        (place.path / "assets").mkdir(exist_ok=True)
        (place.path / "assets" / "stats.json").write_text("{}", encoding="utf-8")
        opened.append((place, place.checkpoints(CONFIG, place.path / "assets")))
        return opened[-1][1]

    yield on
    for place, checkpoints in opened:
        checkpoints.close()
        place.close()


def save(checkpoints, *steps):
    for step in steps:
        items = {"params": {"w": jnp.full(3, float(step))}}
        checkpoints.save(step, items, lambda: jax.tree.map(jnp.asarray, FROZEN), {"window": []})
    checkpoints.wait()


def restored(checkpoints):
    places = sharding.tree_shardings(sharding.single_device_mesh(), TARGETS)
    items, meta = checkpoints.restore(sharding.with_shardings(TARGETS, places))
    assert items["params"]["w"].tolist() == [meta["step"]] * 3
    np.testing.assert_array_equal(items["frozen"]["f"], FROZEN["f"])
    return meta["step"]


def alter(address, step):
    bucket = bucket_lib.Bucket(address)
    name = max(bucket.sizes(f"checkpoints/{step}/params"), key=bucket.sizes().get)
    content = bytearray(bucket.read(name))
    content[len(content) // 2] ^= 1
    bucket.write(name, bytes(content))


def test_what_was_saved_is_continued_elsewhere(run, address):
    first = run("first")
    save(first, 2, 4, 6, 8, 10)
    assert first.latest_step() == 10
    assert [p.name for p in first.directory.iterdir() if p.name.isdigit()] == ["10"]
    second = run("second")
    assert second.steps() == [4, 8, 10]  # the last two, and multiples of four
    assert restored(second) == 10
    save(second, 12)
    assert second.steps() == [4, 8, 10, 12]
    stored = checkpoint.load_params(address)
    assert stored.meta["step"] == 12 and stored.params["f"].tolist() == FROZEN["f"].tolist()
    assert (stored.assets / "stats.json").exists()
    assert checkpoint.load_params(f"{address}/checkpoints/4").params["w"].tolist() == [4] * 3


def test_damaged_newest_is_marked_and_the_one_before_is_used(run, address, caplog):
    save(run("first"), 1, 2, 3)
    alter(address, 3)
    second = run("second")
    assert restored(second) == 2
    assert f"Checkpoint 3 is damaged: {address}/checkpoints/3/params/" in caplog.text
    assert second.steps() == [2]
    assert bucket_lib.Bucket(address).read("checkpoints/3/damaged.json")
    save(second, 3)  # the run comes by again
    assert restored(run("third")) == 3


def test_another_config_is_refused_before_a_checkpoint_is_fetched(run, address, tmp_path):
    first = run("first")
    workdir.write_reports(CONFIG, first.workdir, [])
    save(first, 1)
    place = places.opened(address, tmp_path / "second")
    workdir.check_same_run(CONFIG, place.path, place.started())
    other = dataclasses.replace(CONFIG, seed=7)
    with contextlib.closing(place), pytest.raises(ValueError, match=r"config.seed: 42 so far, 7 n"):
        workdir.check_same_run(other, place.path, place.started())
    assert not places.opened(address + "2", tmp_path / "second").started()


def test_converted_weights_are_read_from_a_bucket(address, tmp_path):
    params = {"w": np.arange(3, dtype=np.float32)}
    checkpoint.save_params(tmp_path / "w", params, {"source": "a.pt"})
    files = [p for p in (tmp_path / "w").rglob("*") if p.is_file()]
    bucket = bucket_lib.Bucket(address)
    bucket.put({p.relative_to(tmp_path / "w").as_posix(): p for p in files})
    stored = checkpoint.load_params(address)
    assert stored.meta["source"] == "a.pt" and stored.params["w"].tolist() == [0, 1, 2]


def test_all_damaged_is_an_error_that_names_the_bucket(run, address):
    save(run("first"), 1)
    alter(address, 1)
    with pytest.raises(ValueError, match=f"none of the checkpoints in {address}/checkpoints is"):
        restored(run("second"))


def test_a_network_that_fails_damages_nothing(run, address, monkeypatch):
    save(run("first"), 1)
    second = run("second")

    def fails(self, files):
        raise bucket_lib.BucketError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(bucket_lib.Bucket, "get", fails)
        with pytest.raises(bucket_lib.BucketError, match="no route to host"):
            restored(second)
    assert restored(run("third")) == 1


def test_an_upload_that_fails_is_one_error_and_the_step_before_counts(run, monkeypatch):
    checkpoints = run("first")
    save(checkpoints, 1)

    def fails(self, *args):
        raise bucket_lib.BucketError("no route to host")

    monkeypatch.setattr(working_copy.WorkingCopy, "upload", fails)
    with pytest.raises(storage.SaveError, match=r"no route to host\n  the newest .* is step 1;"):
        save(checkpoints, 2)
    monkeypatch.undo()


def test_a_directory_is_what_it_was(tmp_path):
    place = places.opened(tmp_path / "run")
    assert place.path == tmp_path / "run" and str(place) == str(tmp_path / "run")
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, keep_every=0))
    checkpoints = place.checkpoints(config, None)
    assert type(checkpoints) is checkpoint.Checkpoints
    checkpoints.close()
    with place.published(), places.reading(str(tmp_path), 7) as here:
        assert here == tmp_path
