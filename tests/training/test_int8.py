"""Training with int8 kernels in the frozen blocks: the step, its checkpoint, the way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from lightwam_jax import params as params_lib
from lightwam_jax import sharding
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.models import quantized
from lightwam_jax.training import loop, losses, memory
from lightwam_jax.training import step as step_lib
from tests import synthetic
from tests.inference.test_policy import random_params

CONFIG = synthetic.make_config(**{
    "data.source": "fake", "data.cache": "", "data.canvas": (32, 32), "data.text_len": 4,
    "model.num_layers": 1, "model.adapter_layers": (0,), "model.lora_layers": (0,),
    "model.dtype": "float32", "model.frozen_dtype": "int8", "model.remat": "linears",
    "train.batch_size": 4, "optimizer.warmup_steps": 1, "mesh.fsdp": 2})  # fmt: skip


def is_int8(tree):
    flat = params_lib.flatten(tree)
    return {path for path, x in flat.items() if x.dtype == jnp.int8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A step on two devices that share the kernels, and its checkpoint, saved and restored.

    {"before", "after", "row", "batch", "restored", "directory", "meta"}.
    """
    model, optimizer, shapes = step_lib.state_shapes(CONFIG)
    mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SPLIT_BYTES", 0)
        places = sharding.tree_shardings(mesh, shapes)
        params = random_params(model, CONFIG.model, seed=0)
        start = jax.jit(lambda params: step_lib.init_state(params, CONFIG, optimizer))
        before = jax.device_get(start(params))
        rng = np.random.default_rng(1)
        batch = {
            name: rng.normal(0, 0.3, x.shape).astype(x.dtype)
            for name, x in step_lib.batch_shapes(CONFIG).items()
        }
        step = step_lib.make_train_step(model, CONFIG, optimizer, places)
        state = jax.device_put(before, places)
        kernel = state.frozen["dit"]["blocks_0"]["ffn"]["0"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 2
        after, row = step_lib.jit_train_step(step, places)(state, sharding.put_batch(batch, mesh))

        workdir = tmp_path_factory.mktemp("int8")
        checkpoints = checkpoint.Checkpoints(workdir, CONFIG)
        frozen = lambda: params_lib.canonical(after.frozen)
        checkpoints.save(1, step_lib.state_items(after), frozen, {"window": [], "next_batch": 1})
        checkpoints.wait()
        restored, meta = loop._restore(checkpoints, CONFIG, mesh, shapes, places)
        checkpoints.close()
    after, row, restored = jax.device_get((after, row, restored))
    return dict(before=before, after=after, row=row, batch=batch, restored=restored, meta=meta,
                directory=workdir)  # fmt: skip


def test_a_step_is_that_of_the_kernels_that_the_integers_stand_for(run):
    before, after = run["before"], run["after"]
    kernels = is_int8(before.frozen)
    assert len(kernels) == 10 and all("dit/blocks_0/" in path for path in kernels)
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert {x.dtype.name for x in jax.tree.leaves(after.frozen)} == {"int8", "float32", "bfloat16"}

    model, _, _ = step_lib.state_shapes(CONFIG)
    key = jax.random.fold_in(jax.random.key(CONFIG.seed), 0)
    noise = losses.draw_noise(key, run["batch"]["latents"].shape, CONFIG.loss)

    @jax.jit
    def loss_and_norm(frozen):
        def loss(trainable):
            tree = params_lib.merge(trainable, frozen)
            return losses.training_loss(model, tree, run["batch"], noise, CONFIG.loss)[0]

        value, grads = jax.value_and_grad(loss)(before.trainable)
        return value, jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(grads)))

    loss, norm = loss_and_norm(quantized.dequantized(before.frozen))
    np.testing.assert_allclose(run["row"]["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(run["row"]["grad_norm"], norm, rtol=1e-4)
    learned = jax.tree.map(lambda a, b: bool((a != b).any()), before.trainable, after.trainable)
    assert any(jax.tree.leaves(learned))


def test_the_checkpoint_has_the_same_integers(run):
    after, restored = run["after"], run["restored"]
    jax.tree.map(np.testing.assert_array_equal, after.frozen, restored.frozen)
    assert is_int8(restored.frozen) == is_int8(after.frozen)
    stored = run["meta"]["arrays"]["frozen"]
    assert stored["dit/blocks/ffn/0/kernel"][1] == "int8"
    assert stored["dit/blocks/ffn/0/kernel_scale"][1] == "float32"


def test_a_run_starts_from_the_kernels_of_another(run):
    """Rounded twice, they stay what they were; the kernels that they stand for do as well."""
    given = checkpoint.load_params(run["directory"]).params
    want = params_lib.flatten(run["after"].frozen)
    for tree in (given, quantized.dequantized(given)):
        frozen = _started_from(tree)
        assert set(frozen) == set(want)
        for path, x in frozen.items():
            assert x.dtype == want[path].dtype
            np.testing.assert_allclose(
                np.float32(x), np.float32(want[path]), rtol=1e-6, err_msg=path
            )


def _started_from(given):
    model, optimizer, _ = step_lib.state_shapes(CONFIG)
    random = random_params(model, CONFIG.model, seed=5)
    start = lambda given: step_lib.start_state(model, CONFIG, optimizer, given).frozen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib.build, "init_params", lambda *_: random)
        return params_lib.flatten(jax.jit(start)(given))


def test_exported_weights_are_what_the_integers_stand_for(run, tmp_path, monkeypatch):
    written = {}
    keep = lambda out, tensors, meta: written.update(tensors)
    monkeypatch.setattr(convert.files, "write_checkpoint", keep)
    convert.export(run["directory"], tmp_path / "out.pt", say=lambda text: None)
    kernel = run["after"].frozen["dit"]["blocks_0"]["cross_attn"]["k"]
    want = np.float32(kernel["kernel"][0]) * kernel["kernel_scale"][0]
    names = [name for name in written if name.endswith("blocks.0.cross_attn.k.weight")]
    assert len(names) == 1 and not [name for name in written if "scale" in name]
    np.testing.assert_allclose(written[names[0]], want.T, rtol=1e-6)


def test_half_the_memory_is_planned():
    model = dataclasses.replace(CONFIG.model, frozen_dtype="bfloat16")
    configs = CONFIG, dataclasses.replace(CONFIG, model=model)
    mesh, planned, shapes = sharding.single_device_mesh(), [], []
    for config in configs:
        shapes.append(step_lib.state_shapes(config)[2])
        places = sharding.tree_shardings(mesh, shapes[-1])
        planned.append(memory.held(config, shapes[-1], places)["frozen"])
    flat = params_lib.flatten(shapes[0].frozen)
    saved = sum(flat[path].size for path in is_int8(shapes[0].frozen))
    scales = sum(4 * x.size for path, x in flat.items() if path.endswith(quantized.SCALE))
    assert planned[0] == planned[1] - saved + scales and saved > 10 * scales
