"""Augmentation: one change per window, within the bounds of the config, per camera, or none."""

import colorsys
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax.config import AugmentConfig
from lightwam_jax.training import augment, encode_video
from tests import synthetic

OFF = AugmentConfig(crop=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
REGIONS = ((0, 0, 16, 24), (0, 24, 16, 8), (0, 32, 16, 16))


def videos(rows=4, seed=0):
    """Smooth images [rows, 2, 16, 48, 3], the second frame darker than the first."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.arange(16), np.arange(48), indexing="ij")
    slopes = rng.uniform(1, 3, (rows, 1, 1, 3))
    frame = 40 + slopes * y[..., None] + (4 - slopes) * x[..., None]
    return np.stack([frame, frame / 2], axis=1).round().astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(2, 3))
def augmented(key, video, config, regions):
    """Videos of one dataset, as the training step changes them."""
    draws = augment.draw(key, len(video), len(regions), config)
    return augment.apply(video, draws, (regions,), jnp.zeros(len(video), jnp.int32))


def change(video, key=0, **values):
    config = dataclasses.replace(OFF, **values)
    return np.asarray(augmented(jax.random.key(key), video, config, REGIONS))


def test_nothing_asked_nothing_changes():
    video = videos()
    assert augment.draw(jax.random.key(0), 4, 3, OFF) == augment.Draws(None, None, None, None)
    np.testing.assert_allclose(change(video), video / 255, rtol=1e-6)


def test_crop_is_bilinear_the_same_in_all_frames_and_another_per_camera_and_window():
    video = videos()
    out = change(video, crop=0.5)
    assert out.shape == video.shape and out.dtype == np.float32
    draws = augment.draw(jax.random.key(0), 4, 3, AugmentConfig(0.5, 0.0, 0.0, 0.0))
    sides, corners = np.asarray(draws.crop[..., 0]), np.asarray(draws.crop[..., 1:])
    assert (sides >= 0.5).all() and (sides < 1).all() and len(np.unique(sides)) == 12
    assert (corners >= 0).all() and (corners < 1).all() and len(np.unique(corners)) == 24
    for row in range(4):
        for (top, left, height, width), side, corner in zip(REGIONS, sides[row], corners[row]):
            room = (1 - side) * np.array([height, width])
            first = corner * room  # of the crop, in pixels; its pixel centres, clamped to the view:
            y = np.clip(first[0] + (np.arange(height) + 0.5) * side - 0.5, 0, height - 1)
            x = np.clip(first[1] + (np.arange(width) + 0.5) * side - 0.5, 0, width - 1)
            view = video[row, :, top : top + height, left : left + width].astype(np.float32) / 255
            rows = (
                view[:, y.astype(int)] * (1 - y % 1)[:, None, None]
                + view[:, np.minimum(y.astype(int) + 1, height - 1)] * (y % 1)[:, None, None]
            )
            wanted = (
                rows[:, :, x.astype(int)] * (1 - x % 1)[:, None]
                + rows[:, :, np.minimum(x.astype(int) + 1, width - 1)] * (x % 1)[:, None]
            )
            got = out[row, :, top : top + height, left : left + width]
            np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_whole_crop_is_the_image_itself():
    video = videos()
    draws = augment.Draws(crop=jnp.tile(jnp.array([1.0, 0.3, 0.7]), (4, 3, 1)))
    apply = jax.jit(augment.apply, static_argnums=2)
    out = apply(video, draws, (REGIONS,), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(out, video.astype(np.float32) / 255, atol=1e-6)


def test_colours_change_by_one_factor_per_window_and_stay_colours():
    video = videos()
    x = video.astype(np.float32) / 255
    bright = change(video, brightness=0.5)
    factors = (bright / x).reshape(4, -1)
    np.testing.assert_allclose(factors, factors[:, :1].repeat(factors.shape[1], 1), rtol=1e-4)
    assert len(np.unique(factors[:, 0].round(3))) == 4 and (abs(factors - 1) <= 0.5001).all()

    contrast = change(video, contrast=0.3)
    grey = (x @ np.array([0.299, 0.587, 0.114])).mean((1, 2, 3))[:, None, None, None, None]
    factors = ((contrast - grey) / (x - grey))[abs(x - grey) > 0.05]
    assert (abs(factors - 1) <= 0.3001).all() and factors.std() > 0.01
    np.testing.assert_allclose(
        (contrast @ np.array([0.299, 0.587, 0.114])).mean((1, 2, 3)), grey.ravel(), atol=1e-5
    )

    grey = change(video, saturation=0.9)
    hues = [[colorsys.rgb_to_hsv(*image[0, 3, 5])[0] for image in images] for images in (x, grey)]
    np.testing.assert_allclose(*hues, atol=1e-3)

    wild = change(video, brightness=3.0, contrast=3.0, saturation=3.0)
    assert wild.min() >= 0 and wild.max() <= 1 and wild.max() == 1


def test_a_key_decides_everything_and_every_window_differs():
    config = dict(crop=0.7, brightness=0.2, contrast=0.2, saturation=0.2)
    video = videos(1).repeat(2, axis=0)
    np.testing.assert_array_equal(change(video, **config), change(video, **config))
    one, other = change(video, **config)
    assert abs(one - other).max() > 0.01
    assert abs(change(video, key=1, **config)[0] - one).max() > 0.01


def test_datasets_of_a_mixture_are_cropped_by_their_own_layout():
    video, single = videos(), ((0, 0, 16, 48),)
    config = AugmentConfig(0.5, 0.0, 0.0, 0.0)
    draws = augment.draw(jax.random.key(0), 4, 3, config)
    apply = jax.jit(augment.apply, static_argnums=2)
    zeros = jnp.zeros(4, jnp.int32)
    mixed = apply(video, draws, (REGIONS, single, REGIONS), jnp.array([0, 1, 2, 1]))
    for layouts, rows in (((REGIONS,), [0, 2]), ((single,), [1, 3])):
        alone = apply(video, draws, layouts, zeros)
        np.testing.assert_allclose(mixed[np.array(rows)], alone[np.array(rows)], atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("crop", 0.0, "crop is 0.0; expected above 0 to 1"),
        ("crop", 1.5, "crop is 1.5; expected above 0 to 1"),
        ("contrast", -0.1, "contrast is -0.1; expected 0 or more"),
        ("brightness", 0.1, "set config.data.encode_online=True"),
    ],
)
def test_impossible_settings_are_refused(key, value, words):
    with pytest.raises(ValueError, match=words):
        config = synthetic.make_config(**{f"data.augment.{key}": value})
        encode_video.make_encoder(config, None)
