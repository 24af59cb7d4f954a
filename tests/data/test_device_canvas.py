"""The canvas as a traced function equals the canvas that Pillow makes."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import device_canvas
from lightwam_jax.encoders import base as encoders_base

THREE = ("head", "left", "right")


def declare(**keys):
    """The part of a `DataConfig` that says how images become a canvas."""
    keys = dict(cameras=THREE[:2], orientation=(), camera_size=(), layout="horizontal") | keys
    return types.SimpleNamespace(**keys)


def images_of(data, sizes, kind="random", lead=(2,)):
    """{camera: uint8 [*lead, height, width, 3]}; "checkers" alternate between 0 and 255."""
    rng = np.random.default_rng(0)
    images = {}
    for camera, size in zip(data.cameras, sizes):
        noise = rng.integers(0, 256, (*lead, *size, 3), np.uint8)
        checkers = np.indices(noise.shape).sum(0) // 2 % 2 * 255
        images[camera] = noise if kind == "random" else checkers.astype(np.uint8)
    return images


def both(images, data):
    """(The traced canvas, Pillow's as float32)."""
    traced = jax.jit(lambda images: device_canvas.canvas(images, data))(images)
    return np.asarray(traced), encoders_base.to_float(cameras_lib.canvas(images, data))


@pytest.mark.parametrize("size, new", [(48, 22), (7, 16), (5, 64), (31, 3), (9, 8), (8, 9), (2, 1)])
@pytest.mark.parametrize(
    "how, kernel",
    [
        (Image.Resampling.BILINEAR, device_canvas.triangle),
        (Image.Resampling.BICUBIC, device_canvas.cubic),
    ],
)
def test_the_weights_are_those_that_pillow_gives_to_single_pixels(size, new, how, kernel):
    impulses = Image.fromarray(np.eye(size, dtype=np.float32))
    wanted = np.asarray(impulses.resize((new, size), how)).T
    weights = device_canvas.filter_weights(size, new, kernel)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, wanted, rtol=1e-6, atol=1e-9)


LAYOUTS = {  # keys of config.data, sizes of the images as they come
    "shrunk to their places": (dict(canvas=(16, 24)), [(37, 53)] * 2),
    "enlarged to their places": (dict(canvas=(40, 96)), [(7, 11), (30, 20)]),
    "one of two as it is": (dict(canvas=(8, 16)), [(8, 8), (9, 13)]),
    "rows as they are": (dict(canvas=(8, 16)), [(8, 30), (8, 5)]),
    "stacked": (dict(layout="vertical", canvas=(32, 12)), [(33, 21), (14, 12)]),
    "three": (dict(cameras=THREE, canvas=(10, 24)), [(21, 17), (10, 8), (5, 40)]),
    "camera_size, canvas of their sum": (dict(camera_size=(9, 8), canvas=(9, 16)), [(48, 64)] * 2),
    "enlarged over the border": (dict(camera_size=(10, 9), canvas=(33, 60)), [(24, 31), (10, 9)]),
    "shrunk over the border": (dict(camera_size=(40, 40), canvas=(12, 21)), [(40, 40), (61, 33)]),
    "stacked over the border": (
        dict(layout="vertical", camera_size=(11, 12), canvas=(27, 11)),
        [(25, 19), (19, 25)],
    ),
    "only the last resize": (
        dict(cameras=("left",), layout="single", camera_size=(16, 16), canvas=(21, 17)),
        [(16, 16)],
    ),
    "robotwin": (
        dict(cameras=THREE, layout="robotwin", camera_size=(24, 32), canvas=(384, 320)),
        [(30, 40), (17, 23), (24, 32)],
    ),
    "robotwin, smaller": (
        dict(cameras=THREE, layout="robotwin", camera_size=(24, 32), canvas=(60, 46)),
        [(48, 64)] * 3,
    ),
    "robotwin to its places": (
        dict(cameras=THREE, layout="robotwin", canvas=(24, 20)),
        [(33, 47), (8, 10), (12, 9)],
    ),
    "turned": (
        dict(
            cameras=THREE,
            orientation=("rotate_90", "rotate_270", "flip_vertical"),
            camera_size=(15, 11),
            canvas=(16, 30),
        ),
        [(23, 41), (41, 23), (12, 19)],
    ),
}


def as_on_an_accelerator(monkeypatch):
    """All images in one product; a CPU takes one after another."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_canvas_is_pillows(name, monkeypatch):
    keys, sizes = LAYOUTS[name]
    data = declare(**keys)
    for kind in ("random", "checkers"):
        if kind == "checkers":
            as_on_an_accelerator(monkeypatch)
        traced, wanted = both(images_of(data, sizes, kind), data)
        assert traced.dtype == np.float32 and traced.shape == (2, *data.canvas, 3)
        np.testing.assert_allclose(traced, wanted, rtol=0, atol=1e-6)


def test_the_released_sizes():
    data = declare(camera_size=(224, 224), canvas=(224, 448))
    traced, wanted = both(images_of(data, [(480, 640), (256, 256)], lead=(1,)), data)
    np.testing.assert_allclose(traced, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", cameras_lib.ORIENTATIONS)
def test_what_is_not_resampled_keeps_its_bits(orientation):
    """All 256 levels, turned, with a camera beside it that is resampled or none."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    images = {"head": levels, "left": levels.swapaxes(1, 2)}
    data = declare(orientation=(orientation, ""), canvas=(16, 32))
    traced, wanted = both(images, data)
    np.testing.assert_array_equal(traced, wanted)
    assert len(np.unique(traced)) == 256
    images["left"] = images["left"][:, :13]
    traced, wanted = both(images, data)
    np.testing.assert_array_equal(traced[:, :, :16], wanted[:, :, :16])


def test_a_crop_alone_resamples_nothing():
    data = declare(camera_size=(9, 13), canvas=(9, 21))
    traced, wanted = both(images_of(data, [(9, 13)] * 2), data)
    np.testing.assert_array_equal(traced, wanted)
    rows, columns = device_canvas.plan(dict.fromkeys(data.cameras, (9, 13)), data)["head"]
    assert rows == (slice(0, 9), slice(0, 9), None)
    assert columns == (slice(2, 13), slice(0, 11), None)  # 5 of 26 columns are cut off: 2 and 3


def test_each_level_keeps_its_bits_where_a_compiler_fuses_products_with_sums():
    """x * a + x * b rounded once or twice; a is the first factor, so that x * a is exact."""
    x = np.arange(256, dtype=np.float64)
    a, b = np.float32(257 / 65536), np.float32(1 / 255 / 65536)
    np.testing.assert_array_equal(x * a, (x * a).astype(np.float32))
    wanted = encoders_base.to_float(x.astype(np.uint8))
    np.testing.assert_array_equal((x * a + x * b).astype(np.float32), wanted)
    np.testing.assert_array_equal(device_canvas.pixels(x.astype(np.uint8)), wanted)


def test_products_are_of_full_float32():
    """A GPU's default may be TF32, a TPU's is bfloat16."""
    data = declare(camera_size=(10, 9), canvas=(33, 60))
    images = images_of(data, [(24, 31), (10, 9)])
    text = str(jax.make_jaxpr(lambda images: device_canvas.canvas(images, data))(images))
    products = text.count("dot_general[")
    assert products and text.count("Precision.HIGHEST, Precision.HIGHEST") == products


def test_any_number_of_leading_axes():
    data = declare(canvas=(16, 24))
    for lead in ((), (2, 3)):
        traced, wanted = both(images_of(data, [(20, 30)] * 2, lead=lead), data)
        assert traced.shape == (*lead, 16, 24, 3)
        np.testing.assert_allclose(traced, wanted, rtol=0, atol=1e-6)


def test_errors_are_the_same_on_the_host_and_while_tracing():
    data = declare(canvas=(8, 16))
    good = images_of(data, [(8, 8)] * 2)
    bad = [
        {"head": good["head"]},
        {**good, "left": good["left"].astype(np.float32)},
        {**good, "left": good["left"][:1]},
        {**good, "left": good["left"][:, :0]},
        {**good, "left": np.moveaxis(good["left"], -1, 1)},
    ]
    for images in bad:
        with pytest.raises(ValueError) as found:
            cameras_lib.canvas(images, data)
        for check in (cameras_lib.check, device_canvas.canvas):
            with pytest.raises(ValueError) as same:
                jax.eval_shape(lambda images, check=check: check(images, data), images)
            assert str(same.value) == str(found.value)
    gone = declare(cameras=THREE, camera_size=(8, 8), canvas=(8, 8))
    with pytest.raises(ValueError, match="'head' is cropped away"):
        device_canvas.canvas(images_of(gone, [(8, 8)] * 3), gone)
