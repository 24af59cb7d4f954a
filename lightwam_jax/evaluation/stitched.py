"""Whole held-out episodes: plans as a robot would execute them, beside what was recorded.

At every `replan_steps`-th recorded step the policy sees the recorded observation and plans. The
first `replan_steps` actions of each plan are put one after the other. The robot is where the
recording says whatever the policy does: an error here is none that grows.

Three ways to act without looking give the errors a scale. They too act anew at each plan:

  hold         the last recorded action, again and again
  mean         the mean action of the training episodes
  repeat last  the last action of the plan before, again and again

Before the first action there is nothing to repeat: it is the mean.
"""

import typing

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.formats import lerobot_names
from lightwam_jax.evaluation import rollout
from lightwam_jax.inference import rows as rows_lib
from lightwam_jax.training import gripper_timing

EPISODES = 12  # where no other number is asked for
POLICY, BASELINES = "policy", ("hold", "mean", "repeat last")


class Stitched(typing.NamedTuple):
    """One episode.

    Attributes:
      episode: `Episode`. starts: steps [k] at which the policy planned.
      actions: {"policy", "hold", "mean", "repeat last": f32 [n,A]}, physical units.
    """

    episode: episodes_lib.Episode
    starts: list
    actions: dict


class Range(typing.NamedTuple):
    """Actions of the training episodes, physical units, each step counting the same; each [A]."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


def evaluate(policy, train, held_out, most=EPISODES):
    """Returns ([`Stitched`], `Range`).

    Args:
      policy: `Policy`. train, held_out: episodes of `episodes.split`.
      most: episodes that are evaluated, at most; see `choose`.
    """
    config, span = policy.config, training_range(train)
    chosen = choose(held_out, config.data.action_horizon, most)
    replan = min(config.evaluation.replan_steps, config.data.action_horizon)
    plans = max((-(-episode.length // replan) for episode in chosen), default=1)
    rows = min(config.evaluation.batch, rows_lib.PADDED_SIZES[-1], plans)
    return [_stitch(policy, each, replan, rows, span.mean) for each in chosen], span


def training_range(episodes):
    """Returns the `Range` of episodes."""
    actions = [episode.action for episode in episodes]
    low, high = (np.min([a.min(0) for a in actions], 0), np.max([a.max(0) for a in actions], 0))
    total = np.sum([a.sum(0, dtype=np.float64) for a in actions], 0)
    return Range(low, high, (total / sum(map(len, actions))).astype(np.float32))


def choose(episodes, horizon, most):
    """Returns at most `most` episodes, the instructions in turn.

    Recordings that are shorter than a chunk come last: they are starts, not whole episodes.
    """
    by_task = {}
    for episode in episodes:
        by_task.setdefault((episode.length < horizon, episode.task), []).append(episode)
    ranked = [
        (short, place, episode)
        for (short, _), several in by_task.items()
        for place, episode in enumerate(several)
    ]
    return [episode for *_, episode in sorted(ranked, key=lambda each: each[:2])][:most]


def _stitch(policy, episode, replan, rows, mean):
    starts = list(range(0, episode.length, replan))
    chunks = []
    for first in range(0, len(starts), rows):
        chunks.append(_plan(policy, episode, starts[first : first + rows], rows)[:, :replan])
    planned = np.concatenate(np.concatenate(chunks))[: episode.length]
    return Stitched(
        episode,
        starts,
        {
            POLICY: planned,
            "hold": _repeated(episode.action, starts, mean),
            "mean": np.broadcast_to(mean, planned.shape),
            "repeat last": _repeated(planned, starts, mean),
        },
    )


def _plan(policy, episode, starts, rows):
    """The plans [k,T,A] of some recorded steps, `rows` of them at most."""
    cameras = policy.config.data.cameras
    images = {camera: episode.frames(camera, starts) for camera in cameras}
    seen = [
        {
            "images": {camera: images[camera][k] for camera in cameras},
            "state": episode.state[start],
            "prompt": episode.task_at(start),
        }
        for k, start in enumerate(starts)
    ]
    batch = rollout.stack(seen, len(seen))
    return policy.act(*batch, rows=rows_lib.padded_size(rows))


def _repeated(actions, starts, mean):
    """[n,A]: from each start on, the action before it."""
    before = [actions[start - 1] if start else mean for start in starts]
    lengths = np.diff([*starts, len(actions)])
    return np.repeat(np.stack(before), lengths, axis=0)


def errors(stitched):
    """Returns {"policy" and the baselines: L1 f64 [A]} over all steps, physical units."""
    return {
        name: np.concatenate(
            [np.abs(each.actions[name] - each.episode.action) for each in stitched]
        ).mean(0, dtype=np.float64)
        for name in (POLICY, *BASELINES)
    }


def shares(l1, span):
    """Returns ({name: mean L1 as a share of the training range}, the dimensions that count).

    A dimension that never moves in the training data has no range and does not count.

    Args: l1: of `errors`. span: `Range`.
    """
    extent = (span.high - span.low).astype(np.float64)
    moving = np.flatnonzero(extent > 0)
    return {
        name: float((each[moving] / extent[moving]).mean()) if len(moving) else 0.0
        for name, each in l1.items()
    }, moving


def names(config):
    """Returns what the dimensions of the action are called; their numbers where nothing says it."""
    width = config_lib.action_width(config)
    known = lerobot_names.of_actions(config) if config.data.source == "lerobot" else ()
    if len(known) == width:
        return tuple(f"{name} [{dim}]" for dim, name in enumerate(known))
    grippers = gripper_timing.dims(config)
    return tuple(f"action[{d}]{', gripper' if d in grippers else ''}" for d in range(width))


def numbers(stitched, span, config):
    """Returns what open_loop.json says about whole episodes, JSON-able."""
    l1 = errors(stitched)
    mean, _ = shares(l1, span)
    return {
        "ids": [each.episode.id for each in stitched],
        "steps": sum(each.episode.length for each in stitched),
        "plans": sum(len(each.starts) for each in stitched),
        "replan_steps": config.evaluation.replan_steps,
        "dimensions": list(names(config)),
        "low": span.low.tolist(),
        "high": span.high.tolist(),
        "l1": {name: each.tolist() for name, each in l1.items()},
        "l1_share_of_range": mean,
    }
