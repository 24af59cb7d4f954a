"""The skew check's comparison: what a server made of a moment beside what training made of it."""

import typing

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import actions as actions_lib

PASS, REPORT, FAIL = "pass", "report", "fail"
_WORST = (PASS, REPORT, FAIL)
ACTIONS = {"float32": (1e-3, 1e-2), "bfloat16": (1e-2, 1e-2)}  # passes up to, fails above; x range
_CANVAS = 1e-5, 4 / 255  # of 0..1: float rounding; four steps of a byte
_PROPRIO = 1e-5, 1e-3  # normalised
_STEPS_SHARE = 0.05  # of the latents, which may differ by one step of bfloat16
_LATENTS = 1e-2  # root mean square, relative: above, no rounding explains it
_BF16 = 2.0**-7  # a step of bfloat16, relative, at most
_NEAR_MIDDLE = 1e-2  # of a snapped gripper: rounding decides its side


class Served(typing.NamedTuple):
    """What a server answered to a moment.

    Attributes:
      actions: f32 [T,A], physical units, as sent. guard: values that the guard changed.
      stages: of the reply, see `Service`: images, state, prompt as they came; canvas, latents,
        context, mask, proprio; planned, the actions before the guard. {}: the server gave none.
    """

    actions: np.ndarray
    guard: int
    stages: dict


class Stage(typing.NamedTuple):
    """How far a stage deviates.

    Attributes:
      name: of the stage. largest: deviation. share: of the values that differ beyond rounding.
      limit: what still passes, in words, with the unit. verdict: "pass", "report" or "fail".
      rows: [N], the largest deviation of each window.
    """

    name: str
    largest: float
    share: float
    limit: str
    verdict: str
    rows: np.ndarray


def worst(verdicts):
    """Returns the worst of verdicts."""
    return max(verdicts, key=_WORST.index, default=PASS)


def inputs(moments, trained, stages):
    """Returns the `Stage`s from raw frame to proprio.

    Args:
      moments: `Moment`s that were sent. trained: `Trained`. stages: a dict of `Served` for each.
    """
    stack = lambda name: np.stack([each[name] for each in stages])
    return [
        _raw(moments, stages),
        _bounded("canvas", stack("canvas"), trained.canvas, _CANVAS, "1e-5 of 0..1"),
        _latents(stack("latents"), trained.latents),
        _context(stack("context"), stack("mask"), trained),
        _bounded("proprio", stack("proprio"), trained.proprio, _PROPRIO, "1e-5, normalised"),
    ]


def _raw(moments, stages):
    rows, differ, total = [], 0, 0
    for moment, came in zip(moments, stages):
        furthest = 0.0
        for camera, image in moment.images.items():
            other, total = came["images"][camera], total + image.size
            if other.shape != image.shape:
                furthest, differ = 255.0, differ + image.size
                continue
            apart = np.abs(other.astype(np.int16) - image)
            furthest, differ = max(furthest, float(apart.max())), differ + int((apart > 0).sum())
        rows.append(furthest)
    verdict = FAIL if max(rows) else PASS
    return Stage("raw frame", max(rows), differ / total, "the same bytes", verdict, np.array(rows))


def _bounded(name, got, wanted, bounds, limit):
    apart = np.abs(got - wanted)
    rows = apart.reshape(len(apart), -1).max(axis=1)
    return Stage(
        name, float(rows.max()), float((apart > bounds[0]).mean()), limit,
        _verdict(rows.max(), bounds), rows,
    )  # fmt: skip


def _verdict(value, bounds):
    if not value <= bounds[0]:  # NaN passes nothing
        return REPORT if value <= bounds[1] else FAIL
    return PASS


def _latents(got, wanted):
    apart, size = np.abs(got - wanted), np.maximum(np.abs(got), np.abs(wanted))
    # Near zero a step is tiny: there, 1e-5 of the largest value is rounding too.
    more = apart > _BF16 * size + 1e-5 * np.abs(wanted).max()
    share = float((apart > 0).mean())
    relative = np.sqrt(np.square(apart).mean() / max(np.square(wanted).mean(), 1e-12))
    verdict = PASS if not more.any() and share <= _STEPS_SHARE else REPORT
    verdict = verdict if relative <= _LATENTS else FAIL
    rows = apart.reshape(len(apart), -1).max(axis=1)
    limit = f"one step of bfloat16 in {100 * _STEPS_SHARE:.0f} %"
    return Stage("latents", float(rows.max()), share, limit, verdict, rows)


def _context(got, mask, trained):
    apart = np.abs(got - trained.context)
    rows = apart.reshape(len(apart), -1).max(axis=1)
    verdict = _verdict(rows.max(), (0.0, _BF16 * np.abs(trained.context).max()))
    if (mask != trained.mask).any():
        verdict = FAIL
    share = float((apart > 0).mean())
    return Stage("context + mask", float(rows.max()), share, "the same bits", verdict, rows)


def actions(policy, served, trained, dtype):
    """Returns the `Stage`s "actions normalised" and "actions physical"; both as shares of a range.

    The range of the normalised ones is that of all that training's form plans for these windows;
    of the physical ones, dimension by dimension, what normalisation makes 2.

    Args:
      policy: `Policy`. served: f32 [N,T,A], physical units. trained: `Trained`.
      dtype: in which the server computes.
    """
    normalizer, data = policy.assets.action, policy.config.data
    bounds = ACTIONS[dtype]
    counted = np.ones(trained.normalised.shape, bool)
    if data.gripper_snap:
        grippers = list(data.gripper_dims)
        middle = np.float32(0.5)
        logical = normalizer.inverse(trained.normalised)[..., grippers]
        counted[..., grippers] = np.abs(logical - middle) > _NEAR_MIDDLE
    apart = np.where(counted, np.abs(served - trained.physical), 0)
    physical = apart * np.abs(normalizer.scale) / 2
    # Physical and back: the states cancel, and a snapped gripper cannot be undone.
    same = np.abs(_unsnapped(policy, served) - _unsnapped(policy, trained.physical))
    spread = max(float(np.ptp(trained.normalised)), 1e-6)
    normalised = np.where(counted, same * np.abs(normalizer.scale), 0) / spread
    limit = f"{bounds[0]:g} of the range ({dtype}); fails above {bounds[1]:g}"
    return [
        _actions("actions normalised", normalised, bounds, limit),
        _actions("actions physical", physical, bounds, limit),
    ]


def _unsnapped(policy, physical):
    """Physical actions as the model's before normalisation, but for differences to the state."""
    transform = actions_lib.from_config(policy.config)
    width = config_lib.state_width(policy.config)
    zeros = np.zeros((*physical.shape[:-2], width), np.float32)  # any state, the same for both
    padded = np.zeros(physical.shape[:-1], bool)
    return transform.forward(np.asarray(physical, np.float32), zeros, padded)


def _actions(name, apart, bounds, limit):
    rows = apart.reshape(len(apart), -1).max(axis=1)
    verdict = _verdict(rows.max(), bounds)
    return Stage(name, float(rows.max()), float((apart > bounds[0]).mean()), limit, verdict, rows)
