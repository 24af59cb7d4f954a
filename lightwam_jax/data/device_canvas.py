"""`cameras.canvas` as a traced function: raw images cross to the device as uint8.

Every resize of cameras.py is linear, works on rows and columns apart, and is neither rounded nor
clipped. So all that happens to a camera, the last resize and the crop included, is one matrix for
its rows and one for its columns. The canvas is the sum over cameras of rows @ image @ columns^T.
The last resize mixes cameras where they meet: there two of these terms overlap.

The matrices come from the formula of Pillow's filters, in float64, while the function is traced.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.data import cameras as cameras_lib

_BLOCK = 32  # rows of a product


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
    out = np.float32(0)
    for cameras in _alike(axes):
        rows, columns = axes[cameras[0]]
        read = [views[camera][..., rows.source, columns.source, :] for camera in cameras]
        for camera, part in zip(cameras, _resampled(read, rows.weights, columns.weights)):
            targets = [axis.target for axis in axes[camera]]
            edges = [(0, 0)] * (part.ndim - 3)
            edges += [(t.start, size - t.stop) for t, size in zip(targets, data.canvas)]
            out = out + jnp.pad(part, [*edges, (0, 0)])  # zero where the other cameras are
    return out


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
        # The first resize makes the matrix: an identity of a large camera's size would be huge.
        own = data.camera_size[axis] if data.camera_size else place.size[axis]
        matrix = filter_weights(size, own, triangle)
        matrix = _resized_again(matrix, place.size[axis], triangle)
        laid = np.zeros((whole[axis], size))
        laid[place[axis] : place[axis] + place.size[axis]] = matrix
        laid = _resized_again(laid, covering[axis], cubic)
        return _trimmed(laid[corner[axis] :][: data.canvas[axis]])

    return {camera: (along(camera, 0), along(camera, 1)) for camera in data.cameras}


def filter_weights(size, new, kernel):
    """Returns float64 [new, size]: how Pillow makes `new` pixels of `size`."""
    if size == new:
        return np.eye(size)
    stretch = max(size / new, 1.0)  # the filter is as wide as a pixel of the coarser grid
    centres = (np.arange(new) + 0.5) * (size / new)
    weights = kernel((np.arange(size) + 0.5 - centres[:, None]) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


def _resized_again(matrix, new, kernel):
    """One more resize of what a matrix [pixels, pixels of the camera] makes."""
    size = len(matrix)
    return matrix if size == new else filter_weights(size, new, kernel) @ matrix


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


def _alike(axes):
    """Lists of cameras that read the same pixels of their images with the same weights."""
    groups = {}
    for camera, both in axes.items():
        key = tuple(
            (str(each.source), each.weights is not None and each.weights.tobytes()) for each in both
        )
        groups.setdefault(key, []).append(camera)
    return list(groups.values())


def _resampled(images, rows, columns):
    """Resamples each of `images`, uint8 [..., h, w, 3], with the same weights or None.

    An accelerator takes all at once: five launches, however many there are. A CPU takes one after
    another, which stays in its cache: at batch 64 that needs half the time.

    Returns: a list of float32 [..., H, W, 3].
    """
    if rows is None and columns is None:
        return [pixels(image) for image in images]
    lead, shape = images[0].shape[:-3], images[0].shape[-3:]

    def resample(x):  # each product is over the first axis
        x = pixels(x).transpose(1, 2, 0, 3)
        x = _product(columns, _product(rows, x).swapaxes(0, 1))
        return x.transpose(2, 1, 0, 3)

    def together(*images):
        return tuple(jnp.split(resample(jnp.concatenate(images)), len(images)))

    def apart(*images):
        one = lambda image: resample(image[None])[0]
        return tuple(jax.lax.map(one, image) for image in images)

    flat = [image.reshape(-1, *shape) for image in images]
    parts = jax.lax.platform_dependent(*flat, cpu=apart, default=together)
    return [part.reshape(*lead, *part.shape[-3:]) for part in parts]


def _product(weights, x):
    """weights [O, I] times x [I, ...] -> [O, ...]; x where weights is None.

    Few weights of a row are not zero, and they move along with the row. So every `_BLOCK` rows
    are one product with the part of x that they read: a sixth of the work at 480 -> 224.
    """
    if weights is None:
        return x
    blocks = -(-len(weights) // _BLOCK)
    padded = np.zeros((blocks * _BLOCK, weights.shape[1]), np.float32)
    padded[: len(weights)] = weights
    padded = padded.reshape(blocks, _BLOCK, -1)
    read = [np.flatnonzero(block.any(axis=0))[[0, -1]] for block in padded]
    width = max(int(last - first) + 1 for first, last in read)
    starts = [min(int(first), len(x) - width) for first, _ in read]
    kernels = np.stack([block[:, at : at + width] for at, block in zip(starts, padded)])
    windows = jnp.stack([x[at : at + width] for at in starts])
    out = jnp.einsum("nOI,nI...->nO...", kernels, windows, precision="highest")
    return out.reshape(-1, *x.shape[1:])[: len(weights)]


def pixels(image):
    """`encoders_base.to_float` of uint8, to the same bits where a compiler divides by multiplying.

    x / 255 is x * 257 / 65536, which is exact, and 1 / 65536 of x / 255.
    """
    x = image.astype(np.float32)
    return x * np.float32(257 / 65536) + x * np.float32(1 / 255 / 65536)
