"""Camera images to the one canvas that the video model sees, and back.

config.data declares these steps, in this order, as in the release (docs/spec.md section 11):

  1. orientation: each camera is turned or mirrored.
  2. camera_size: each camera is resized to it (bilinear, antialiased). Without one, each camera is
     resized to its place on the canvas instead, and steps 3 and 4 resample nothing.
  3. layout: "single"; "horizontal" and "vertical", cameras side by side or stacked; "robotwin", the
     first camera above the other two. With a camera_size, "robotwin" is the release's image of
     384x320: 256x320 above 128x160 twice, each resized once more (bilinear, antialiased).
  4. canvas: the smallest resize (bicubic, antialiased) that covers it, then the crop of its centre.

Sizes are (height, width). Pillow resizes: pixel centres at halves, the filter stretched when
shrinking, taps beyond the border left out, Keys' cubic with a = -0.5. device_canvas.py does the
same under `jax.jit`.
"""

import typing

import numpy as np
from PIL import Image

from lightwam_jax.encoders import base as encoders_base

ORIENTATIONS = {  # of numpy or traced jax arrays
    "": lambda x: x,
    "rotate_90": lambda x: x.swapaxes(-3, -2)[..., ::-1, :, :],  # counter-clockwise
    "rotate_180": lambda x: x[..., ::-1, ::-1, :],
    "rotate_270": lambda x: x.swapaxes(-3, -2)[..., ::-1, :],
    "flip_vertical": lambda x: x[..., ::-1, :, :],  # upside down
    "flip_horizontal": lambda x: x[..., ::-1, :],
}
_ROBOTWIN = (384, 320)


class Box(typing.NamedTuple):
    """A rectangle of an image or a map, in pixels or cells."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self):
        """(height, width)."""
        return self.height, self.width

    @property
    def pixels(self):
        """The index of the box in an array [..., H, W, C]."""
        rows = slice(self.top, self.top + self.height)
        return ..., rows, slice(self.left, self.left + self.width), slice(None)

    def moved(self, edge):
        """Returns the box whose edges are edge(e, axis) of the edges e of this one."""
        top, left = edge(self.top, 0), edge(self.left, 1)
        bottom, right = edge(self.top + self.height, 0), edge(self.left + self.width, 1)
        return Box(top, left, bottom - top, right - left)


def canvas(images, data):
    """Lays raw camera images out on the canvas that config.data declares; see above.

    Args:
      images: {camera: uint8 [..., h, w, 3]}, as the robot or the data give them; other cameras than
        config.data.cameras are ignored.
      data: `DataConfig`.

    Returns:
      [..., H, W, 3], H and W of data.canvas: uint8 in 0..255 where no image had to be resampled,
      else float32 in 0..1, neither rounded nor clipped: a bicubic resize may pass them slightly.

    Raises:
      ValueError: a camera is missing, not uint8 images, or does not fit with the others; or a
        layout that does not fit the canvas; see `regions`.
    """
    views = oriented(images, data)
    regions(data)  # raises where a camera would be cropped away
    places, whole = layout(data)
    for camera, view in views.items():
        view = resize(view, data.camera_size) if data.camera_size else view
        views[camera] = resize(view, places[camera].size)
    if any(view.dtype != np.uint8 for view in views.values()):
        views = {camera: encoders_base.to_float(view) for camera, view in views.items()}
    first = views[data.cameras[0]]
    out = np.empty((*first.shape[:-3], *whole, 3), first.dtype)
    for camera, place in places.items():
        out[place.pixels] = views[camera]
    covering, corner = cover(whole, data.canvas)
    return resize(out, covering, Image.Resampling.BICUBIC)[Box(*corner, *data.canvas).pixels]


def resize(images, size, how=Image.Resampling.BILINEAR):
    """Resizes [..., h, w, C], antialiased; uint8 becomes float32 in 0..1.

    Returns:
      float32 [..., *size, C]; the images themselves where they have that size.
    """
    if images.shape[-3:-1] == tuple(size):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    out = np.empty((len(flat), *size, flat.shape[-1]), np.float32)
    for image, place in zip(map(encoders_base.to_float, flat), out):
        for channel in range(image.shape[-1]):  # Pillow's float images have one channel
            plane = Image.fromarray(image[..., channel])
            place[..., channel] = plane.resize((size[1], size[0]), how)
    return out.reshape(*images.shape[:-3], *out.shape[1:])


def regions(data, size=None):
    """Returns {camera: `Box`}: where each camera lies on the canvas.

    What the centre crop cuts off a camera is not part of its region.

    Args:
      data: `DataConfig`.
      size: (height, width) in which to measure: of a latent or attention map of the same layout.
        Default: pixels of data.canvas. Borders between its cells go to the nearest cell.

    Raises:
      ValueError: a layout that does not fit the canvas, or that crops a camera away.
    """
    places, whole = layout(data)
    covering, corner = cover(whole, data.canvas)
    cells = size or data.canvas

    def on_canvas(edge, axis):
        pixel = edge * covering[axis] / whole[axis] - corner[axis]
        pixel = np.clip(pixel, 0, data.canvas[axis])
        return round(pixel * cells[axis] / data.canvas[axis])

    boxes = {camera: place.moved(on_canvas) for camera, place in places.items()}
    gone = [camera for camera, box in boxes.items() if not box.height * box.width]
    if gone and size is None:
        raise ValueError(
            f"camera {gone[0]!r} is cropped away: {len(places)} cameras of "
            f"{tuple(data.camera_size)} in layout {data.layout!r} do not fit "
            f"config.data.canvas={tuple(data.canvas)}; change one of them"
        )
    return boxes


def split(canvas, data):
    """Returns {camera: view [..., h, w, C]} of a canvas or map [..., H, W, C]; see `regions`."""
    boxes = regions(data, canvas.shape[-3:-1])
    return {camera: canvas[box.pixels] for camera, box in boxes.items()}


def shown(images, data):
    """Returns {camera: uint8 [..., h, w, 3]}: the part of each image that the canvas shows.

    Turned as on the canvas, without what the centre crop cuts off, in the images' own resolution:
    a region of a map can be drawn over it.
    """
    places, whole = layout(data)
    covering, corner = cover(whole, data.canvas)
    crop = Box(*corner, *data.canvas)

    def window(place, size):
        """What the crop leaves of an image of that size, laid at `place`."""

        def on_image(edge, axis):
            share = (edge * whole[axis] / covering[axis] - place[axis]) / place.size[axis]
            return round(np.clip(share, 0, 1) * size[axis])

        return crop.moved(on_image)

    views = oriented(images, data)
    boxes = {name: window(places[name], view.shape[-3:-1]) for name, view in views.items()}
    return {name: view[boxes[name].pixels] for name, view in views.items()}


def layout(data):
    """Returns how cameras lie together before the last resize and crop.

    Returns:
      ({camera: `Box`}, (height, width) of them all).

    Raises:
      ValueError: keys of config.data that do not fit together.
    """
    for key in ("canvas", "camera_size"):
        size = getattr(data, key)
        if (size or key == "canvas") and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"config.data.{key} is {tuple(size)}; expected (height, width)")
    cameras, count = data.cameras, len(data.cameras)
    if len(set(cameras)) < count:
        raise ValueError(f"config.data.cameras names a camera twice: {', '.join(cameras)}")
    wanted = {"single": 1, "robotwin": 3}.get(data.layout, count)
    if count != wanted:
        raise ValueError(
            f"config.data.layout={data.layout!r} shows {wanted} camera{'s' * (wanted > 1)}, "
            f"config.data.cameras names {count}: name {wanted}, or use layout 'horizontal' or "
            "'vertical'"
        )
    grids = {"horizontal": (1, count), "vertical": (count, 1), "robotwin": (3, 2)}
    rows, columns = grids.get(data.layout, (1, 1))
    if not data.camera_size:
        height, width = data.canvas
    elif data.layout == "robotwin":
        height, width = _ROBOTWIN
    else:
        height, width = rows * data.camera_size[0], columns * data.camera_size[1]
    if height % rows or width % columns:
        raise ValueError(
            f"config.data.canvas={tuple(data.canvas)} does not divide into {rows} rows and "
            f"{columns} columns, as layout {data.layout!r} of {count} cameras needs: change the "
            "canvas, or set config.data.camera_size"
        )
    h, w = height // rows, width // columns
    if data.layout == "robotwin":
        boxes = [Box(0, 0, 2 * h, width), Box(2 * h, 0, h, w), Box(2 * h, w, h, w)]
    else:
        boxes = [Box(row * h, column * w, h, w) for row in range(rows) for column in range(columns)]
    return dict(zip(cameras, boxes)), (height, width)


def cover(whole, canvas):
    """(The smallest size of the aspect of `whole` that covers the canvas, corner of its centre)."""
    ratio = max(canvas[1] / whole[1], canvas[0] / whole[0])
    covering = tuple(int(ratio * side + 0.5) for side in whole)
    return covering, tuple(round((a - b) / 2) for a, b in zip(covering, canvas))


def given_sizes(data):
    """Returns {camera: (height, width)} of images that fit their places once they are turned."""
    turns = dict(zip(data.cameras, data.orientation or ("",) * len(data.cameras)))
    turned = lambda name, size: size[::-1] if turns[name].endswith(("_90", "_270")) else size
    return {name: turned(name, box.size) for name, box in layout(data)[0].items()}


def check(images, data):
    """Checks that `images` are what `canvas` takes; reads types and shapes, no pixels.

    Args:
      images: {camera: array [..., h, w, 3]}: numpy, jax, or traced.
      data: `DataConfig`.

    Raises:
      ValueError: a camera is missing, not uint8 images, or does not fit with the others.
    """
    missing = [camera for camera in data.cameras if camera not in images]
    if missing:
        missing, got, wanted = (", ".join(map(repr, n)) for n in (missing, images, data.cameras))
        raise ValueError(
            f"no image of camera {missing}; got {got}, config.data.cameras wants {wanted}"
        )
    lead = images[data.cameras[0]].shape[:-3]
    for camera in data.cameras:
        image = images[camera]
        is_image = image.dtype == np.uint8 and image.ndim >= 3 and image.shape[-1] == 3
        if not is_image or image.shape[:-3] != lead or 0 in image.shape[-3:]:
            raise ValueError(
                f"camera {camera!r} gives {image.dtype} {list(image.shape)}; expected "
                f"uint8 {[*lead, 'h', 'w', 3]}, RGB with channels last and as many "
                f"images as camera {data.cameras[0]!r}"
            )


def oriented(images, data):
    """{camera: uint8 [..., h, w, 3]} of config.data.cameras, checked and turned; see `check`."""
    check(images, data)
    turns = zip(data.cameras, data.orientation or ("",) * len(data.cameras))
    return {camera: ORIENTATIONS[orientation](images[camera]) for camera, orientation in turns}
