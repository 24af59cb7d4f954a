"""Faults that every episode of a set has: one fault of the set, not one of each episode."""

import os
import re

from lightwam_jax.data.episodes import many

# Kinds with one cause for all: the metadata or the config. Damaged files are each to be replaced.
_KINDS = ("wrong fps", "wrong width")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


def grouped(problems, ids, data):
    """Returns the `Problem`s with those of `_KINDS` that all episodes share as one, of the dataset.

    Shared are problems of one kind whose messages differ in numbers only. Such a set is repaired in
    one place; to exclude its episodes would leave none.

    Args:
      problems: `Problem`s of the episodes and of the set.
      ids: of all episodes.
      data: `DataConfig`.
    """
    episodes = {}  # {what they share: {id: its first problem}}
    for problem in problems:
        if problem.episode and problem.kind in _KINDS:
            episodes.setdefault(_shared(problem), {}).setdefault(problem.episode, problem)
    of_set = {key for key, found in episodes.items() if len(found) == len(ids) > 1}
    kept = [p for p in problems if not p.episode or _shared(p) not in of_set]
    first = {}  # {(severity, kind): problem}: a rate that differs from both times and video is one
    for key in episodes:
        if key in of_set:
            first.setdefault(key[:2], next(iter(episodes[key].values())))
    return kept + [_of_set(problem, len(ids), data) for problem in first.values()]


def _shared(problem):
    return problem.severity, problem.kind, _NUMBER.sub("#", problem.message)


def _of_set(first, count, data):
    """The first of the problems as one of the dataset; a rate names the file that has it."""
    message = f"in all {many(count, 'episode')}; {first.episode}: {first.message}"
    file = first.file
    info = os.path.join(data.path, "meta", "info.json")
    if first.kind == "wrong fps" and os.path.exists(info):
        file = info
    return first._replace(episode="", file=file, frame=None, message=message)
