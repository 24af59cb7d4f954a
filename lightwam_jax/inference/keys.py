"""Which key of a request is which camera, state and instruction: tables, as data.

A path is a flat key, or the keys of nested maps; "images.top", "images/top" and {"images": {"top":
...}} are the same path. The table "lightwam" fits every policy and is always read; of the others,
those that name a robot, a server reads the one that fits its policy, or the one it is told.
"""

import json
import re
import typing

import numpy as np

from lightwam_jax.inference import wire

OPTIONAL = (
    "request_id",
    "step",
    "age_ms",
    "deadline_ms",
    "stages",
)  # keys that any request may have
LAYOUTS = ("hwc", "chw", "auto")
TURNS = ("", "rotate_90", "rotate_180", "rotate_270", "flip_vertical", "flip_horizontal")


class Camera(typing.NamedTuple):
    """Where an image is, and how.

    Attributes:
      path: of the request. layout: of `LAYOUTS`; "auto": told apart by the shape.
      turned: what the client has done to the picture already, as config.data.orientation names it.
    """

    path: str
    layout: str = "auto"
    turned: str = ""


class Table(typing.NamedTuple):
    """How to read a request.

    Attributes:
      name: of the table. images: {camera: `Camera`}. state: paths, concatenated.
      prompt: path. widths: of the state's parts; () for any.
    """

    name: str
    images: dict
    state: tuple
    prompt: str
    widths: tuple = ()


_ROBOTS = {
    "openpi_libero": Table(
        "openpi_libero",
        {
            "image": Camera("observation/image", "hwc", "rotate_180"),
            "wrist_image": Camera("observation/wrist_image", "hwc", "rotate_180"),
        },
        ("observation/state",),
        "prompt",
        (8,),
    ),
    "openpi_aloha": Table(
        "openpi_aloha",
        {
            name: Camera(f"images.{name}", "chw")
            for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        },
        ("state",),
        "prompt",
        (14,),
    ),
    "openpi_droid": Table(
        "openpi_droid",
        {
            "exterior_image_1_left": Camera("observation/exterior_image_1_left", "hwc"),
            "wrist_image_left": Camera("observation/wrist_image_left", "hwc"),
        },
        ("observation/joint_position", "observation/gripper_position"),
        "prompt",
        (7, 1),
    ),
}
NAMES = ("lightwam", "lerobot", *_ROBOTS)


def native(cameras):
    """Returns the table "lightwam" of a policy's cameras."""
    images = {camera: Camera(f"images.{camera}") for camera in cameras}
    return Table("lightwam", images, ("state",), "prompt")


def choose(keys, cameras, state_width, orientation=()):
    """Returns the tables by which a server reads requests, the one to recommend first.

    Args:
      keys: "auto", one of `NAMES`, or a JSON file of a table; see `from_file`. "auto": the only
        table of a robot with these cameras and this width, else "lightwam" alone.
      cameras, state_width, orientation: of the policy.

    Raises:
      ValueError: no such table; or it does not fit; or two fit and none was named.
    """
    ours = native(cameras)
    if keys == "auto":
        fitting = [t for t in _ROBOTS.values() if not _misfit(t, cameras, state_width, orientation)]
        if len(fitting) > 1:
            names = ", ".join(table.name for table in fitting)
            raise ValueError(f"the key tables {names} fit this policy: name one with --keys")
        return (*fitting, ours)
    if keys == "lightwam":
        return (ours,)
    if keys == "lerobot":
        images = {camera: Camera(f"observation.images.{camera}") for camera in cameras}
        table = Table("lerobot", images, ("observation.state",), "task")
    elif keys.endswith(".json"):
        table = from_file(keys, cameras)
    elif keys in _ROBOTS:
        table = _ROBOTS[keys]
    else:
        raise ValueError(
            f"--keys={keys!r} is no key table; expected auto, one of {', '.join(NAMES)}, or a file "
            "of that form, NAME.json"
        )
    misfit = _misfit(table, cameras, state_width, orientation)
    if misfit:
        raise ValueError(f"the key table {table.name} does not fit this policy: {misfit}")
    return table, ours


def from_file(path, cameras):
    """Returns the table of a JSON file; what it does not name is as in "lightwam".

    The file: {"images": {camera: [path, layout, turned]}, "state": [paths], "prompt": path}; a
    camera may also be its path alone.

    Raises:
      ValueError: another form; names the entry.
    """
    with open(path, encoding="utf-8") as file:
        given = json.load(file)
    ours = native(cameras)
    if not isinstance(given, dict) or set(given) - {"images", "state", "prompt"}:
        raise ValueError(f"{path} holds other keys than images, state and prompt")
    images = dict(ours.images)
    for name, entry in given.get("images", {}).items():
        camera = Camera(*([entry] if isinstance(entry, str) else entry))
        if camera.layout not in LAYOUTS or camera.turned not in TURNS:
            raise ValueError(
                f"{path}: images.{name} is {entry}; expected [path, layout, turned] with a layout "
                f"of {', '.join(LAYOUTS)} and turned of {', '.join(map(repr, TURNS))}"
            )
        images[name] = camera
    state = tuple(given.get("state", ours.state))
    if not state or not all(isinstance(part, str) for part in state):
        raise ValueError(f"{path}: state is {list(state)}; expected a list of paths")
    return Table(str(path), images, state, given.get("prompt", ours.prompt))


def describe(table, cameras):
    """Returns {"name", "images", "state", "prompt"} of plain values, for metadata."""
    images = {camera: list(table.images[camera]) for camera in cameras}
    return {
        "name": table.name,
        "images": images,
        "state": list(table.state),
        "prompt": table.prompt,
        "widths": list(table.widths),
    }


def compose(described, images, state, prompt, orientation):
    """Returns the request that a robot of a table sends; its counterpart is `read`.

    Args:
      described: of `describe`. images: {camera: uint8 [h,w,3]}, as the policy's data have them.
      state: [P]. prompt: text. orientation: {camera: of config.data.orientation}.
    """
    from lightwam_jax.data import cameras as cameras_lib  # with Pillow, which robots may lack

    request = {described["prompt"]: prompt}
    for camera, (path, layout, turned) in described["images"].items():
        image = images[camera]
        if turned and turned == orientation.get(camera, ""):
            image = cameras_lib.ORIENTATIONS[turned](image)
        request[path] = image.transpose(2, 0, 1) if layout == "chw" else image
    paths, widths = described["state"], described.get("widths") or [len(state)]
    for path, part in zip(paths, np.split(state, np.cumsum(widths)[:-1])):
        request[path] = part
    return request


def _misfit(table, cameras, state_width, orientation):
    """What of a table does not fit a policy; "" if it does."""
    missing = [camera for camera in cameras if camera not in table.images]
    if missing:
        return f"it has no camera {', '.join(missing)} (it has {', '.join(table.images)})"
    if table.widths and sum(table.widths) != state_width:
        return f"its state has {sum(table.widths)} numbers, the policy's {state_width}"
    for camera, wanted in zip(cameras, orientation or ("",) * len(cameras)):
        turned = table.images[camera].turned
        if turned and wanted and turned != wanted:
            return f"camera {camera} comes {turned}, the policy's data are {wanted}"
    return ""


# ---- a request ---------------------------------------------------------------------------------


def find(request, path):
    """Returns (value, the path as the request has it) of a path; (None, None) if it is absent."""
    return _descend(request, re.split(r"[./]", path), "")


def _descend(tree, parts, before):
    for end in range(len(parts), 0, -1):
        for separator in "/.":
            key = separator.join(parts[:end])
            if key not in tree:
                continue
            here = f"{before}.{key}" if before else key
            if end == len(parts):
                return tree[key], here
            if isinstance(tree[key], dict):
                found = _descend(tree[key], parts[end:], here)
                if found[1] is not None:
                    return found
    return None, None


def leaves(request):
    """Returns the paths of a request's values, nested maps joined with dots."""
    found = []
    for key, value in request.items():
        inner = leaves(value) if isinstance(value, dict) else None
        found += [f"{key}.{name}" for name in inner] if inner else [key]
    return found


def table_of(request, tables, cameras):
    """Returns the table of `tables` that a request follows: the first whose images are all there.

    Where none is, the table of which most is there, for the error; the first if nothing is.
    """

    def present(table):
        return sum(find(request, table.images[camera].path)[1] is not None for camera in cameras)

    return max(tables, key=present)  # of equals the first


def read(request, table, cameras):
    """Returns ({camera: image}, [parts of the state], prompt or None, extra keys) of a request.

    Nothing is checked but that they are there.

    Raises:
      WireError: "bad_key": a camera or a part of the state is missing; names what came instead.
    """
    wanted = {f"camera {camera!r}": table.images[camera].path for camera in cameras}
    wanted |= {f"state[{i}]": path for i, path in enumerate(table.state)}
    found, used = {}, set(OPTIONAL)
    for what, path in wanted.items():
        found[what], place = find(request, path)
        if place is None:
            raise wire.WireError("bad_key", _missing(what, path, request, table))
        used.add(place)
    prompt, place = find(request, table.prompt)
    used.add(place)
    extra = [name for name in leaves(request) if name not in used]
    images = {camera: found[f"camera {camera!r}"] for camera in cameras}
    return images, [found[f"state[{i}]"] for i in range(len(table.state))], prompt, extra


def _missing(what, path, request, table):
    names = leaves(request)
    near = nearest(path, [name for name in names if len(name) <= _COMPARED][:_LOOKED_AT], 1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    got = ", ".join(map(repr, names[:20])) or "nothing"
    return f"no {what}: key {path!r} of the table {table.name}; got {got}{hint}"


# Keys that a typo is looked for in, and letters of one: more would hold up the other clients.
_LOOKED_AT, _COMPARED = 32, 64


def typos(extra, table):
    """Returns {key: known key}: those of `extra` that are one edit away from a known one."""
    known = [camera.path for camera in table.images.values()]
    known += [*table.state, table.prompt, *OPTIONAL]
    close = lambda a, b: abs(len(a) - len(b)) <= 1 and len(a) <= _COMPARED
    pairs = ((a, b) for a in extra[:_LOOKED_AT] for b in known if close(a, b))
    return {name: near for name, near in pairs if edits(name, near) == 1}


def nearest(text, known, most):
    """Returns the `most` texts of `known` that take the fewest edits from `text`."""
    return sorted(known, key=lambda other: edits(text, other))[:most]


def edits(a, b):
    """Returns how many letters to insert, delete or replace between two texts; of the first 200."""
    a, b = a[:200], b[:200]
    row = np.arange(len(b) + 1)
    letters = np.array(list(b))
    for i, letter in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        row = np.concatenate([[i], best])
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])
