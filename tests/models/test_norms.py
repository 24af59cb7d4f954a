"""The norms against their formulas as JAX differentiates them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax.models import norms

EPS = 1e-3


def layer_norm(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS)
    return y if scale is None else y * scale + bias


def rms_norm(x, scale):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * scale


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(2, 3, shape), jnp.float32)


@pytest.mark.parametrize(
    "ours, formula, arguments",
    [
        (norms.layer_norm, layer_norm, (draw(2, 3, 5), draw(5), -draw(5))),
        (norms.layer_norm, layer_norm, (draw(2, 3, 5), None, None)),
        (norms.rms_norm, rms_norm, (draw(2, 3, 5), draw(5))),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(ours, formula, arguments):
    towards = jnp.asarray(np.random.default_rng(7).normal(size=(2, 3, 5)), jnp.float32)
    value, pull = jax.vjp(lambda *a: ours(*a, EPS), *arguments)
    wanted, pull_wanted = jax.vjp(formula, *arguments)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        pull(towards),
        pull_wanted(towards),
    )


def test_the_derivative_keeps_the_input_as_it_is_and_its_statistics():
    x, scale = draw(2, 3, 64).astype(jnp.bfloat16), draw(64).astype(jnp.bfloat16)
    for norm, arguments in ((norms.layer_norm, (scale, scale)), (norms.rms_norm, (scale,))):
        value, pull = jax.vjp(functools.partial(norm, eps=EPS), x, *arguments)
        kept = [a for a in jax.tree.leaves(pull) if a.size >= x.size]
        assert value.dtype == jnp.float32 and [a.dtype for a in kept] == [jnp.bfloat16]
        gradients = pull(jnp.ones_like(value))
        assert {a.dtype for a in gradients} == {jnp.dtype(jnp.bfloat16)}
