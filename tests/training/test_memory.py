"""The memory plan of a training step, against what the devices and the compiler say."""

import dataclasses
import functools
import types

import jax
import pytest

from lightwam_jax import build, sharding
from lightwam_jax.data import spec
from lightwam_jax.training import memory
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from tests import synthetic

CONFIG = synthetic.make_config(
    **{
        "data.source": "fake",
        "train.batch_size": 16,
        "mesh.fsdp": 4,
        "optimizer.accum_steps": 2,
        "model.num_layers": 6,
        "model.lora_layers": tuple(range(6)),
        "model.adapter_layers": (1, 3, 5),
    }
)


def shapes(config):
    model = build.build_model(config.model)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    return jax.eval_shape(
        lambda: step_lib.init_state(
            build.init_params(model, jax.random.key(0), config.model), config, optimizer
        )
    )


@pytest.fixture(scope="module")
def state():
    return shapes(CONFIG)


def planned(config, state):
    places = sharding.tree_shardings(sharding.make_mesh(config.mesh), state, config.mesh.frozen)
    return memory.held(config, state, places)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_what_is_held_is_divided_by_the_mesh(state, monkeypatch):
    whole = planned(CONFIG, state)  # everything tiny is replicated
    learns = size(state.trainable)
    assert (whole["parameters"], whole["gathered"], whole["gradients"]) == (
        learns,
        learns,
        2 * learns,
    )
    assert whole["frozen"] == size(state.frozen) and whole["average"] == 0
    monkeypatch.setattr(sharding, "MIN_SPLIT_BYTES", 0)
    split = planned(CONFIG, state)
    assert split["parameters"] < 0.4 * learns and split["frozen"] < 0.4 * whole["frozen"]
    kept = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, frozen="replicated"))
    assert planned(kept, state)["frozen"] == whole["frozen"]


def test_every_part_is_counted_once(state):
    learns, held = size(state.trainable), planned(CONFIG, state)
    assert held["optimizer"] == 2 * learns + 8  # two moments and two counts
    rows = spec.fake_batch(CONFIG, CONFIG.train.batch_size)
    assert held["batch"] * 8 == sum(x.nbytes for x in rows.values())  # eight devices
    kept = dataclasses.replace(CONFIG.optimizer, ema_decay=0.9, accum_steps=1)
    config = dataclasses.replace(
        CONFIG, optimizer=kept, mesh=dataclasses.replace(CONFIG.mesh, fsdp=1)
    )
    alone = planned(config, shapes(config))
    assert (alone["average"], alone["gathered"], alone["gradients"]) == (learns, 0, learns)


def test_the_compilers_account_is_read_with_care(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: seen)]
    )
    sizes = {"argument": 8, "temp": 4, "output": 7, "alias": 5}
    report = types.SimpleNamespace(
        peak_memory_in_bytes=3 * 2**30,
        **{f"{name}_size_in_bytes": size * 2**30 for name, size in sizes.items()},
    )
    program = types.SimpleNamespace(memory_analysis=lambda: report)
    assert memory.compiled(program) == {"arguments": 8, "temporaries": 4, "peak": 8 + 2 + 4}
    report.peak_memory_in_bytes = 20 * 2**30
    seen.update(bytes_limit=80 * 2**30, peak_bytes_in_use=21 * 2**30)
    assert memory.compiled(program) == {
        "arguments": 8,
        "temporaries": 4,
        "peak": 20,
        "peak_measured": 21,
    }
    assert memory.compiled_summary(program).startswith("20.00 of 80.0 GiB per device")


def test_activations_grow_with_the_batch_and_shrink_with_rematerialisation(state):
    def kept(remat, rows):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=remat))
        return memory.activations(config, state, rows)

    none, dots, linears, full = (kept(r, 2) for r in ("none", "dots", "linears", "full"))
    assert full < linears < dots < none
    assert kept("full", 4) == pytest.approx(2 * full, rel=0.05)


def test_a_plan_that_cannot_fit_names_the_knobs(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    memory.check({"frozen": 2**29, "batch": 2**28})
    with pytest.raises(ValueError, match=r"has 1.0 GiB, .* least 2.0 .*'frozen'.*mesh.fsdp.*remat"):
        memory.check({"frozen": 7 * 2**28, "batch": 2**28})


def test_a_plan_that_cannot_fit_proposes_the_fastest_rematerialisation_that_does(
    state, monkeypatch
):
    kept = {"none": 50 * 2**30, "linears": 5 * 2**30, "dots": 9 * 2**30, "full": 2**30}
    monkeypatch.setattr(memory, "activations", lambda config, *_: kept[config.model.remat])
    places = sharding.tree_shardings(sharding.make_mesh(CONFIG.mesh), state, CONFIG.mesh.frozen)
    propose = functools.partial(memory.remat_that_fits, CONFIG, state, places)
    held = sum(memory.plan(CONFIG, state, places).values()) - kept["none"]
    for least, remat in (("none", "none"), ("linears", "linears"), ("full", "full")):
        assert propose(held + kept[least]) == remat
    below = [propose(held + kept[remat] - 1) for remat in ("none", "linears", "full")]
    assert below == ["linears", "full", None]

    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": held + kept["linears"]})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"config\.model\.remat='linears' would fit\. Param"):
        memory.check({"activations": 2**36}, propose)
    device.memory_stats = lambda: {"bytes_limit": 1}
    with pytest.raises(ValueError, match=r"'activations'\. Parameters"):
        memory.check({"activations": 2**36}, propose)


def test_summary_leaves_out_what_is_nothing():
    text = memory.summary({"frozen": 2**30, "average": 0, "batch": 2**29})
    assert "average" not in text and "together        1.50" in text
