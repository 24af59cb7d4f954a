"""What is random in a step comes from keys of its own."""

import jax
import jax.numpy as jnp

from lightwam_jax import config as config_lib
from lightwam_jax import sharding
from lightwam_jax.training import augment, losses
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from tests import synthetic


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_augmentation_shares_no_key_with_the_noise(monkeypatch):
    config = synthetic.make_config(**{"train.trainable": ("^w",), "train.steps": 2})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 2)
    noise_keys, augment_keys = [], []

    def draw_noise(rng, shape, config):
        noise_keys.append(rng)
        return losses.Noise(jnp.zeros(shape[0]), jnp.zeros(shape[0]))

    def encode(arrays, batch, key):
        augment_keys.append(key)
        return {"latents": batch["video"]}

    def loss(model, params, batch, noise, config):
        value = (params["w"] * batch["latents"].mean()) ** 2
        return value, {"loss": value}

    monkeypatch.setattr(losses, "draw_noise", draw_noise)
    state = step_lib.init_state({"w": jnp.ones(())}, config, optimizer)
    places = sharding.tree_shardings(sharding.single_device_mesh(), state)
    step = step_lib.make_train_step(None, config, optimizer, places, loss, encode)
    for _ in range(2):
        state, _ = step(state, {"video": jnp.ones((2, 1))}, None)
    used = [bits(key) for key in (*noise_keys, *augment_keys)]
    for key in noise_keys:
        used += [bits(key) for key in jax.random.split(key)]  # time and noise
    assert len(used) == len(set(used)) == 8


def test_each_kind_of_augmentation_is_drawn_from_its_own_key(monkeypatch):
    keys, uniform = [], jax.random.uniform

    def remember(key, *arguments, **options):
        keys.append(bits(key))
        return uniform(key, *arguments, **options)

    monkeypatch.setattr(jax.random, "uniform", remember)
    config = config_lib.AugmentConfig(crop=0.5, brightness=0.1, contrast=0.1, saturation=0.1)
    draws = augment.draw(jax.random.key(3), 2, 1, config)
    assert all(x is not None for x in draws)
    assert len(keys) == len(set(keys)) == 4
