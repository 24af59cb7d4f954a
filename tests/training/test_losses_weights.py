"""Which frames and actions count in the losses, and how much, by hand."""

import types

import numpy as np

from lightwam_jax.training import losses


def test_a_latent_step_is_padded_only_where_all_its_frames_are():
    padded = np.zeros((3, 9), bool)
    padded[0, 5:] = True  # the second group whole
    padded[1, 6:] = True  # one frame of it is real
    padded[2, 1:] = True
    np.testing.assert_array_equal(losses.latent_step_valid(padded), [[1, 0], [1, 1], [0, 0]])


def test_the_prefix_has_as_many_steps_as_the_config_says():
    config = types.SimpleNamespace(
        temporal_weighting=True, prefix_steps=2, prefix_weight=3.0, tail_weight=0.5
    )
    padded = np.array([[False, False, False, True], [False, True, True, True]])
    weights = losses.action_weights(padded, config)
    np.testing.assert_array_equal(weights, [[3, 3, 0.5, 0], [3, 0, 0, 0]])
    config.temporal_weighting = False
    np.testing.assert_array_equal(losses.action_weights(padded, config), ~padded)
