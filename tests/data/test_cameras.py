"""Cameras on a canvas and off it again."""

import types

import numpy as np
import pytest
from PIL import Image

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.encoders import base as encoders_base

CAMERAS = ("left", "right")


def declare(**keys):
    """The part of a `DataConfig` that says how images become a canvas."""
    return types.SimpleNamespace(
        **dict(cameras=CAMERAS, orientation=(), camera_size=(), layout="horizontal", canvas=(8, 16))
        | keys
    )


def random_images(*lead, size=(8, 8), cameras=CAMERAS):
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (*lead, *size, 3)).astype(np.uint8) for name in cameras}


def scaled(image, size, how=Image.Resampling.BILINEAR):
    """Float32 [h, w, 3] resized by Pillow, written without the code under test."""
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., c])).resize(size[::-1], how)
        for c in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("layout, canvas", [("horizontal", (8, 16)), ("vertical", (16, 8))])
def test_there_and_back_without_resampling(lead, layout, canvas):
    images, data = random_images(*lead), declare(layout=layout, canvas=canvas)
    laid_out = cameras_lib.canvas(images, data)
    assert laid_out.shape == (*lead, *canvas, 3) and laid_out.dtype == np.uint8
    np.testing.assert_array_equal(laid_out[..., :8, :8, :], images["left"])
    for name, image in cameras_lib.split(laid_out, data).items():
        np.testing.assert_array_equal(image, images[name])


def test_single():
    images = random_images(2)
    laid_out = cameras_lib.canvas(
        images, declare(cameras=("right",), layout="single", canvas=(8, 8))
    )
    np.testing.assert_array_equal(laid_out, images["right"])


def test_orientation():
    rows, columns = np.mgrid[:4, :6].astype(np.uint8)
    image = np.stack([rows, columns, 0 * rows], axis=-1)  # red: row, green: column
    corners = {
        "": (0, 0),
        "rotate_90": (0, 5),
        "rotate_180": (3, 5),
        "rotate_270": (3, 0),
        "flip_vertical": (3, 0),
        "flip_horizontal": (0, 5),
    }
    assert set(corners) == set(cameras_lib.ORIENTATIONS)
    for orientation, corner in corners.items():  # what is then at the top left
        size = (6, 4) if orientation in ("rotate_90", "rotate_270") else (4, 6)
        data = declare(cameras=("left",), orientation=(orientation,), layout="single", canvas=size)
        turned = cameras_lib.canvas({"left": image}, data)
        np.testing.assert_array_equal(cameras_lib.shown({"left": image}, data)["left"], turned)
        assert turned.dtype == np.uint8 and tuple(turned[0, 0, :2]) == corner, orientation
        assert sorted(map(tuple, turned.reshape(-1, 3))) == sorted(map(tuple, image.reshape(-1, 3)))


def test_each_camera_is_resized_to_its_place_or_to_what_the_config_says():
    images = random_images(size=(20, 30))
    direct = cameras_lib.canvas(images, declare(canvas=(16, 24)))
    floats = {name: image.astype(np.float32) / 255 for name, image in images.items()}
    wanted = np.concatenate([scaled(floats[name], (16, 12)) for name in CAMERAS], axis=1)
    assert direct.dtype == np.float32
    np.testing.assert_allclose(direct, wanted, atol=1e-6)
    # 10x10 each, 10x20 together, covers 16x24 when 16x32: four columns are lost on each side.
    both = np.concatenate([scaled(floats[name], (10, 10)) for name in CAMERAS], axis=1)
    wanted = scaled(both, (16, 32), Image.Resampling.BICUBIC)[:, 4:-4]
    data = declare(camera_size=(10, 10), canvas=(16, 24))
    np.testing.assert_allclose(cameras_lib.canvas(images, data), wanted, atol=1e-6)
    assert cameras_lib.regions(data) == {"left": (0, 0, 16, 12), "right": (0, 12, 16, 12)}
    shown = cameras_lib.shown(images, data)
    np.testing.assert_array_equal(shown["left"], images["left"][:, 8:])  # 30 * 4 / 16 = 7.5
    np.testing.assert_array_equal(shown["right"], images["right"][:, :22])


@pytest.mark.parametrize("margin, cut", [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (11, 6)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_crop_is_the_centre_with_halves_to_the_even_side(axis, margin, cut):
    """As Python's round: 0.5 is 0, 1.5 is 2, 2.5 is 2, 3.5 is 4."""
    size = [8, 8]
    size[axis] += margin
    images = random_images(2, size=size, cameras=("left",))
    data = declare(cameras=("left",), layout="single", camera_size=tuple(size), canvas=(8, 8))
    kept = [slice(0, 8), slice(0, 8)]
    kept[axis] = slice(cut, cut + 8)
    want = images["left"][:, kept[0], kept[1]]
    np.testing.assert_array_equal(cameras_lib.canvas(images, data), want)
    np.testing.assert_array_equal(cameras_lib.shown(images, data)["left"], want)


@pytest.mark.parametrize(
    "whole, canvas, covering, corner",
    [
        ((8, 8), (8, 16), (16, 16), (4, 0)),  # by the side that needs more
        ((8, 8), (16, 8), (16, 16), (0, 4)),
        ((16, 16), (4, 8), (8, 8), (2, 0)),
        ((5, 10), (2, 5), (3, 5), (0, 0)),  # 2.5 rows are three
        ((3, 5), (4, 8), (5, 8), (0, 0)),  # 4.8 as well
        ((20, 7), (24, 8), (24, 8), (0, 0)),  # 22.9 and 8 would not cover
    ],
)
def test_the_smallest_size_that_covers_the_canvas(whole, canvas, covering, corner):
    assert cameras_lib.cover(whole, canvas) == (covering, corner)


def test_floats_and_bytes_round_to_the_nearest():
    floats = np.float32([[[0, 0.4 / 255, 0.6 / 255], [254.6 / 255, 1.1, -0.1]]])
    assert encoders_base.to_uint8(floats).tolist() == [[[0, 0, 1], [255, 255, 0]]]
    raw = np.uint8([[[0, 51, 255]]])
    np.testing.assert_allclose(encoders_base.to_float(raw), [[[0, 0.2, 1]]], rtol=1e-6)
    assert encoders_base.to_float(raw).dtype == np.float32
    assert encoders_base.to_uint8(raw) is raw and encoders_base.to_float(floats) is floats


def test_borders_between_cells_go_to_the_nearest_cell():
    """Three cameras on a map of 4 x 8 cells: borders at 2.67 and 5.33 are 3 and 5."""
    data = declare(cameras=("a", "b", "c"), layout="horizontal", canvas=(24, 48))
    assert cameras_lib.regions(data, (4, 8)) == {
        "a": (0, 0, 4, 3),
        "b": (0, 3, 4, 2),
        "c": (0, 5, 4, 3),
    }
    stacked = declare(cameras=("a", "b", "c"), layout="vertical", canvas=(48, 24))
    assert cameras_lib.regions(stacked, (8, 4))["b"] == (3, 0, 2, 4)
    assert cameras_lib.regions(stacked)["c"] == (32, 0, 16, 24)


def test_what_is_resampled_is_not_clipped():
    checkers = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((4, 4)))[..., None]
    image = np.repeat(255 * checkers, 3, axis=-1).astype(np.uint8)
    large = cameras_lib.canvas(
        {"left": image},
        declare(cameras=("left",), layout="single", camera_size=(16, 16), canvas=(64, 64)),
    )
    assert -0.2 < large.min() < -0.02 and 1.02 < large.max() < 1.2
    eyes = encoders_base.to_uint8(large)
    assert eyes.dtype == np.uint8 and eyes.min() == 0 and eyes.max() == 255
    back = encoders_base.to_uint8(encoders_base.to_float(eyes))
    np.testing.assert_array_equal(back, eyes)


ROBOTWIN = ("head", "left", "right")


def test_robotwin_is_the_releases_image_or_fills_the_canvas():
    images = random_images(size=(30, 40), cameras=ROBOTWIN)
    floats = {name: image.astype(np.float32) / 255 for name, image in images.items()}

    def image(cells, camera_size=None):
        parts = {
            name: scaled(floats[name], camera_size) if camera_size else floats[name]
            for name in ROBOTWIN
        }
        parts = {name: scaled(parts[name], cells[name != "head"]) for name in ROBOTWIN}
        return np.concatenate(
            [parts["head"], np.concatenate([parts["left"], parts["right"]], axis=1)]
        )

    data = declare(cameras=ROBOTWIN, layout="robotwin", canvas=(384, 320), camera_size=(24, 32))
    wanted = image([(256, 320), (128, 160)], (24, 32))
    np.testing.assert_allclose(cameras_lib.canvas(images, data), wanted, atol=1e-6)
    assert cameras_lib.regions(data) == {
        "head": (0, 0, 256, 320),
        "left": (256, 0, 128, 160),
        "right": (256, 160, 128, 160),
    }
    assert cameras_lib.regions(data, (24, 20))["right"] == (16, 10, 8, 10)
    smaller = declare(cameras=ROBOTWIN, layout="robotwin", canvas=(96, 80), camera_size=(24, 32))
    np.testing.assert_allclose(
        cameras_lib.canvas(images, smaller),
        scaled(wanted, (96, 80), Image.Resampling.BICUBIC),
        atol=1e-6,
    )
    direct = declare(cameras=ROBOTWIN, layout="robotwin", canvas=(96, 80))
    np.testing.assert_allclose(
        cameras_lib.canvas(images, direct), image([(64, 80), (32, 40)]), atol=1e-6
    )


def test_regions_scale_with_the_map():
    data = declare(canvas=(64, 128))
    assert cameras_lib.regions(data)["right"] == (0, 64, 64, 64)
    assert cameras_lib.regions(data, (4, 8))["right"] == (0, 4, 4, 4)
    attention = np.arange(32.0).reshape(1, 4, 8, 1)
    np.testing.assert_array_equal(cameras_lib.split(attention, data)["right"], attention[:, :, 4:])


@pytest.mark.parametrize("canvas", [(16, 40), (24, 64)])
def test_regions_cover_a_cropped_canvas_once(canvas):
    """Three cameras of which the outer two lose something; each is found in its region."""
    cameras = ("a", "b", "c")
    data = declare(cameras=cameras, camera_size=(16, 16), canvas=canvas)
    images = {name: np.full((16, 16, 3), 50 * k, np.uint8) for k, name in enumerate(cameras)}
    seen = encoders_base.to_uint8(cameras_lib.canvas(images, data))
    count = np.zeros(canvas, int)
    for k, (top, left, height, width) in enumerate(cameras_lib.regions(data).values()):
        count[top : top + height, left : left + width] += 1
        assert (seen[top : top + height, left + 1 : left + width - 1] == 50 * k).mean() > 0.9
    assert (count == 1).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cameras=("left", "top")), "no image of camera 'top'; got 'left', 'right'"),
        (dict(canvas=(8, 15)), r"does not divide into 1 rows and 2 columns"),
        (dict(layout="single"), "'single' shows 1 camera, config.data.cameras names 2"),
        (dict(layout="robotwin"), "'robotwin' shows 3 cameras, config.data.cameras names 2"),
        (dict(camera_size=(8,)), r"config.data.camera_size is \(8,\); expected \(height, width\)"),
        (dict(cameras=("left", "right", "left")), "config.data.cameras names a camera twice"),
    ],
)
def test_errors_say_what_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        cameras_lib.canvas(random_images(), declare(**change))


def test_a_camera_that_would_be_cropped_away_is_an_error():
    data = declare(cameras=ROBOTWIN, camera_size=(8, 8), canvas=(8, 8))
    with pytest.raises(ValueError, match=r"'head' is cropped away: 3 cameras of .* do not fit"):
        cameras_lib.canvas(random_images(cameras=ROBOTWIN), data)


def test_images_are_checked():
    images = random_images(3)
    for wrong, message in (
        (images["right"].astype(np.float32), "'right' gives float32"),
        (images["right"][:2], r"\[2, 8, 8, 3\]; expected uint8 \[3, 'h', 'w'"),
        (np.moveaxis(images["right"], -1, 1), "channels last"),
        (images["right"][:, :0], r"\[3, 0, 8, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cameras_lib.canvas({**images, "right": wrong}, declare())
