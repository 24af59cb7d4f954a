"""Runs of two processes: the losses of one, checkpoints for any mesh, and one opinion on damage."""

import re
import shutil
import time

import jax
import numpy as np
import pytest

from lightwam_jax import sharding
from lightwam_jax.checkpoint import storage
from lightwam_jax.data import loader
from tests import pod

pytestmark = pytest.mark.slow
MESHES = {"data": (4, 1), "fsdp": (1, 4), "mixed": (2, 2)}


def split_everything(index):
    """The leaves of the tiny model are all below the size from which "fsdp" splits."""
    sharding.MIN_SPLIT_BYTES = 0


def on(mesh, **overrides):
    data, fsdp = mesh
    return pod.make_config(**{"mesh.data": data, "mesh.fsdp": fsdp} | overrides)


def assert_same_losses(workdir, other):
    for row, expected in zip(pod.rows(workdir), pod.rows(other), strict=True):
        assert row["step"] == expected["step"]
        for name in set(expected) - {"kind"}:
            np.testing.assert_allclose(
                row[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    pod.run(on((1, 1)), workdir)
    return workdir


@pytest.fixture(scope="module")
def pods(tmp_path_factory):
    """{mesh: workdir} of two processes with two devices each, checkpoints of steps 3 and 6."""
    workdirs = {}
    for name, mesh in MESHES.items():
        workdirs[name] = tmp_path_factory.mktemp("pods") / name
        said = pod.run(on(mesh), workdirs[name], processes=2, devices=2, before=split_everything)
        assert "2 process(es)" in said
    return workdirs


def halfway(workdir, copy):
    """A copy of a run as it was after step 3."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    return copy


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_give_the_losses_of_one(alone, pods, mesh):
    assert_same_losses(pods[mesh], alone)


@pytest.mark.parametrize(("devices", "mesh"), [(8, (4, 2)), (2, (1, 2)), (1, (1, 1))])
def test_saved_on_four_devices_restored_on_others(alone, pods, tmp_path, devices, mesh):
    workdir = halfway(pods["mixed"], tmp_path / "run")
    said = pod.run(on(mesh), workdir, devices=devices, before=split_everything)
    assert "Continuing from step 3" in said
    assert_same_losses(workdir, alone)


def test_saved_by_one_process_restored_by_two(alone, tmp_path):
    workdir = halfway(alone, tmp_path / "run")
    said = pod.run(on(MESHES["mixed"]), workdir, processes=2, devices=2, before=split_everything)
    assert "Continuing from step 3" in said
    assert_same_losses(workdir, alone)


def alter_what_one_reads(index):
    """Process 1 reads other values than are on disk: what a bad cache of its host would do."""
    split_everything(index)
    read = storage._read_item

    def altered(directory, name, *args):
        tree = read(directory, name, *args)
        if index == 1 and directory.name == "6" and name == "params":
            leaf = next(x for x in jax.tree.leaves(tree) if x.ndim)
            parts = [s.data for s in leaf.addressable_shards]
            wrong = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, [parts[0] + 1, *parts[1:]]
            )
            tree = jax.tree.map(lambda x: wrong if x is leaf else x, tree)
        return tree

    storage._read_item = altered


def hide_an_item_from_one(index):
    """Process 1 cannot read an item at all."""
    read = storage._read_item

    def hidden(directory, name, *args):
        if index == 1 and directory.name == "6" and name == "optimizer":
            raise storage.DamagedCheckpointError("optimizer cannot be read: stale file handle")
        return read(directory, name, *args)

    storage._read_item = hidden


def hide_the_meta_item_from_one(index):
    """Process 1 cannot read the meta item."""
    read = storage.read_meta

    def hidden(directory):
        if index == 1 and directory.name == "6":
            raise storage.DamagedCheckpointError("meta cannot be read: stale file handle")
        return read(directory)

    storage.read_meta = hidden


@pytest.mark.parametrize(
    "damage", [alter_what_one_reads, hide_an_item_from_one, hide_the_meta_item_from_one]
)
def test_damage_seen_by_one_process_turns_all_of_them_back(pods, tmp_path, damage):
    """... and the run ends as if nothing had happened, bit for bit."""
    workdir = tmp_path / "run"
    shutil.copytree(pods["data"], workdir)
    said = pod.run(on(MESHES["data"]), workdir, processes=2, devices=2, before=damage)
    assert len(re.findall("Checkpoint 6 is damaged: process 1: ", said)) == 2, said
    assert "Continuing from step 3" in said
    assert (workdir / "damaged_checkpoints" / "6").is_dir()
    assert pod.arrays(workdir) == pod.arrays(pods["data"])
    assert pod.rows(workdir) == pod.rows(pods["data"])


def test_workdir_that_is_not_shared_is_refused(tmp_path):
    workdirs = [tmp_path / "a", tmp_path / "b"]
    started = pod.Pod(on(MESHES["data"]), workdirs, processes=2, devices=2)
    assert started.finish() == [2, 2], started.output()
    assert started.output().count("error: the processes do not share a directory") == 2


def hold_the_loader_of_one(index):
    """Process 1 gets its fourth batch ten seconds late."""
    if index == 1:
        original = loader.train_loader

        class Held:
            def __init__(self, *args):
                self._it, self._left = original(*args), 3
                self.close = self._it.close

            def __next__(self):
                if not self._left:
                    time.sleep(10)
                self._left -= 1
                return next(self._it)

        loader.train_loader = Held


def test_every_process_says_where_it_stands(tmp_path):
    config = on(MESHES["data"], **{"train.stuck_after_s": 2.0, "train.log_every": 1})
    pod.run(config, tmp_path / "run", processes=2, devices=2, before=hold_the_loader_of_one)
    waits, held = ((tmp_path / f"run.{i}.log").read_text(encoding="utf-8") for i in (0, 1))
    assert re.search("process 0 has made .* after step [34], in phase 'device'", waits), waits
    assert re.search("process 1 has made .* after step 3, in phase 'data'", held), held
    assert "the loader gives no batch" in held and "__next__" in held
