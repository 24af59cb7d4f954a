"""Cameras that are not in alphabetical order, and borders that lie within a cell."""

import types

import numpy as np

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.encoders import base as encoders_base


def declare(cameras, **keys):
    defaults = dict(orientation=(), camera_size=(), layout="horizontal")
    return types.SimpleNamespace(cameras=cameras, **defaults | keys)


def test_cameras_and_orientations_keep_the_order_of_the_config():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 200  # the upper half is bright
    data = declare(("wrist", "scene"), orientation=("flip_vertical", ""), canvas=(2, 4))
    seen = cameras_lib.canvas({"scene": image, "wrist": image // 2}, data)[..., 0]
    assert seen.tolist() == [[0, 0, 200, 200], [100, 100, 0, 0]]


def test_borders_between_regions_go_to_the_nearest_cell():
    data = declare(("a", "b", "c"), canvas=(16, 48))
    # Borders at 1 1/3 and 2 2/3 of four cells.
    assert cameras_lib.regions(data, (2, 4)) == {
        "a": (0, 0, 2, 1),
        "b": (0, 1, 2, 2),
        "c": (0, 3, 2, 1),
    }


def test_levels_are_rounded_not_cut_off():
    levels = np.float32([0.4, 0.6, 99.7, 254.6]) / 255
    assert encoders_base.to_uint8(levels).tolist() == [0, 1, 100, 255]
