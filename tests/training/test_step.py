"""The training step on a small stand-in model: same result however the batch is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import sharding
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from tests import synthetic

STEPS = 4
CONFIG = synthetic.make_config(**{
    "train.trainable": (r"^expert/",), "train.batch_size": 16, "train.steps": STEPS,
    "optimizer.lr": 1e-2, "optimizer.warmup_steps": 1, "optimizer.ema_decay": 0.5,
    "model.frozen_dtype": "bfloat16"})  # fmt: skip


def params():
    rng = np.random.default_rng(0)
    return {"dit": {"w": jnp.float32(rng.standard_normal((16, 8)))},
            "expert": {"w": jnp.float32(rng.standard_normal((8, 3))),
                       "b": jnp.float32(rng.standard_normal(3))}}  # fmt: skip


def loss_fn(model, params, batch, noise, config):
    """A mean over the batch of something that depends on each sample, its noise and its time."""
    del model, config
    mixed = (batch["latents"] + noise.noise).mean(axis=(1, 2, 3)) * (1 + noise.t[:, None] / 1000)
    out = jnp.tanh(mixed @ params["dit"]["w"].astype(jnp.float32)) @ params["expert"]["w"]
    out = out + params["expert"]["b"]
    loss = jnp.square(out - 1).mean()
    return loss, {"loss": loss, "loss_video": loss * 2}


def batches(steps, poison):
    rng = np.random.default_rng(1)
    for step in range(steps):
        x = rng.standard_normal((16, 2, 4, 4, 16)).astype(np.float32)
        if step == poison:
            x[3] = np.nan
        yield {"latents": x}


def run(config, devices=1, steps=STEPS, poison=None):
    """Returns (final state, [metrics])."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = optimizer_lib.make_optimizer(config.optimizer, STEPS)
    state = step_lib.init_state(params(), config, optimizer)
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(lambda: state))
    state = jax.device_put(state, shardings)
    step = step_lib.make_train_step(None, config, optimizer, shardings, loss_fn)
    step = step_lib.jit_train_step(step, shardings)
    rows = []
    for batch in batches(steps, poison):
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        rows.append(metrics)
    return state, jax.device_get(rows)


@pytest.fixture(scope="module")
def whole():
    return run(CONFIG)


def assert_same(got, expected):
    (state, rows), (state2, rows2) = got, expected
    for a, b in zip(rows, rows2, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
                 (state.trainable, state.ema), (state2.trainable, state2.ema))  # fmt: skip


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_changes_nothing(whole, accum):
    optimizer = dataclasses.replace(CONFIG.optimizer, accum_steps=accum)
    assert_same(run(dataclasses.replace(CONFIG, optimizer=optimizer)), whole)


@pytest.mark.parametrize(("fsdp", "accum"), [(4, 1), (1, 2)])
def test_number_of_devices_changes_nothing(whole, fsdp, accum, monkeypatch):
    """With fsdp=4 the expert's kernel is split, and its bias, of three values, cannot be."""
    monkeypatch.setattr(sharding, "MIN_SPLIT_BYTES", 0)
    config = dataclasses.replace(
        CONFIG,
        optimizer=dataclasses.replace(CONFIG.optimizer, accum_steps=accum),
        mesh=dataclasses.replace(CONFIG.mesh, fsdp=fsdp),
    )
    assert_same(run(config, devices=8), whole)


def test_only_the_trainable_part_moves(whole):
    state, rows = whole
    start = params()
    assert state.frozen["dit"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.frozen["dit"]["w"], start["dit"]["w"].astype(jnp.bfloat16))
    assert "dit" not in state.trainable
    assert "dit" not in optimizer_lib.moments(state.opt_state)["mu"]
    assert state.trainable["expert"]["w"].dtype == jnp.float32
    assert not np.allclose(state.trainable["expert"]["w"], start["expert"]["w"])
    assert int(state.step) == STEPS
    assert rows[-1]["loss"] < rows[0]["loss"]
    rates = 1e-4 + (1e-2 - 1e-4) * np.cos(np.pi * np.array([0, 0, 1, 2]) / 6) ** 2
    np.testing.assert_allclose([row["lr"] for row in rows], rates, rtol=1e-6)
    norm = np.sqrt(sum(np.square(x).sum() for x in start["expert"].values()))
    assert rows[0]["param_norm"] == pytest.approx(norm, rel=1e-6), "before the step"


def test_ema_follows_and_is_what_gets_evaluated():
    state, _ = run(CONFIG, steps=1)
    start = params()["expert"]["w"]
    now, ema = state.trainable["expert"]["w"], state.ema["expert"]["w"]
    np.testing.assert_allclose(ema, (start + now) / 2, rtol=1e-6)
    evaluated = step_lib.eval_params(state)
    np.testing.assert_array_equal(evaluated["expert"]["w"], ema)
    np.testing.assert_array_equal(evaluated["dit"]["w"], state.frozen["dit"]["w"])


def test_state_stops_before_the_first_step_that_is_not_finite(whole):
    del whole
    state, rows = run(CONFIG, poison=2)
    assert [bool(row["finite"]) for row in rows] == [True, True, False, False]
    assert int(state.step) == 2 and bool(state.halted)
    kept = (state.trainable, state.ema, optimizer_lib.moments(state.opt_state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


def test_start_parameters_may_lack_what_learns_only():
    random = params()
    base = {"dit": {"w": jnp.ones((16, 8), jnp.bfloat16)}}
    out = step_lib.start_params(random, base, CONFIG.train.trainable)
    assert out["dit"]["w"].dtype == jnp.float32 and float(out["dit"]["w"][0, 0]) == 1
    np.testing.assert_array_equal(out["expert"]["w"], random["expert"]["w"])
    for wrong in ({"expert": random["expert"]}, {"dit": {"w": jnp.ones((2, 8))}},
                  {"dit": {**base["dit"], "more": jnp.ones(1)}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"config.train.init holds another model's parameters"):
            step_lib.start_params(random, wrong, CONFIG.train.trainable)


def squares(w):
    return jnp.square(w).sum()


def one_step(loss=squares, at=0, seed=0, encode=None, config=CONFIG):
    """Takes optimizer step `at` without compiling; returns (state, metrics and the noise)."""

    def loss_fn(model, params, batch, noise, config):
        value = loss(params["expert"]["w"])
        return value, {"loss": value, "noise": noise}

    config = dataclasses.replace(config, seed=seed)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, STEPS)
    state = step_lib.init_state(params(), config, optimizer)
    state = dataclasses.replace(state, step=jnp.int32(at))
    places = sharding.tree_shardings(sharding.single_device_mesh(), state)
    step = step_lib.make_train_step(None, config, optimizer, places, loss_fn, encode)
    batch = {"latents": jnp.ones((16, 2, 4, 4, 16))}
    return step(state, batch, *([] if encode is None else [None]))


def test_every_step_and_every_seed_has_noise_of_its_own():
    found = {}
    for at, seed in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
        seen = one_step(at=at, seed=seed)[1]["noise"]
        for other, noise in found.items():
            same = other == (at, seed)
            assert np.array_equal(noise.t, seen.t) == same, (other, at, seed)
            assert np.array_equal(noise.noise, seen.noise) == same, (other, at, seed)
        found[at, seed] = seen


def test_augmentation_has_a_key_of_its_own_at_every_step():
    keys = []

    def encode(arrays, batch, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return batch

    for at, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        one_step(at=at, seed=seed, encode=encode)
    assert len(set(keys)) == 3 and keys[3] == keys[0]
    of_noise = jax.random.fold_in(jax.random.key(0), 0)
    taken = [of_noise, *jax.random.split(of_noise)]
    assert not set(keys) & {tuple(jax.random.key_data(k).tolist()) for k in taken}


@pytest.mark.parametrize("loss", ["finite", "nan"])
def test_a_gradient_that_is_not_finite_halts_where_the_loss_is(loss):
    """The root of zero is finite and its slope is not; nan where the loss is at fault."""
    broken = {"finite": lambda w: jnp.sqrt(0 * w).sum(), "nan": lambda w: 0 * w.sum() + jnp.nan}
    state, metrics = one_step(broken[loss], at=2)
    assert bool(state.halted) and not bool(metrics["finite"]) and int(state.step) == 2
    np.testing.assert_array_equal(state.trainable["expert"]["w"], params()["expert"]["w"])
    state, metrics = one_step(at=2)
    assert not bool(state.halted) and bool(metrics["finite"]) and int(state.step) == 3
    assert metrics["grad_norm"] == pytest.approx(2 * np.linalg.norm(params()["expert"]["w"]))


def test_without_an_average_the_parameters_are_evaluated():
    none = dataclasses.replace(CONFIG.optimizer, ema_decay=0.0)
    state, _ = one_step(config=dataclasses.replace(CONFIG, optimizer=none))
    assert state.ema is None
    evaluated = step_lib.eval_params(state)["expert"]["w"]
    np.testing.assert_array_equal(evaluated, state.trainable["expert"]["w"])
    assert set(step_lib.state_items(state)) == {"params", "optimizer"}
