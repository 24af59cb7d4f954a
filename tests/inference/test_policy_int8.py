"""A policy whose frozen kernels are int8, as a run with model.frozen_dtype="int8" leaves them."""

import jax
import numpy as np
import pytest

from lightwam_jax import params as params_lib
from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.models import quantized
from tests.inference.test_policy import make_config, make_policy, observe

ONE_BLOCK = dict(num_layers=1, lora_layers=(0,), adapter_layers=(0,))


@pytest.fixture(scope="module")
def policies():
    """Of float32 kernels, of int8 ones, and of those that the integers stand for."""
    whole = make_policy(make_config(frozen_dtype="int8", **ONE_BLOCK))
    patterns = whole.config.train.trainable
    learns, frozen = params_lib.partition(jax.device_get(whole.params), patterns)
    int8 = quantized.stored(frozen, "int8")
    trees = [params_lib.merge(learns, x) for x in (int8, quantized.dequantized(int8))]
    rest = whole.config, whole.assets, 7
    return whole, *(policy_lib.Policy(whole.model, tree, *rest) for tree in trees)


def test_acts_as_the_kernels_that_the_integers_stand_for(policies):
    int8 = policies[1]
    exact, got, want = (policy.act(*observe(2)) for policy in policies)
    size = np.ptp(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * size)
    error = np.abs(got - exact).max() / size
    assert 1e-5 < error < 0.05, "rounding shows, and is small"
    deployed = int8.deployed().act(*observe(2))
    np.testing.assert_allclose(deployed, want, rtol=0, atol=3e-6 * size)
    stored = {x.dtype.name for x in jax.tree.leaves(int8.deployed().params)}
    assert stored == {"float32"}, "the deployed form is in the compute dtype"


def test_untrained_is_stored_in_the_same_way(policies, monkeypatch):
    """Which is to say that what is compiled for the trained one serves it."""
    whole, int8, _ = policies
    monkeypatch.setattr(int8, "_initialise", lambda key: whole.params)
    fresh, traces = int8.untrained(), int8.traces
    assert jax.tree.map(lambda x: x.dtype, fresh.params) == jax.tree.map(
        lambda x: x.dtype, int8.params
    )
    np.testing.assert_array_equal(fresh.act(*observe(2)), int8.act(*observe(2)))
    assert int8.traces == traces
