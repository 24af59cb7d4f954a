"""What the live page shows, as plain values for JSON: a policy, its latest plan, its counts."""

import base64
import io

import numpy as np
from PIL import Image

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.inference import arrays, attention, safety, wire

_SMALL = 2**15  # pixels of a canvas that is sent without loss
_QUALITY = 85  # of the JPEG of a larger one
_DIGITS = 5


def about(service):
    """Returns what stays the same while a server runs.

    Args:
      service: `Service`, started.
    """
    told, data = service.described, service.policy.config.data
    height, width = data.canvas
    boxes = cameras_lib.regions(data)
    limits, names, kinds = told["limits"], told["action_names"], told["action_kinds"]
    if len(names) != len(kinds):
        names = [f"action {dim}" for dim in range(len(kinds))]
    return {
        "config": told.get("config", ""),
        "step": told.get("step"),
        "embodiment": told["embodiment"],
        "canvas": [height, width],
        "cameras": [
            {"name": camera, "left": box.left / width, "top": box.top / height,
             "width": box.width / width, "height": box.height / height}
            for camera, box in boxes.items()
        ],
        "dims": [
            {"name": name, "kind": kind, "low": low, "high": high}
            for name, kind, low, high in zip(names, kinds, limits["low"], limits["high"])
        ],
        "horizon": told["action_horizon"],
        "trained": told["trained_steps"],
        "replan": told["replan_steps"],
        "fps": told["fps"],
        "batching": told["batching"],
        "taps": service.options.taps,
        "attends": service.policy.config.model.attends,
    }  # fmt: skip


def counts(service):
    """Returns what was counted so far: latency, requests by code, guard by kind and dimension.

    Args:
      service: `Service`.
    """
    metrics, guard = service.metrics, {}
    if service.metadata is not None:
        dims = range(len(service.described["action_kinds"]))
        for kind in safety.KINDS:
            guard[kind] = [int(metrics.value("guard_total", kind=kind, dim=dim)) for dim in dims]
    codes = {
        code: int(metrics.value("requests_total", code=code)) for code in ("ok", *arrays.CODES)
    }
    return {
        "latency": metrics.percentiles(),
        "codes": {code: count for code, count in codes.items() if count},
        "guard": guard,
        "warnings": int(metrics.value("warnings_total")),
        "queue": service.batcher.depth if service.batcher else 0,
    }


def plan(seen, policy):
    """Returns a request's picture, plan and times; takes milliseconds.

    Args:
      seen: `page.Seen`. policy: of the service.
    """
    event, data = seen.event, policy.config.data
    canvas = encoders_base.to_uint8(np.asarray(policy.canvas(event.observation.images)))
    return {
        "number": seen.number,
        "session": event.session,
        "code": event.code,
        "message": event.message,
        "prompt": event.observation.prompt,
        "state": _rounded(event.observation.state),
        "times": {name: round(value, 3) for name, value in event.times.items()},
        "picture": picture(canvas),
        "attention": {
            name: _looks(grid) for name, grid in attention.maps(event.taps, data).items()
        },
        "actions": None if event.actions is None else _rounded(event.actions),
        "before": before(seen),
    }


def before(seen):
    """Returns the plan before, {"actions", "shift"}: steps from its observation to this one's.

    Args:
      seen: `page.Seen`.

    Returns:
      None where there is none, or none of this episode. "shift" is None where the client's requests
      have no `step`.
    """
    if seen.before is None:
        return None
    old, new = (_step(event) for event in (seen.before, seen.event))
    steps = None if old is None or new is None else new - old
    if steps is not None and not 0 <= steps < len(seen.before.actions):
        return None
    return {"actions": _rounded(seen.before.actions), "shift": steps}


def picture(canvas):
    """Returns the data URL of uint8 [H,W,3]: PNG of a small one, else JPEG."""
    kind = "png" if canvas.shape[0] * canvas.shape[1] <= _SMALL else "jpeg"
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, kind, quality=_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _looks(grid):
    """A map [h,w] as shares of the average cell, row by row: 1 is indifference."""
    return {"size": list(grid.shape), "cells": np.round(grid.size * grid, 2).ravel().tolist()}


def _step(event):
    """The `step` of a request, which its reply echoes."""
    if event.code != "ok":
        return None
    step = wire.decode(event.reply).get("step")
    return int(step) if step is not None and step == int(step) else None


def _rounded(values):
    return np.round(np.asarray(values, np.float64), _DIGITS).tolist()
