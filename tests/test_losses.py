"""Validation errors: what the policy is shown, and what counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from lightwam_jax.data import spec
from lightwam_jax.training import losses

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
    losses.open_loop_errors(model, {}, batch, config)
    assert model.text_mask is (batch["context_mask"] if masked else None)


def test_padded_steps_and_repeated_rows_count_for_nothing():
    batch = spec.fake_batch(CONFIG, 4) | {"valid": np.array([True, True, True, False])}
    errors = losses.open_loop_errors(Still(), {}, batch, CONFIG.loss)
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
    means = losses.mean_errors(
        [losses.open_loop_errors(Still(), {}, part, CONFIG.loss) for part in parts]
    )
    steps = ~both["action_is_pad"]
    assert means["steps"] == steps.sum() and means["l1"].dtype == np.float64
    np.testing.assert_allclose(means["l1"], np.abs(both["actions"][steps]).mean(0), rtol=1e-6)
    np.testing.assert_allclose(means["mse"], np.square(both["actions"][steps]).mean(0), rtol=1e-6)
    first = np.abs(both["actions"][:, 0]).mean()
    np.testing.assert_allclose(means["l1_step"][0], first, rtol=1e-6)
    np.testing.assert_allclose(means["l1_step_dim"].mean(1), means["l1_step"], rtol=1e-6)
