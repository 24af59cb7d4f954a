"""Checks of what happens to images on their way to the canvas.

Sizes are read off the files; layouts follow from the names of the arrays, and the size of
RoboTwin's cameras, which no file tells, is the release's.
"""

import re
import types

import numpy as np
from PIL import Image

from converters.parity.fixtures import FACTOR, RELATIVE_NOISE, Compare, NotCovered, matching
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.encoders import base as encoders_base

# Where a resized pixel comes from, the reference computes in float32: its weights are off by up to
# this many units in the last place of a side, measured against float64 (2.06 at most over 800
# images of zeros and ones). Pillow computes weights in float64.
_PLACES = 2.5


def _resize_noise(size):
    """How far the reference's own resize of images of this size may be off, in 0..1."""
    return _PLACES * np.spacing(np.float32(max(size) - 1))


def _declared(cameras, layout, canvas, camera_size):
    """The part of a `DataConfig` that says how images become a canvas."""
    return types.SimpleNamespace(
        cameras=tuple(cameras),
        orientation=(),
        layout=layout,
        canvas=tuple(canvas),
        camera_size=tuple(camera_size),
    )


def video(images, data):
    """{camera: uint8 [T, 3, h, w]} -> (the reference's video [3, T, H, W] in -1..1, tolerance)."""
    images = {camera: np.moveaxis(image, 1, -1) for camera, image in images.items()}
    canvas = encoders_base.to_float(cameras_lib.canvas(images, data))
    places, whole = cameras_lib.layout(data)
    steps = (  # each resizes images from one size to another
        [(image.shape[1:3], data.camera_size) for image in images.values()],
        [(data.camera_size, place[2:]) for place in places.values()],
        [(whole, data.canvas)],
    )
    resized = [[given for given, size in step if tuple(given) != tuple(size)] for step in steps]
    noise = sum(max(map(_resize_noise, step), default=0.0) for step in resized)
    return np.moveaxis((canvas - 0.5) / 0.5, -1, 0), FACTOR * RELATIVE_NOISE + 2 * noise


def _recorded_video(name, data, declared):
    """Checks the parts of a video that were recorded: some rows, every so many pixels."""
    got, tolerance = video(_cameras(data), declared)
    compare = Compare("h_data", name)
    yield compare.exact("video_shape", got.shape, data["video_shape"])
    for tensor in sorted(data):
        if match := re.fullmatch(r"video_every(\d+)", tensor):
            step = int(match[1])
            yield compare(tensor, got[..., ::step, ::step], data[tensor], tolerance=tolerance)
        elif tensor == "video_rows":
            yield compare(tensor, got[..., data["rows"], :], data[tensor], tolerance=tolerance)
        elif not tensor.startswith("cam_") and tensor not in ("rows", "video_shape"):
            yield NotCovered(f"h_data/{name}/{tensor}")


def _cameras(data):
    return {key: value for key, value in data.items() if key.startswith("cam_")}


def libero_image(group):
    data = group.arrays("libero_image.npz")
    names, (height, width) = _cameras(data), map(int, data["video_shape"][-2:])
    declared = _declared(names, "horizontal", (height, width), (height, width // len(names)))
    yield from _recorded_video("libero_image", data, declared)


def robotwin_image(group):
    from configs import robotwin  # the size of its cameras is in no file

    data = group.arrays("robotwin_image.npz")
    canvas = map(int, data["video_shape"][-2:])
    size = robotwin.get_config().data.camera_size
    declared = _declared(_cameras(data), "robotwin", canvas, size)
    yield from _recorded_video("robotwin_image", data, declared)


def small_images(group):
    data, read = group.arrays("small_images.npz"), set()
    compare = Compare("h_data", "small_images")
    for key in matching(data, "*_raw"):
        name = key.removesuffix("_raw")
        raw, size = data[key], [int(side) for side in data[f"{name}_size"]]  # raw [V, T, 3, h, w]
        images = {str(camera): frames for camera, frames in enumerate(raw)}
        layout = "single" if len(raw) == 1 else "vertical" if name.startswith("v") else "horizontal"
        got, tolerance = video(images, _declared(images, layout, size, raw.shape[-2:]))
        read |= {key, f"{name}_size", f"{name}_video"}
        title = f"{name}: {layout} {raw.shape[-2:]} to {size}"
        yield compare(title, got, data[f"{name}_video"], tolerance=tolerance)
    for key in matching(data, "resize_bi*"):
        how, name = key.removeprefix("resize_").split("_", 1)
        given, wanted = (np.moveaxis(data[k], -3, -1) for k in (f"resize_in_{name}", key))
        got = cameras_lib.resize(given, wanted.shape[-3:-1], Image.Resampling[how.upper()])
        read |= {key, f"resize_in_{name}"}
        tolerance = FACTOR * RELATIVE_NOISE + _resize_noise(given.shape[-3:-1])
        yield compare(key, got, wanted, tolerance=tolerance)
    yield from (NotCovered(f"h_data/small_images.npz/{key}") for key in sorted(set(data) - read))


def uint8_roundtrip(group):
    data = group.arrays("uint8_roundtrip.npz")
    got = encoders_base.to_uint8(encoders_base.to_float(data["v"]))
    yield Compare("h_data", "uint8_roundtrip").exact("to float and back", got, data["back"])
