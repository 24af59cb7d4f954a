"""Every row of a large batch has its own instruction; what the model is shown of the text."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.inference import policy as policy_lib
from tests.inference.test_policy import make_config, observe, take

UNITS = normalize.Normalizer(np.float32(1), np.float32(0))
ASSETS = assets_lib.Assets(
    state=UNITS,
    action=UNITS,
    codec=types.SimpleNamespace(
        arrays={}, encode_with=lambda arrays, video: jnp.zeros((len(video), 1, 4, 8, 8))
    ),
    text_encoder=text_lib.HashedTextEncoder(make_config().model.text_dim),
    statistics={},
)


class Words:
    """In place of the model: plans the sum of each instruction's words, keeps the mask."""

    def apply(self, variables, latents, context, proprio, horizon, mask, method):
        self.mask = mask
        return jnp.broadcast_to(context.sum(axis=1)[:, None, :4], (len(context), horizon, 4)), {}


def test_rows_beyond_the_largest_padded_size_keep_their_instructions(monkeypatch):
    monkeypatch.setattr(policy_lib, "PADDED_SIZES", (1, 4))
    policy = policy_lib.Policy(Words(), {"dit": {}}, make_config(), ASSETS)
    observation = observe(6)
    actions = policy.act(*observation)
    assert np.abs(actions[0] - actions[1]).max() > 1e-3
    for row in range(6):
        alone = policy.act(*take(observation, [row]))[0]
        np.testing.assert_allclose(actions[row], alone, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_policy_shows_the_text_rows_that_training_shows(masked):
    config = make_config()
    object.__setattr__(config.loss, "mask_text_padding", masked)
    model = Words()
    policy_lib.Policy(model, {"dit": {}}, config, ASSETS).act(*observe(1))
    assert (model.mask is not None) is masked
