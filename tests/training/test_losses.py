"""The noise, the losses by hand, and validation errors: what is shown, and what counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax.data import spec
from lightwam_jax.training import losses, validation
from tests import synthetic

CONFIG = synthetic.make_config()


class Still:
    """Stands in for the model: acts with zeros and keeps the text mask it was given."""

    def apply(self, variables, latents, context, proprio, horizon, text_mask, method):
        assert method == "act" and latents.shape[1] == 1
        self.text_mask = text_mask
        return jnp.zeros((len(latents), horizon, CONFIG.model.action_dim)), {}


@pytest.mark.parametrize("masked", [False, True])
def test_validation_shows_the_text_rows_that_training_shows(masked):
    config = dataclasses.replace(CONFIG.loss, mask_text_padding=masked)
    batch, model = spec.fake_batch(CONFIG, 2), Still()
    validation.open_loop_errors(model, {}, batch, config)
    assert model.text_mask is (batch["context_mask"] if masked else None)


def test_padded_steps_and_repeated_rows_count_for_nothing():
    batch = spec.fake_batch(CONFIG, 4) | {"valid": np.array([True, True, True, False])}
    errors = validation.open_loop_errors(Still(), {}, batch, CONFIG.loss)
    steps = ~batch["action_is_pad"] & batch["valid"][:, None]
    assert 0 < steps.sum() < steps[:3].size
    np.testing.assert_allclose(errors["l1"], np.abs(batch["actions"][steps]).sum(0), rtol=1e-5)
    np.testing.assert_allclose(errors["mse"], np.square(batch["actions"][steps]).sum(0), rtol=1e-5)
    apart = np.abs(batch["actions"] * steps[..., None]).sum(0)
    np.testing.assert_allclose(errors["l1_step_dim"], apart, rtol=1e-5)
    np.testing.assert_array_equal(errors["count_step"], steps.sum(0))
    assert errors["count"] == steps.sum()


def test_means_are_those_of_all_batches_together():
    both = spec.fake_batch(CONFIG, 4)
    parts = [{name: x[rows] for name, x in both.items()} for rows in (slice(1), slice(1, 4))]
    means = validation.mean_errors(
        [validation.open_loop_errors(Still(), {}, part, CONFIG.loss) for part in parts]
    )
    steps = ~both["action_is_pad"]
    assert means["steps"] == steps.sum() and means["l1"].dtype == np.float64
    np.testing.assert_allclose(means["l1"], np.abs(both["actions"][steps]).mean(0), rtol=1e-6)
    np.testing.assert_allclose(means["mse"], np.square(both["actions"][steps]).mean(0), rtol=1e-6)
    first = np.abs(both["actions"][:, 0]).mean()
    np.testing.assert_allclose(means["l1_step"][0], first, rtol=1e-6)
    np.testing.assert_allclose(means["l1_step_dim"].mean(1), means["l1_step"], rtol=1e-6)


def draw(seed, shape=(512, 2, 4, 8, 3), **values):
    config = dataclasses.replace(CONFIG.loss, **values)
    return jax.device_get(losses.draw_noise(jax.random.key(seed), shape, config))


def test_times_and_noise_are_drawn_apart_and_differ_per_sample_and_key():
    t, noise = draw(0, downsample=2, shift=5.0)
    assert t.shape == (512,) and noise.shape == (512, 2, 2, 4, 3)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    u = t / 1000 / (5 - 4 * t / 1000)  # the shift undone
    assert np.quantile(u, (0.1, 0.5, 0.9)) == pytest.approx((0.1, 0.5, 0.9), abs=0.08)
    for values in (noise.ravel()[:512], noise.reshape(512, -1)[:, 0]):
        assert abs(np.corrcoef(u, values)[0, 1]) < 0.2, "one key for both"
    assert len(np.unique(t)) > 500 and not np.allclose(noise[0], noise[1])
    other = draw(1, downsample=2, shift=5.0)
    assert not np.allclose(t, other.t) and not np.allclose(noise, other.noise)
    again = draw(0, downsample=2, shift=1.0)
    np.testing.assert_array_equal(again.noise, noise)
    np.testing.assert_allclose(again.t, 1000 * u, rtol=1e-4)


class Shown:
    """Stands in for the model in training: keeps what it is shown."""

    def apply(self, variables, noisy, t, observation, context, proprio, horizon, text_mask):
        self.__dict__.update(locals())
        return jnp.full(noisy.shape, 0.5), jnp.zeros((len(noisy), horizon, 2))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_model_is_shown_and_should_say(residual, masked):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    latents, noise, model = draw(2, 3, 4, 4, 1), draw(2, 3, 2, 2, 1), Shown()
    batch = {
        "latents": latents,
        "context": draw(2, 5, 4),
        "context_mask": rng.random((2, 5)) < 0.5,
        "proprio": draw(2, 3),
        "actions": draw(2, 6, 2),
    }
    config = dataclasses.replace(
        CONFIG.loss, downsample=2, residual_target=residual, mask_text_padding=masked
    )
    out = losses.forward(
        model, {}, batch, losses.Noise(jnp.array([250.0, 1000.0]), jnp.asarray(noise)), config
    )
    pooled = latents.reshape(2, 3, 2, 2, 2, 2, 1).mean((3, 5))
    clean = pooled - residual * pooled[:, :1]
    noisy = np.stack([0.75 * clean[0] + 0.25 * noise[0], noise[1]])
    noisy[:, 0] = pooled[:, 0]  # the frame itself, also with residual targets
    np.testing.assert_allclose(model.noisy, noisy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out["noisy"], noisy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out["target"], noise - clean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.observation, latents[:, :1])  # at full resolution
    np.testing.assert_array_equal(model.t, [250, 1000])
    assert model.context is batch["context"] and model.proprio is batch["proprio"]
    assert model.text_mask is (batch["context_mask"] if masked else None) and model.horizon == 6


def test_losses_of_a_batch_written_out_by_hand():
    config = dataclasses.replace(
        CONFIG.loss,
        lambda_video=2.0,
        lambda_action=3.0,
        temporal_weighting=True,
        prefix_steps=2,
        prefix_weight=1.0,
        tail_weight=0.5,
        shift=1.0,
    )
    velocity = np.zeros((2, 3, 1, 1, 1), np.float32)
    velocity[0] = np.array([9, 1, 2])[:, None, None, None]  # frame 0 does not count
    velocity[1, 1:] = 5
    image_is_pad = np.zeros((2, 9), bool)
    image_is_pad[0, 6:] = True  # one of step 2's four frames is there
    image_is_pad[1, 1:] = True
    actions = np.zeros((2, 4, 2), np.float32)
    actions[0, :, 0] = [1, 2, 2, 8]
    action_is_pad = np.zeros((2, 4), bool)
    action_is_pad[0, 3] = action_is_pad[1] = True
    batch = {
        "image_is_pad": image_is_pad,
        "actions": actions,
        "action_is_pad": action_is_pad,
    }
    out = {
        "velocity": velocity,
        "target": np.zeros_like(velocity),
        "actions": jnp.zeros((2, 4, 2)),
    }
    noise = losses.Noise(jnp.array([500.0, 500.0]), None)
    total, parts = losses.loss_of(out, batch, noise, config)
    # The bell of the timesteps 1, 2, ..., 1000 in its middle.
    bell = np.exp(-2 * ((np.arange(1, 1001) - 500) / 1000) ** 2)
    middle = (1 - bell.min()) / (bell - bell.min()).mean()
    video = middle * ((1 + 4) / 2 + 0) / 2
    action = ((0.5 + 2 + 0.5 * 2) / 2.5 + 0) / 2
    l1 = ((0.5 + 1 + 0.5 * 1) / 2.5 + 0) / 2
    assert float(parts["loss_video"]) == pytest.approx(video, rel=1e-5)
    assert float(parts["loss_action"]) == pytest.approx(action, rel=1e-5)
    assert float(parts["action_l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(total) == float(parts["loss"]) == pytest.approx(2 * video + 3 * action, rel=1e-5)
    flat = dataclasses.replace(config, temporal_weighting=False)
    _, parts = losses.loss_of(out, batch, noise, flat)
    assert float(parts["loss_action"]) == pytest.approx((0.5 + 2 + 2) / 3 / 2, rel=1e-5)


def test_errors_of_no_steps_are_zero_and_say_so():
    batch = spec.fake_batch(CONFIG, 2) | {"valid": np.zeros(2, bool)}
    means = validation.mean_errors([validation.open_loop_errors(Still(), {}, batch, CONFIG.loss)])
    assert means["steps"] == 0 and not means["l1"].any() and not means["l1_step_dim"].any()
