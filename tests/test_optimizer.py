"""AdamW, schedule and clipping against torch's formulas, written out in float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.training import optimizer as optimizer_lib

CONFIG = config_lib.from_config_dict(base.get_config("tiny")).optimizer


def test_learning_rate_follows_the_reference_table(golden):
    table = json.loads((golden / "d_train" / "info.json").read_text())["lr_schedule_base_1e-4"]
    assert len(table) == 5
    for name, rates in table.items():
        total, warmup = (int(part.strip("totalwarmup")) for part in name.split("_"))
        config = dataclasses.replace(CONFIG, lr=1e-4, warmup_steps=warmup, final_lr_ratio=0.01)
        steps = jnp.array([int(step) for step in rates])
        got = jax.jit(lambda s, c=config, t=total: optimizer_lib.learning_rate(s, c, t))(steps)
        np.testing.assert_allclose(got, list(rates.values()), rtol=5e-7, err_msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_equals_torch_formula(clip_norm):
    config = dataclasses.replace(CONFIG, lr=1e-2, warmup_steps=2, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    p64 = {"a": rng.standard_normal((4, 3)), "b": {"c": rng.standard_normal(5)}}
    params = jax.tree.map(jnp.float32, p64)
    m, v = (jax.tree.map(np.zeros_like, p64) for _ in range(2))
    optimizer = optimizer_lib.make_optimizer(config, total_steps=10)
    state = optimizer.init(params)
    for step in range(6):
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape) * 10.0 ** -step, p64)
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)

        lr = float(optimizer_lib.learning_rate(step, config, 10))
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        if clip_norm:
            grads = jax.tree.map(lambda g: g * min(1.0, clip_norm / (norm + 1e-6)), grads)
        m = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g * g, v, grads)
        c1, c2 = 1 - config.b1 ** (step + 1), 1 - config.b2 ** (step + 1)
        p64 = jax.tree.map(lambda p: p * (1 - lr * config.weight_decay), p64)
        p64 = jax.tree.map(
            lambda p, m, v: p - lr * (m / c1) / (np.sqrt(v / c2) + config.eps), p64, m, v
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7),
                     params, p64)  # fmt: skip


def test_moments_survive_the_way_through_a_checkpoint():
    optimizer = optimizer_lib.make_optimizer(CONFIG, total_steps=10)
    params = {"a": {"b": jnp.arange(3.0)}}
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(params, state, params)
    shapes = jax.eval_shape(optimizer.init, params)
    again = optimizer_lib.with_moments(shapes, optimizer_lib.moments(state), jnp.int32(3))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_ema_is_the_weighted_mean():
    ema = optimizer_lib.update_ema({"a": jnp.float32(1.0)}, {"a": jnp.float32(3.0)}, decay=0.9)
    np.testing.assert_allclose(ema["a"], 1.2, rtol=1e-6)
