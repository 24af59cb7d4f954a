"""`cameras.canvas` as a traced function: raw images cross to the device as uint8.

Every resize of cameras.py is linear, works on rows and columns apart, and is neither rounded nor
clipped. So all that happens to a camera, the last resize and the crop included, is one matrix for
its rows and one for its columns. The canvas is the sum over cameras of rows @ image @ columns^T.
The last resize mixes cameras where they meet: there two of these terms overlap.

The matrices come from the formula of Pillow's filters, in float64, while the function is traced.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.data import cameras as cameras_lib


class Axis(typing.NamedTuple):
    """What one camera gives to the canvas, along rows or along columns.

    Attributes:
      source: slice of the camera's pixels that are read. target: slice of the canvas.
      weights: float32 [pixels of target, pixels of source]; None: each pixel goes over as it is.
    """

    source: slice
    target: slice
    weights: np.ndarray | None


def canvas(images, data):
    """Lays raw camera images out on the canvas; to be traced, under `jax.jit`.

    A program is compiled for each set of shapes. Before the call, `cameras.check` says on the host
    what is wrong with images, in the same words.

    Args:
      images: {camera: uint8 [..., h, w, 3]}; see `cameras.canvas`.
      data: `DataConfig`.

    Returns:
      float32 [..., H, W, 3] in 0..1: within 1e-6 of `encoders_base.to_float(cameras.canvas(...))`,
      and the same bits where a camera is not resampled.

    Raises:
      ValueError: as `cameras.canvas`.
    """
    views = cameras_lib.oriented(images, data)
    cameras_lib.regions(data)  # raises where a camera would be cropped away
    axes = plan({camera: view.shape[-3:-1] for camera, view in views.items()}, data)
    parts = [_placed(view, axes[camera], data.canvas) for camera, view in views.items()]
    return functools.reduce(jnp.add, parts)  # elsewhere a part is zero


def plan(sizes, data):
    """Returns {camera: (`Axis` of its rows, `Axis` of its columns)}.

    Args:
      sizes: {camera: (height, width)} of the images, as they are turned.
      data: `DataConfig`.
    """
    places, whole = cameras_lib.layout(data)
    covering, corner = cameras_lib.cover(whole, data.canvas)

    def along(camera, axis):
        size, place = sizes[camera][axis], places[camera]
        own = data.camera_size[axis] if data.camera_size else size
        laid = filter_weights(own, place.size[axis], triangle)
        laid = laid @ filter_weights(size, own, triangle)
        last = filter_weights(whole[axis], covering[axis], cubic)
        last = last[corner[axis] :, place[axis] :][: data.canvas[axis], : place.size[axis]]
        return _trimmed(last @ laid)

    return {camera: (along(camera, 0), along(camera, 1)) for camera in data.cameras}


def filter_weights(size, new, kernel):
    """Returns float64 [new, size]: how Pillow makes `new` pixels of `size`."""
    if size == new:
        return np.eye(size)
    stretch = max(size / new, 1.0)  # the filter is as wide as a pixel of the coarser grid
    centres = (np.arange(new) + 0.5) * (size / new)
    weights = kernel((np.arange(size) + 0.5 - centres[:, None]) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


def triangle(x):
    """The bilinear filter."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x, a=-0.5):
    """The bicubic filter: Keys' cubic."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _trimmed(matrix):
    """Returns the `Axis` of [canvas pixels, camera pixels], without its zero borders."""

    def used(axis):
        found = np.flatnonzero(matrix.any(axis=axis))
        return slice(int(found[0]), int(found[-1]) + 1)

    target, source = used(1), used(0)
    weights = matrix[target, source]
    same = weights.shape[0] == weights.shape[1] and (weights == np.eye(len(weights))).all()
    return Axis(source, target, None if same else weights.astype(np.float32))


def _placed(view, axes, size):
    """One camera's part of the canvas, float32 [..., *size, 3]; zero elsewhere."""
    rows, columns = axes
    part = _pixels(view[..., rows.source, columns.source, :])
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=np.float32)
    if rows.weights is not None:
        part = product("Hh,...hwc->...Hwc", rows.weights, part)
    if columns.weights is not None:
        part = product("Ww,...hwc->...hWc", columns.weights, part)
    edges = [(axis.target.start, n - axis.target.stop, 0) for axis, n in zip(axes, size)]
    return jax.lax.pad(part, np.float32(0), [(0, 0, 0)] * (part.ndim - 3) + [*edges, (0, 0, 0)])


def _pixels(image):
    """`encoders_base.to_float` of uint8, to the same bits where a compiler divides by multiplying.

    x / 255 is x * 257 / 65536, which is exact, and 1 / 65536 of x / 255.
    """
    x = image.astype(np.float32)
    return x * np.float32(257 / 65536) + x * np.float32(1 / 255 / 65536)
