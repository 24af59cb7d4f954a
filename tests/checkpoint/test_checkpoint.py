"""Checkpoints of a stand-in state: round trips, damage, other meshes, other models."""

import dataclasses
import errno
import json
import os
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lightwam_jax import build, sharding
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from tests import synthetic

CONFIG = synthetic.make_config(**{"data.source": "fake", "data.cache": "", "train.keep_last": 3,
                                  "model.num_layers": 2, "model.adapter_layers": (0,),
                                  "model.lora_layers": (0, 1),
                                  "optimizer.ema_decay": 0.9})  # fmt: skip
OPTIMIZER = optimizer_lib.make_optimizer(CONFIG.optimizer, CONFIG.train.steps)


def mesh(devices=8, fsdp=1):
    return sharding.make_mesh(config_lib.MeshConfig(-1, fsdp, "sharded"), jax.devices()[:devices])


def random_params(config):
    """A few of the tiny model's parameters, of every group."""
    model = build.build_model(config.model)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config.model))
    kept = re.compile(
        r"blocks_\d+/self_attn/q/|/adapters_0/|dit/head/|trunk.*bias|proprio|text_emb"
    )
    flat = {k: x for k, x in params_lib.flatten(shapes).items() if kept.search(k)}
    rng = np.random.default_rng(0)
    return params_lib.unflatten(
        {k: jnp.asarray(rng.standard_normal(x.shape, np.float32)) for k, x in flat.items()}
    )


@pytest.fixture(scope="module")
def state():
    made = step_lib.init_state(random_params(CONFIG), CONFIG, OPTIMIZER)
    moments = {
        name: jax.tree.map(lambda x, n=number: x + n, tree)
        for number, (name, tree) in enumerate(optimizer_lib.moments(made.opt_state).items(), 1)
    }
    return dataclasses.replace(
        made, opt_state=optimizer_lib.with_moments(made.opt_state, moments, jnp.int32(7))
    )


def save(checkpoints, state, *steps):
    for step in steps:
        shifted = dataclasses.replace(
            state, trainable=jax.tree.map(lambda x, s=step: x + s, state.trainable)
        )
        checkpoints.save(
            step,
            step_lib.state_items(shifted),
            lambda: params_lib.canonical(state.frozen),
            {"window": [], "next_batch": step},
        )
    checkpoints.wait()


def targets(state, mesh):
    items = step_lib.state_items(state) | {"frozen": params_lib.canonical(state.frozen)}
    return sharding.with_shardings(items, sharding.tree_shardings(mesh, items))


def flip_one_byte(directory):
    """Alters the middle of the largest array file below `directory`."""
    file = max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A run with checkpoints 1, 2, 3 whose parameters differ by their step."""
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "assets").mkdir()
    (workdir / "assets" / "dataset_stats.json").write_text("{}", encoding="utf-8")
    checkpoints = checkpoint.Checkpoints(workdir, CONFIG, assets=workdir / "assets")
    save(checkpoints, state, 1, 2, 3)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A private copy of `saved`."""
    storage.copy_files(saved, tmp_path)
    for step in (1, 2, 3):  # copy_files leaves Orbax's own marks out
        for part in (tmp_path / "checkpoints" / str(step)).iterdir():
            if part.is_dir():
                (part / storage.COMMIT_FILE).touch()
        (tmp_path / "checkpoints" / str(step) / storage.COMMIT_FILE).touch()
    return tmp_path


def restore(workdir, state, config=CONFIG, on=None):
    checkpoints = checkpoint.Checkpoints(workdir, config, assets=workdir / "assets")
    try:
        return checkpoints.restore(targets(state, on or mesh()))
    finally:
        checkpoints.close()


def assert_is(items, state, step):
    expected = step_lib.state_items(state)
    for name, tree in expected.items():
        shift = step if name == "params" else 0
        jax.tree.map(
            lambda a, b, s=shift: np.testing.assert_array_equal(a, b + s), items[name], tree
        )


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 1), (4, 2), (1, 1)])
def test_restores_the_newest_on_any_mesh(saved, state, devices, fsdp):
    items, meta = restore(saved, state, on=mesh(devices, fsdp))
    assert meta["step"] == 3
    assert_is(items, state, 3)
    shapes = jax.eval_shape(lambda: state)
    back = step_lib.state_from_items(items, jnp.int32(3), shapes, CONFIG.model)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back.frozen, state.frozen)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 3), back.trainable,
                 state.trainable)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, back.ema, state.ema)
    for name, number in (("mu", 1), ("nu", 2)):
        for x in jax.tree.leaves(optimizer_lib.moments(back.opt_state)[name]):
            np.testing.assert_array_equal(x, number)
    counts = optax.tree_utils.tree_get_all_with_path(back.opt_state, "count")
    assert [int(count) for _, count in counts] == [
        3,
        3,
    ] and back.step == 3  # Adam's, the schedule's
    assert not back.halted
    assert back.frozen["dit"] and jax.tree.leaves(back.frozen)[0].dtype == jnp.bfloat16


def test_checkpoint_is_a_whole_policy(saved, state):
    policy = checkpoint.load_params(saved)
    assert policy.config == CONFIG
    assert policy.meta["step"] == 3 and policy.path.name == "3"
    assert (policy.assets / "dataset_stats.json").read_text(encoding="utf-8") == "{}"
    in_memory = params_lib.segmented(policy.params, policy.config.model)
    jax.tree.map(np.testing.assert_array_equal, in_memory, step_lib.eval_params(state))  # the EMA
    assert checkpoint.load_params(saved / "checkpoints" / "2").meta["step"] == 2


def frozen_files(workdir):
    """{step: inodes of its frozen parameters}."""
    return {
        int(path.name): {file.stat().st_ino for file in (path / "frozen" / "d").iterdir()}
        for path in (workdir / "checkpoints").iterdir()
    }


def test_frozen_parameters_are_on_disk_once(saved):
    files = frozen_files(saved)
    assert sorted(files) == [1, 2, 3] and files[1] == files[2] == files[3] != set()


def test_frozen_parameters_outlive_the_checkpoint_they_were_restored_from(workdir, state):
    shutil.rmtree(workdir / "frozen_params")  # as in a copy of a run: the checkpoints are whole
    before = frozen_files(workdir)
    checkpoints = checkpoint.Checkpoints(workdir, CONFIG, assets=workdir / "assets")
    checkpoints.restore(targets(state, mesh(1)))

    def again():
        raise AssertionError("they are on disk already")

    for step in (4, 5, 6, 7):
        checkpoints.save(step, step_lib.state_items(state), again, {})
    checkpoints.close()
    files = frozen_files(workdir)
    assert sorted(files) == [5, 6, 7]  # keep_last=3: step 3, which was restored, is gone
    assert files[5] == files[6] == files[7] == before[3]
    items, meta = restore(workdir, state, on=mesh(1))
    assert meta["step"] == 7
    jax.tree.map(np.testing.assert_array_equal, items["frozen"], params_lib.canonical(state.frozen))


def small(step):
    return {"params": {"w": jnp.full(3, float(step))}}


@pytest.mark.parametrize(("last", "every", "kept"), [(1, 4, {4, 8, 12, 14}), (2, 0, {12, 14}),
                                                     (0, 0, {2, 4, 6, 8, 10, 12, 14})])  # fmt: skip
def test_multiples_of_keep_every_are_kept_besides_the_last(tmp_path, last, every, kept):
    config = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, keep_last=last, keep_every=every)
    )
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    for step in range(2, 15, 2):
        checkpoints.save(step, small(step), None, {})
    checkpoints.close()
    assert {int(p.name) for p in checkpoints.directory.iterdir()} == kept
    assert checkpoint.find_checkpoint(tmp_path).name == "14"  # the newest, not the last by name


def test_saving_goes_on_while_the_run_does(tmp_path, monkeypatch):
    may_write, original = threading.Event(), ocp.JsonCheckpointHandler._save_fn

    async def held_back(*args):
        assert may_write.wait(60)
        await original(*args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", held_back)
    checkpoints, items = checkpoint.Checkpoints(tmp_path, CONFIG), small(5)
    checkpoints.save(1, items, None, {})
    items["params"]["w"].delete()  # it returned: the next step may overwrite the arrays ...
    assert not (checkpoints.directory / "1").exists()  # ... while the files are being written
    may_write.set()
    checkpoints.close()
    assert checkpoint.load_params(tmp_path).params["w"].tolist() == [5, 5, 5]


def test_full_disk_is_one_error_and_the_step_before_stays(tmp_path, monkeypatch):
    async def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)
    checkpoints.save(1, small(1), None, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
        with pytest.raises(storage.SaveError, match=r"No space left on device\n.* is step 1;"):
            checkpoints.save(2, small(2), None, {})
            checkpoints.wait()
        checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)
    assert checkpoints.latest_step() == 1
    checkpoints.save(3, small(3), None, {})  # not 2: here, its threads may still be writing
    checkpoints.close()
    assert checkpoint.load_params(tmp_path).params["w"].tolist() == [3, 3, 3]


def test_what_a_killed_save_left_is_removed_at_once(tmp_path):
    left = tmp_path / "checkpoints" / f"4{ocp.utils.TMP_DIR_SUFFIX}"
    (left / "params").mkdir(parents=True)
    (left / "params" / "manifest.ocdbt").touch()
    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)
    assert not list((tmp_path / "checkpoints").iterdir())
    checkpoints.close()


def _truncate(directory):
    file = max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def _lose_manifest(directory):
    (directory / "params" / "manifest.ocdbt").unlink()


def _lose_item(directory):
    for file in sorted((directory / "optimizer").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def _break_meta(directory):
    (directory / "meta" / "metadata").write_text('{"format": 1, "st', encoding="utf-8")


def _alter_meta(directory):
    file = directory / "meta" / "metadata"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"format": 1', '"format": 3'), encoding="utf-8")  # one bit
    assert file.read_text(encoding="utf-8") != text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.parametrize("damage", [flip_one_byte, _truncate, _lose_manifest, _lose_item,
                                    _break_meta, _alter_meta])  # fmt: skip
def test_damaged_newest_falls_back_loudly(workdir, state, damage, caplog):
    damage(workdir / "checkpoints" / "3")
    items, meta = restore(workdir, state)
    assert meta["step"] == 2
    assert_is(items, state, 2)
    assert "Checkpoint 3 is damaged" in caplog.text
    assert (workdir / "damaged_checkpoints" / "3").is_dir()
    assert not (workdir / "checkpoints" / "3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_any_file_altered_or_cut_gives_a_whole_step_or_none(saved, state, tmp_path, cut):
    """The newest if the file does not matter, else the one before; never anything else."""
    newest, rng, outcomes = saved / "checkpoints" / "3", np.random.default_rng(3), {}
    for number, file in enumerate(sorted(p for p in newest.rglob("*") if p.is_file())):
        workdir, name = tmp_path / str(number), file.relative_to(newest)
        shutil.copytree(saved, workdir)
        data = bytearray(file.read_bytes())
        at = int(rng.integers(len(data))) if data else 0
        if cut:
            data = data[:at]
        elif data:
            data[at] ^= 1 << int(rng.integers(8))
        (workdir / "checkpoints" / "3" / name).write_bytes(data)
        items, meta = restore(workdir, state, on=mesh(1))
        assert_is(items, state, meta["step"])
        jax.tree.map(
            np.testing.assert_array_equal, items["frozen"], params_lib.canonical(state.frozen)
        )
        assert meta["next_batch"] == meta["step"]
        outcomes[str(name)] = meta["step"]
        shutil.rmtree(workdir)
    print(outcomes)
    assert set(outcomes.values()) == {2, 3}


def test_all_damaged_is_an_error_not_a_fresh_start(workdir, state):
    for step in (1, 2, 3):
        _break_meta(workdir / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is intact"):
        restore(workdir, state)


def test_flipped_byte_is_found_by_the_policy_too(workdir):
    flip_one_byte(workdir / "checkpoints" / "3" / "ema")
    with pytest.raises(storage.DamagedCheckpointError, match=r"differ from what|cannot be"):
        checkpoint.load_params(workdir)


def test_another_model_is_refused_with_its_keys_and_shapes(saved, state):
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, adapter_dim=24))
    other = step_lib.init_state(random_params(wide), wide, OPTIMIZER)
    with pytest.raises(ValueError, match="another model") as error:
        restore(saved, other, wide)
    assert "config.model.adapter_dim: 16 in the checkpoint, 24 now" in str(error.value)
    assert "dit/adapters_0" in str(error.value)


def test_parameters_alone(tmp_path):
    params = {"dit": {"blocks": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}},
              "expert": {"b": np.float32([1, 2])}}  # fmt: skip
    meta = {"source": "a.pt", "config": {"model": {"dim": 3}}}
    checkpoint.save_params(tmp_path / "out", params, meta)
    policy = checkpoint.load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, policy.params, params)
    assert policy.config is None and policy.assets is None
    assert policy.meta["source"] == "a.pt" and policy.meta["config"]["model"]["dim"] == 3


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load_params(tmp_path)


def test_object_storage_is_refused_rather_than_taken_for_a_directory():
    for call in (
        lambda path: checkpoint.Checkpoints(path, CONFIG),
        lambda path: checkpoint.save_params(path, {}),
    ):
        with pytest.raises(ValueError, match="gs://bucket/run is object storage"):
            call("gs://bucket/run")
    with pytest.raises(ValueError, match="hdfs:// is not supported; expected a directory, gs:"):
        checkpoint.find_checkpoint("hdfs://bucket/run")


def test_checksum_sees_every_bit_and_no_mesh():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.bfloat16)
    reference = int(storage.checksums({"x": x})["x"])
    spread = jax.device_put(x, jax.NamedSharding(mesh(fsdp=2), jax.P(("data", "fsdp"))))
    assert int(storage.checksums({"x": spread})["x"]) == reference
    assert int(storage.checksums({"x": x[::-1]})["x"]) != reference
    bits = np.asarray(x).view(np.uint16).copy()
    bits[5, 3] ^= 1
    assert int(storage.checksums({"x": jnp.asarray(bits.view(jnp.bfloat16))})["x"]) != reference


def test_config_differences_are_dotted():
    old = json.loads(config_lib.to_json(CONFIG))
    new = json.loads(config_lib.to_json(dataclasses.replace(CONFIG, seed=1)))
    assert checkpoint.config_differences(old, new) == {"seed": (42, 1)}
    assert checkpoint.config_differences(old, old) == {}
