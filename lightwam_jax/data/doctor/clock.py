"""The doctor's look at the recorded times."""

import dataclasses

import numpy as np

from lightwam_jax.data.doctor import columns
from lightwam_jax.data.episodes import Problem

_DRIFT = 0.5  # steps; beyond it the next image would be nearer


@dataclasses.dataclass(frozen=True)
class Drift:
    """The largest |t_i - i / fps|, in seconds, and where."""

    seconds: float
    episode: str
    frame: int


def examine(episodes):
    """Returns (largest `Drift` or None, [`Problem`]) of the recorded times."""
    recorded = [e for e in episodes if e.timestamps is not None]
    timed = [e for e in recorded if np.shape(e.timestamps) == (e.length,)]
    problems = []
    for e in recorded:
        if np.shape(e.timestamps) != (e.length,):
            message = f"timestamps have shape {list(np.shape(e.timestamps))}; expected [{e.length}]"
            problems.append(Problem.error("wrong length", e.id, e.file, message))
    if not timed:
        return None, problems
    starts, lengths = columns.starts(timed), [e.length for e in timed]
    t = np.concatenate([e.timestamps for e in timed]).astype(np.float64)
    index = np.arange(len(t)) - np.repeat(starts, lengths)
    drift = np.abs(t - index / np.repeat([e.fps for e in timed], lengths))
    back = ~(np.diff(t, prepend=-np.inf) > 0)  # also where a time is not a number
    back[starts] = ~np.isfinite(t[starts])
    suspects = np.flatnonzero(np.maximum.reduceat(drift, starts) * [e.fps for e in timed] > _DRIFT)
    shuffled = np.flatnonzero(np.logical_or.reduceat(back, starts))
    for number in np.union1d(suspects, shuffled).astype(int):
        problems.append(_problem(timed[number]))
    if not np.isfinite(drift).any():
        return None, problems
    worst = int(np.nanargmax(np.where(np.isfinite(drift), drift, np.nan)))
    episode, frame = columns.place(timed, starts, worst)
    return Drift(float(drift[worst]), episode.id, frame), problems


def _problem(e):
    """What is wrong with the times of an episode: their order, their rate, or some of them."""
    t, fps = np.asarray(e.timestamps, np.float64), e.fps
    intervals = np.diff(t)
    back = np.flatnonzero(~(intervals > 0))
    if len(back) or not np.isfinite(t[0]):
        at = int(back[0]) + 1 if len(back) else 0
        message = (
            f"{t[at]:.6g} s comes after {t[max(0, at - 1)]:.6g} s; expected about {at / fps:.6g} s "
            f"({len(back)} such in all)"
        )
        return Problem.error("shuffled timestamps", e.id, e.file, message, at)
    rate = 1 / np.median(intervals) if len(intervals) else fps
    if abs(rate / fps - 1) > 0.05:
        message = f"its timestamps are those of {rate:.6g} fps, the metadata says {fps:.6g}"
        return Problem.error("wrong fps", e.id, e.file, message)
    drift = np.abs(t - np.arange(len(t)) / fps)
    at = int((drift * fps > _DRIFT).argmax())
    message = (
        f"recorded at {t[at]:.6g} s, due at {at / fps:.6g} s; at most {drift.max() * fps:.1f} "
        "steps apart"
    )
    return Problem.warning("timestamp drift", e.id, e.file, message, at)
