"""The noise that plans start from: of each row and call its own, wherever the plan is made."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.inference import rows
from tests.inference.test_policy import make_config, observe, take
from tests.inference.test_policy_rows import ASSETS


class Echo:
    """In place of the model: plans its noise."""

    def apply(self, variables, latents, context, proprio, horizon, mask, method, noise):
        assert method == "act" and noise.shape[1] == horizon
        return noise, {}


def make(**values):
    config = make_config()
    model = dataclasses.replace(config.model, action_head="flow_dit", **values)
    config = dataclasses.replace(config, model=model)
    return policy_lib.Policy(Echo(), {"dit": {}}, config, ASSETS)


def test_rows_and_calls_have_noise_of_their_own_in_any_batch():
    policy, observation = make(), observe(3)
    plans = policy.act(*observation)
    assert abs(plans.std() - 1) < 0.3
    assert np.abs(plans[0] - plans[1]).max() > 0.1
    alone = policy.act(*take(observation, [2]))[0]
    np.testing.assert_array_equal(alone, plans[2])
    policy.noise_seed = 1
    assert np.abs(policy.act(*take(observation, [2]))[0] - alone).max() > 0.1


def test_the_deployed_form_draws_the_same_noise(monkeypatch):
    policy = make()
    policy.noise_seed = 3
    monkeypatch.setattr(policy, "_deployed_weights", lambda params: {})
    assert policy.deployed().noise_seed == 3


def test_constant_noise_is_for_those_who_ask():
    seeds = jnp.arange(3, dtype=jnp.uint32)
    fresh, constant = (
        np.asarray(rows.noise(seeds, (3, 1, 4, 8, 8), make(flow_noise=kind).config))
        for kind in ("fresh", "constant")
    )
    assert np.abs(fresh[0] - fresh[1]).max() > 0.1
    np.testing.assert_array_equal(constant[0], constant[1])


def test_a_camera_or_a_joint_that_moves_changes_the_seed():
    images, state = {"a": np.zeros((2, 2, 2, 3), np.uint8)}, np.zeros((2, 3), np.float32)
    still = rows.noise_seeds(images, state)
    assert still[0] == still[1] and still.dtype == np.uint32
    state[1, 2] = 1e-6
    assert len({*still, *rows.noise_seeds(images, state)}) == 2
    images["a"][0, 1, 1, 2] = 1
    assert len({*still, *rows.noise_seeds(images, state)}) == 3
