"""What devices exchange in a step: the plan, what the compiler made of it, how it is counted."""

import collections
import json
import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot, aot_devices, aot_tables, collectives
from lightwam_jax import config as config_lib
from lightwam_jax import sharding
from lightwam_jax.training import flops
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from tests import pod, synthetic

LAYERS, WIDTH, ROWS = 3, 64, 16
CONFIG = synthetic.make_config(
    **{"train.trainable": (r"/b$",), "train.batch_size": ROWS, "optimizer.accum_steps": 2}
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
        b = self.param("b", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
        h = jnp.tanh(x @ kernel.astype(x.dtype)) @ b.astype(x.dtype)
        return x + h, None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            in_axes=nn.broadcast,
        )
        return blocks(name="blocks_0")(x, None)[0]


def loss_fn(model, params, batch, noise, config):
    """A mean over the batch, through the stack."""
    del config
    rows = (batch["latents"] + noise.noise).reshape(len(batch["latents"]), -1)[:, :WIDTH]
    out = model.apply({"params": params["dit"]}, rows)
    loss = jnp.square(out - 1).mean()
    return loss, {"loss": loss}


@pytest.fixture(autouse=True)
def split_everything(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SPLIT_BYTES", 0)


def prepared(data, fsdp):
    """(mesh, optimizer, state, shardings) of the stack on data x fsdp devices."""
    mesh = sharding.make_mesh(
        config_lib.MeshConfig(data, fsdp, "sharded"), jax.devices()[: data * fsdp]
    )
    optimizer = optimizer_lib.make_optimizer(CONFIG.optimizer, 10)

    def init():
        params = Stack().init(jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]
        return step_lib.init_state({"dit": params}, CONFIG, optimizer)

    places = sharding.tree_shardings(mesh, jax.eval_shape(init))
    return mesh, optimizer, jax.jit(init, out_shardings=places)(), places


def compiled(data, fsdp):
    mesh, optimizer, state, places = prepared(data, fsdp)
    step = step_lib.make_train_step(Stack(), CONFIG, optimizer, places, loss_fn)
    step = step_lib.jit_train_step(step, places)
    latents = np.random.default_rng(0).standard_normal((ROWS, 2, 4, 4, 16)).astype(np.float32)
    batch = sharding.put_batch({"latents": latents}, mesh)
    traced = step.trace(state, batch)
    return traced.lower().compile(), state, batch, traced.jaxpr


@pytest.fixture(scope="module")
def programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SPLIT_BYTES", 0)
        yield {mesh: compiled(*mesh) for mesh in ((1, 1), (2, 4))}


def test_blocks_are_gathered_one_at_a_time_and_gradients_reduced_once(programs):
    block, stack = WIDTH * WIDTH, LAYERS * WIDTH * WIDTH
    program, *_, jaxpr = programs[2, 4]
    mesh = {"data": 2, "fsdp": 4}
    exchanged = [c for c in collectives.written(jaxpr, mesh) if c.bytes > 1024]
    large = sorted((c.kind, math.prod(c.shape), c.group(mesh), c.times) for c in exchanged)
    assert large == [
        # what learns, once; a block's frozen kernel in the forward and the backward loop, each
        # time the loops run
        ("all-gather", block, 4, 2 * LAYERS),
        ("all-gather", block, 4, 2 * LAYERS),
        ("all-gather", stack, 4, 1),
        # the sum over "fsdp" leaves a part, which is summed over "data"
        ("all-reduce", stack // 4, 2, 1),
        ("reduce-scatter", stack, 4, 1),
    ]
    made = collectives.instructions(program.as_text())
    assert sorted((i.kind, math.prod(i.shape), i.group) for i in made if i.bytes > 1024) == [
        (kind, size, group) for kind, size, group, _ in large
    ]
    assert not collectives.compare(exchanged, [i for i in made if i.bytes > 1024])["unplanned"]
    assert not collectives.written(jaxpr, {"data": 1, "fsdp": 1})


def test_gradients_are_reduced_in_float32_and_frozen_weights_travel_as_stored(programs):
    text = str(programs[2, 4][3])
    exchanged = sorted(re.findall(r"(\w+)\[([\d,]+)\] = (reduce_scatter|all_gather)\[", text))
    part = f"{LAYERS},{WIDTH // 4},{WIDTH}"
    assert exchanged == [("bf16", f"{WIDTH},{WIDTH}", "all_gather")] * 2 + [
        ("f32", part, "reduce_scatter"),
        ("f32", f"{LAYERS},{WIDTH},{WIDTH}", "all_gather"),
    ]


def test_sharded_step_is_the_step_of_one_device(programs):
    losses = []
    for step, state, batch, _ in programs.values():
        for _ in range(2):
            state, metrics = step(state, batch)
        losses.append((jax.device_get(metrics), jax.device_get(state.trainable)))
    (one, learned), (other, learned_too) = losses
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), learned, learned_too)


def small_config(**changes):
    return synthetic.make_config(
        **{
            "mesh.fsdp": 4,
            "optimizer.accum_steps": 2,
            "model.remat": "full",
            "train.batch_size": ROWS,
            "data.source": "fake",
            **changes,
        }
    )


def planned(config, state, shardings):
    """What a step has to exchange, from the parameters alone: {kind: bytes of whole arrays}."""
    fsdp = shardings.step.mesh.shape["fsdp"]
    # A block's weights are gathered when it runs, and once more for its gradient unless all that
    # the gradient needs was kept.
    runs = config.optimizer.accum_steps * (1 if config.model.remat == "none" else 2)
    plan = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0)
    for path, leaf, is_split in leaves(state.frozen, shardings.frozen):
        stack = re.search(r"blocks_(\d+)/(.*)", path)
        if is_split and stack:  # keys and values serve both passes, the last run has only one
            shared = stack[2].startswith(("cross_attn/k/", "cross_attn/v/"))
            once = shared or int(stack[1]) > config.model.adapter_layers[-1]
            plan["all-gather"] += leaf.nbytes * runs * (1 if once else 2)
        elif is_split:
            plan["all-gather"] += leaf.nbytes
    for _, leaf, is_split in leaves(state.trainable, shardings.trainable):
        if is_split:
            plan["all-gather"] += leaf.nbytes
            plan["reduce-scatter"] += leaf.nbytes
            plan["all-reduce"] += leaf.nbytes // fsdp  # over "data"
        else:
            plan["all-reduce"] += leaf.nbytes
    return plan


def leaves(tree, shardings):
    pairs = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), place in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        struct = types.SimpleNamespace(nbytes=leaf.size * leaf.dtype.itemsize)
        yield name, struct, sharding.split_axis(place.spec) is not None


def traced_step(config):
    """(mesh, shapes, shardings, traced step) of a small model."""
    model, optimizer, shapes = step_lib.state_shapes(config)
    mesh = sharding.make_mesh(config.mesh)
    places = sharding.tree_shardings(mesh, shapes)
    step = step_lib.make_train_step(model, config, optimizer, places)
    step = step_lib.jit_train_step(step, places)
    return mesh, shapes, places, step.trace(shapes, step_lib.batch_shapes(config))


@pytest.mark.parametrize("remat", ["full", "none"])
def test_every_run_of_a_block_is_counted(remat):
    """Nothing but what the parameters make necessary is exchanged, and all of that."""
    config = small_config(**{"model.remat": remat})
    mesh, shapes, places, traced = traced_step(config)
    exchanged = collectives.written(traced.jaxpr, mesh.shape)
    found = collections.Counter()
    for c in exchanged:
        found[c.kind] += c.times * c.bytes * (c.shape != ())  # losses are numbers
    plan = planned(config, shapes, places)
    # What no gradient needs (a bias) is not gathered a second time.
    assert 0.99 * plan["all-gather"] <= found["all-gather"] <= plan["all-gather"]
    assert found == plan | {"all-gather": found["all-gather"]}
    totals = collectives.totals(exchanged)
    assert totals["all-gather"]["gib"] == found["all-gather"] / 2**30


@pytest.mark.slow
def test_the_compiler_exchanges_what_is_written(monkeypatch):
    monkeypatch.setattr(collectives, "SMALL_BYTES", 2048)
    # two blocks per run: XLA unrolls a loop of one, and then gathers once for all its uses
    config = small_config(
        **{
            "model.num_layers": 8,
            "model.lora_layers": tuple(range(8)),
            "model.adapter_layers": (1, 3, 5),
            "model.dtype": "float32",
            "model.frozen_dtype": "float32",
        }
    )
    mesh, _, _, traced = traced_step(config)
    exchanged = collectives.written(traced.jaxpr, mesh.shape)
    program = collectives.instructions(traced.lower().compile().as_text())
    assert {i.kind for i in program} == {"all-gather", "reduce-scatter", "all-reduce"}
    found = collectives.compare(exchanged, program)
    assert found == {"gradient_dtypes": ["f32"], "unplanned": []}


HLO = """HloModule jit_step

%piece.1 (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%piece.2 (p: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%p.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%body (s: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %async-collective-start = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  ROOT %async-collective-done = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
}

%condition (s: (s32[], bf16[2,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[2,8]) while(%t), condition=%condition, body=%body
  %rs = (f32[2,4]{1,0}, f32[3]{0}) reduce-scatter(%y, %z), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %ar = f32[4]{0} all-reduce(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, to_apply=%add
}
"""  # noqa: E501


def test_instructions_of_a_program_are_read_once_per_chain():
    found = collectives.instructions(HLO)
    assert [(i.kind, i.dtype, i.shape, i.group, i.overlapped) for i in found] == [
        ("all-gather", "bf16", (8, 8), 4, True),
        ("reduce-scatter", "f32", (4, 2, 4), 4, False),
        ("reduce-scatter", "f32", (4, 3), 4, False),
        ("all-reduce", "f32", (4,), 8, False),
    ]
    assert found[0].bytes == 128


def test_what_a_device_sends():
    mesh = {"data": 2, "fsdp": 4}
    gather = collectives.Collective("all-gather", "bfloat16", (8, 8), ("fsdp",), 5)
    total = collectives.Collective("all-reduce", "float32", (4,), ("data", "fsdp"), 1)
    assert gather.bytes == 128 and gather.wire_bytes(mesh) == 5 * 128 * 3 / 4
    assert total.wire_bytes(mesh) == 2 * 16 * 7 / 8
    assert collectives.totals([gather, total], collectives.instructions(HLO)) == {
        "all-gather": {"count": 5, "gib": 5 * 128 / 2**30, "overlapped": 1.0},
        "all-reduce": {"count": 1, "gib": 16 / 2**30, "overlapped": 0.0},
    }


def test_what_was_not_written_is_named():
    def made(kind, shape):
        return collectives.Instruction(kind, "f32", shape, 4, False, "w")

    plan = [collectives.Collective("all-gather", "bfloat16", (512, 512), ("fsdp",), 2)]
    assert not collectives.compare(plan, [made("all-gather", (1, 512, 512))])["unplanned"]
    assert len(collectives.compare(plan, [made("all-gather", (512, 1024))])["unplanned"]) == 1
    assert len(collectives.compare(plan, [made("all-reduce", (512, 512))])["unplanned"]) == 1


def test_products_of_a_shard_map_are_those_of_one_device():
    mesh = sharding.make_mesh(config_lib.MeshConfig(8, 1, "sharded"))
    rows, whole = sharding.batch_sharding(mesh).spec, sharding.replicated(mesh).spec
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    jaxpr = jax.jit(product).trace(jnp.ones((64, 4)), jnp.ones((4, 2))).jaxpr
    assert list(flops.products(jaxpr)) == [(1, 2 * 8 * 4 * 2, 4 * (8 * 4 + 4 * 2 + 8 * 2))]


def test_numbers_of_a_step_and_their_tables(monkeypatch):
    """As for a TPU, with this machine's devices in the place of its chips."""
    monkeypatch.setattr(aot_devices, "devices", lambda topology: jax.devices()[:8])
    monkeypatch.setattr(aot, "SCALING", (2, 4, 8, 16))
    numbers, _ = aot.compile_step(pod.make_config(**{"mesh.fsdp": 4}), "v5e:2x4")
    assert numbers["chips"] == 8 and numbers["mesh"] == {"data": 2, "fsdp": 4}
    assert numbers["plan"]["unplanned"] == []
    small, same, large = numbers["scaling"]  # fsdp does not divide 2 chips
    assert (small["chips"], same["chips"], large["chips"]) == (4, 8, 16)
    assert same["communication_s"] == numbers["roofline"]["communication_s"]
    assert small["communication_s"] < same["communication_s"] < large["communication_s"]
    for name in ("step_ms", "samples_per_s", "mfu"):
        assert same[name] == pytest.approx(numbers["roofline"][name])
    found = {"topology": "v5e:2x4", "train": numbers | {"complaints": aot.complaints("")}}
    text = aot_tables.tables([json.loads(json.dumps(found))])
    assert "| v5e:2x4 | 8 | 2 x 4 |" in text and "| v5e:2x4 | reduce-scatter |" in text


def test_complaints_and_tables(tmp_path):
    assert (
        aot.complaints("x Involuntary full rematerialization y")[
            "involuntary_full_rematerialization"
        ]
        == 1
    )
    page = tmp_path / "pods.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        aot_tables.write(page)
    begin, end = (f"<!-- benchmarks.aot: {place} -->\n" for place in ("begin", "end"))
    page.write_text(f"before\n{begin}old\n{end}after\n", encoding="utf-8")
    aot_tables.write(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


@pytest.mark.parametrize("topology, package", [("v5e:4x4", "libtpu"), ("h100:1", "jax_cuda12")])
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, topology, package):
    monkeypatch.setattr(aot_devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{package}.*: pip install -r requirements-aot.txt"):
        aot_devices.check_compiler(topology)
    monkeypatch.setattr(aot_devices.importlib.util, "find_spec", lambda name: name)
    aot_devices.check_compiler(topology)
