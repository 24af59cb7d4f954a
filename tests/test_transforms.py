"""Cameras on a canvas and off it again."""

import numpy as np
import pytest

from lightwam_jax.data import transforms

CAMERAS = ("left", "right")


def pictures(*lead, size=8):
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (*lead, size, size, 3)).astype(np.uint8) for name in CAMERAS}


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_horizontal_there_and_back(lead):
    images = pictures(*lead)
    canvas = transforms.layout(images, CAMERAS, "horizontal", (8, 16))
    assert canvas.shape == (*lead, 8, 16, 3)
    np.testing.assert_array_equal(canvas[..., :8, :], images["left"])
    for name, image in transforms.split(canvas, CAMERAS, "horizontal").items():
        np.testing.assert_array_equal(image, images[name])


def test_single():
    images = pictures(2)
    canvas = transforms.layout(images, ("right",), "single", (8, 8))
    np.testing.assert_array_equal(canvas, images["right"])


def test_regions_scale_with_the_map():
    assert transforms.regions(CAMERAS, "horizontal", (64, 128))["right"] == (0, 64, 64, 64)
    assert transforms.regions(CAMERAS, "horizontal", (4, 8))["right"] == (0, 4, 4, 4)
    attention = np.arange(32.0).reshape(1, 4, 8, 1)
    np.testing.assert_array_equal(
        transforms.split(attention, CAMERAS, "horizontal")["right"], attention[:, :, 4:])


def test_errors_say_what_to_change():
    images = pictures()
    with pytest.raises(ValueError, match="no image of camera 'top'; got 'left', 'right'"):
        transforms.layout(images, ("left", "top"), "horizontal", (8, 16))
    with pytest.raises(ValueError, match=r"'left' gives uint8 \[8, 8, 3\]; .* \[16, 16, 3\]"):
        transforms.layout(images, CAMERAS, "horizontal", (16, 32))
    with pytest.raises(ValueError, match="'left' gives float32"):
        floats = {name: image.astype(np.float32) for name, image in images.items()}
        transforms.layout(floats, CAMERAS, "horizontal", (8, 16))
    with pytest.raises(ValueError, match="does not divide into 2 cameras"):
        transforms.regions(CAMERAS, "horizontal", (8, 15))
    with pytest.raises(ValueError, match="'single' shows one camera"):
        transforms.regions(CAMERAS, "single", (8, 8))
    with pytest.raises(ValueError, match="'grid'; known layouts: single, horizontal"):
        transforms.regions(CAMERAS, "grid", (8, 8))
