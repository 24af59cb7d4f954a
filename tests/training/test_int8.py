"""Training with int8 kernels in the frozen blocks: the step, the checkpoints, the way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from lightwam_jax import params as params_lib
from lightwam_jax import sharding
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import loader
from lightwam_jax.models import quantized
from lightwam_jax.training import loop, losses, memory, metrics
from lightwam_jax.training import step as step_lib
from tests import synthetic

CONFIG = synthetic.make_config(**{
    "data.source": "fake", "data.cache": "", "data.canvas": (32, 32), "data.text_len": 4,
    "model.num_layers": 2, "model.adapter_layers": (1,), "model.lora_layers": (0, 1),
    "model.dtype": "float32", "model.frozen_dtype": "int8", "model.remat": "linears",
    "train.batch_size": 4, "train.steps": 1, "train.log_every": 1,
    "train.eval_every": 0})  # fmt: skip
MAKE_MESH = sharding.make_mesh


def changed(section, **values):
    values = dataclasses.replace(getattr(CONFIG, section), **values)
    return dataclasses.replace(CONFIG, **{section: values})


def is_int8(tree):
    flat = params_lib.flatten(tree)
    return {path for path, x in flat.items() if x.dtype == jnp.int8}


def one_step(config, monkeypatch):
    """(state before, state after, metrics) of a step on two devices that share the kernels."""
    monkeypatch.setattr(sharding, "MIN_SPLIT_BYTES", 0)
    mesh = MAKE_MESH(config.mesh, jax.devices()[: config.mesh.fsdp])
    model, optimizer, shapes = step_lib.state_shapes(config)
    places = sharding.tree_shardings(mesh, shapes)
    start = jax.jit(lambda: step_lib.start_state(model, config, optimizer), out_shardings=places)
    state = start()
    before = jax.device_get(state)
    step = step_lib.jit_train_step(
        step_lib.make_train_step(model, config, optimizer, places), places
    )
    batch = sharding.put_batch(first_batch(config), mesh)
    kernel = state.frozen["dit"]["blocks_0"]["ffn"]["0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // config.mesh.fsdp
    after, row = jax.device_get(step(state, batch))
    return before, after, row


def first_batch(config):
    batches = loader.train_loader(config, 0, 1, 0)
    batch = next(batches)
    batches.close()
    return {name: x for name, x in batch.items() if name != "index"}


def test_a_step_is_that_of_the_kernels_that_the_integers_stand_for(monkeypatch):
    """Split over two devices, with rematerialisation; the loss is near that of unrounded ones."""
    config = changed("mesh", fsdp=2)
    before, after, row = one_step(config, monkeypatch)
    kernels = is_int8(before.frozen)
    assert len(kernels) == 10 and all("/blocks_0/" in path for path in kernels)
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert {x.dtype.name for x in jax.tree.leaves(after.frozen)} == {"int8", "float32", "bfloat16"}

    model, _, _ = step_lib.state_shapes(config)
    batch, key = first_batch(config), jax.random.fold_in(jax.random.key(config.seed), 0)
    noise = losses.draw_noise(key, batch["latents"].shape, config.loss)

    @jax.jit
    def loss_and_norm(frozen):
        def loss(trainable):
            tree = params_lib.merge(trainable, frozen)
            return losses.training_loss(model, tree, batch, noise, config.loss)[0]

        value, grads = jax.value_and_grad(loss)(before.trainable)
        return value, jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(grads)))

    loss, norm = loss_and_norm(quantized.dequantized(before.frozen))
    np.testing.assert_allclose(row["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(row["grad_norm"], norm, rtol=1e-4)


def test_half_the_memory_is_planned():
    _, _, shapes = step_lib.state_shapes(CONFIG)
    bfloat16 = changed("model", frozen_dtype="bfloat16")
    _, _, shapes16 = step_lib.state_shapes(bfloat16)
    mesh = MAKE_MESH(CONFIG.mesh, jax.devices()[:1])
    planned = [
        memory.held(config, x, sharding.tree_shardings(mesh, x))["frozen"]
        for config, x in ((CONFIG, shapes), (bfloat16, shapes16))
    ]
    flat = params_lib.flatten(shapes.frozen)
    saved = sum(flat[path].size for path in is_int8(shapes.frozen))
    scales = sum(4 * x.size for path, x in flat.items() if path.endswith(quantized.SCALE))
    assert planned[0] == planned[1] - saved + scales and saved > 10 * scales


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that was stopped after a step and then continued."""
    workdir = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda c: MAKE_MESH(c, jax.devices()[:1]))
        for steps in (1, 2):
            config = changed("train", steps=steps)
            assert loop.train(config, workdir) == loop.Outcome(steps, None)
    return workdir


def test_a_run_goes_on_with_the_same_integers(run):
    first, second = (checkpoint.load_params(run / "checkpoints" / step).params for step in "12")
    kernels = is_int8(first)
    assert len(kernels) == 10 and is_int8(second) == kernels
    first, second = map(params_lib.flatten, (first, second))
    learns = {path for path in first if (first[path] != second[path]).any()}
    assert learns and not any("kernel_scale" in path for path in learns) and not learns & kernels
    train = [row for row in metrics.read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2]
    assert all(0 < row["loss"] < 100 for row in train)


def test_a_run_starts_from_the_kernels_of_another(run):
    """Rounded twice, they stay what they were; unrounded ones are taken as well."""
    given = checkpoint.load_params(run).params
    model, optimizer, _ = step_lib.state_shapes(CONFIG)
    start = jax.jit(lambda given: step_lib.start_state(model, CONFIG, optimizer, given).frozen)
    want = params_lib.flatten(params_lib.segmented(given, CONFIG.model))
    for tree in (given, quantized.dequantized(given)):
        for path, x in params_lib.flatten(start(tree)).items():
            assert x.dtype == want[path].dtype
            np.testing.assert_allclose(x, want[path], rtol=1e-6, err_msg=path)


def test_exported_weights_are_what_the_integers_stand_for(run, tmp_path, monkeypatch):
    written = {}
    keep = lambda out, tensors, meta: written.update(tensors)
    monkeypatch.setattr(convert.files, "write_checkpoint", keep)
    convert.export(run, tmp_path / "out.pt", say=lambda text: None)
    kernel = checkpoint.load_params(run).params["dit"]["blocks"]["cross_attn"]["k"]
    want = np.asarray(kernel["kernel"], np.float32) * kernel["kernel_scale"][:, None]
    names = [name for name in written if name.endswith("blocks.1.cross_attn.k.weight")]
    assert len(names) == 1 and not [name for name in written if "scale" in name]
    np.testing.assert_allclose(written[names[0]], want[1].T, rtol=1e-6)
