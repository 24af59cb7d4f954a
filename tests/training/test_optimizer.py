"""AdamW, schedule and clipping against torch's formulas, written out in float64."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.training import optimizer as optimizer_lib

CONFIG = config_lib.from_config_dict(base.get_config("tiny")).optimizer


def test_learning_rate_follows_the_reference_table(golden):
    table = json.loads((golden / "d_train" / "info.json").read_text(encoding="utf-8"))[
        "lr_schedule_base_1e-4"
    ]
    assert len(table) == 5
    for name, rates in table.items():
        total, warmup = map(int, re.findall(r"\d+", name))
        config = dataclasses.replace(CONFIG, lr=1e-4, warmup_steps=warmup, final_lr_ratio=0.01)
        steps = jnp.array([int(step) for step in rates])
        got = jax.jit(lambda s, c=config, t=total: optimizer_lib.learning_rate(s, c, t))(steps)
        np.testing.assert_allclose(got, list(rates.values()), rtol=5e-7, err_msg=name)


def torch_adamw(p, g, m, v, step, lr, config):
    """One step on one tensor in float64; returns (p, m, v)."""
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g * g
    p = p * (1 - lr * config.weight_decay)
    m_hat, v_hat = m / (1 - config.b1 ** (step + 1)), v / (1 - config.b2 ** (step + 1))
    return p - lr * m_hat / (np.sqrt(v_hat) + config.eps), m, v


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_equals_torch_formula(clip_norm):
    config = dataclasses.replace(CONFIG, lr=1e-2, warmup_steps=2, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    exact = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal(5)}
    m, v = ({k: np.zeros_like(x) for k, x in exact.items()} for _ in range(2))
    params = jax.tree.map(jnp.float32, exact)
    optimizer = optimizer_lib.make_optimizer(config, total_steps=10)
    state = optimizer.init(params)
    for step in range(6):
        # Gradients shrink, so that the first steps are clipped and the last are not.
        grads = {k: rng.standard_normal(x.shape) * 10.0**-step for k, x in exact.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)

        lr = float(optimizer_lib.learning_rate(step, config, 10))
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        for k in exact:
            exact[k], m[k], v[k] = torch_adamw(
                exact[k], grads[k] * scale, m[k], v[k], step, lr, config
            )
            np.testing.assert_allclose(params[k], exact[k], rtol=2e-6, atol=2e-7)


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
