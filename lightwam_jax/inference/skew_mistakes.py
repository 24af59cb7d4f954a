"""The mistakes that robots make with observations, as functions of a window: for the skew check.

Each makes of a window what the mistake would have sent. `skew_causes.py` looks for the one
that gives what the server saw, or did.
"""

import io
import itertools
import typing

import numpy as np
from PIL import Image

from lightwam_jax import config as config_lib
from lightwam_jax.data import cameras as cameras_lib

JPEG = (95, 90, 80, 75, 50)  # qualities
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
}
_SCALES = 0.75, 0.5, 0.25  # of the size of a camera
_COMMON = 224, 256  # edges that other policies want
_LATE = 1, 2, 3, 5, 10  # steps
UNITS = {
    1000.0: "millimetres for metres",
    0.001: "metres for millimetres",
    float(np.degrees(1)): "degrees for radians",
    float(np.radians(1)): "radians for degrees",
}
TURNS = {
    "flip_horizontal": "flipped left to right",
    "flip_vertical": "flipped upside down",
    "rotate_180": "turned by 180 degrees",
    "rotate_90": "turned by 90 degrees",
    "rotate_270": "turned by 270 degrees",
}


class Sent(typing.NamedTuple):
    """What a policy is given: as `Moment`, and the template that the prompt is written into."""

    images: dict
    state: np.ndarray
    prompt: str
    template: str


class Mistake(typing.NamedTuple):
    """A mistake.

    Attributes:
      name: in words. concerns: "images", "state", "prompt", or "time" for all of them.
      apply: function (`Window`) -> `Sent`.
    """

    name: str
    concerns: str
    apply: typing.Callable


def right(window):
    """Returns the `Sent` of a window without a mistake."""
    moment = window.moment()
    template = window.config.data.prompt_template
    return Sent(moment.images, moment.state, moment.prompt, template)


def every(windows):
    """Returns all `Mistake`s that can be tried on some windows, the likely ones first."""
    cameras = windows[0].config.data.cameras
    shapes = {image.shape[:2] for window in windows for image in window.moment().images.values()}
    found = [_of_images("red and blue swapped (BGR)", lambda image: image[..., ::-1])]
    found += [
        _of_images(f"pictures {words}", cameras_lib.ORIENTATIONS[turn])
        for turn, words in TURNS.items()
    ]
    found += [_swapped(*pair) for pair in itertools.combinations(cameras, 2)]
    found += [_late(steps) for steps in _LATE] + [_late(steps, ("images",)) for steps in _LATE]
    found += [_late(steps, ("state",)) for steps in _LATE]
    found += [_of_images(f"JPEG, quality about {q}", _jpeg(q)) for q in JPEG]
    found += [resized(size, name, back) for size in _sizes(shapes) for name in FILTERS
              for back in (True, False)]  # fmt: skip
    found += [_units(factor, words) for factor, words in UNITS.items()]
    return found + _templates(windows)


def _sizes(shapes):
    sizes = []
    for (height, width), scale in itertools.product(sorted(shapes), _SCALES):
        sizes.append((round(height * scale), round(width * scale)))
    sizes += [(edge, edge) for edge in _COMMON]
    return [size for size in dict.fromkeys(sizes) if size not in shapes]


def _of_images(name, function):
    def apply(window):
        sent = right(window)
        return sent._replace(images={c: function(image) for c, image in sent.images.items()})

    return Mistake(name, "images", apply)


def _swapped(one, other):
    def apply(window):
        sent = right(window)
        swapped = {one: sent.images[other], other: sent.images[one]}
        return sent._replace(images=sent.images | swapped)

    return Mistake(f"cameras {one!r} and {other!r} swapped", "images", apply)


def _late(steps, fields=("images", "state")):
    def apply(window):
        before = window.moment(steps)
        return right(window)._replace(**{name: getattr(before, name) for name in fields})

    what = "observation" if len(fields) > 1 else {"images": "pictures", "state": "state"}[fields[0]]
    words = f"stale: {what} of {steps} step{'s' * (steps > 1)} before"
    return Mistake(words, "time" if len(fields) > 1 else fields[0], apply)


def _jpeg(quality):
    def function(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return function


def resized(size, filter_name, back):
    """Returns the `Mistake` of pictures resized to (height, width), and perhaps back again."""

    def function(image):
        small = Image.fromarray(image).resize(size[::-1], FILTERS[filter_name])
        if back:
            small = small.resize(image.shape[1::-1], FILTERS[filter_name])
        return np.asarray(small)

    words = f"{size[0]}x{size[1]}{' and back' * back}, {filter_name}"
    return _of_images(f"resized before sending ({words})", function)


def _units(factor, words):
    def apply(window):
        sent = right(window)
        return sent._replace(state=(sent.state * np.float32(factor)))

    return Mistake(f"units of the state: {words} (x {factor:.4g})", "state", apply)


def _templates(windows):
    own = windows[0].config.data.prompt_template
    default = config_lib.DataConfig().prompt_template
    found = []
    usual = "{task}", default, "Task: {task}", own
    within = [own.replace("{task}", one) for one in usual]  # the robot's, and then the server's
    for template in dict.fromkeys((*usual, *within)):
        if template != own:
            found.append(_template(f"another prompt template: {template!r}", template))
    return [*found, _prompt("instruction in lower case", str.lower)]


def _template(name, template):
    apply = lambda window: right(window)._replace(template=template)
    return Mistake(name, "prompt", apply)


def _prompt(name, function):
    def apply(window):
        sent = right(window)
        return sent._replace(prompt=function(sent.prompt))

    return Mistake(name, "prompt", apply)
