"""What meta/ of a LeRobot dataset says, compared with what its other files hold."""

import math

import numpy as np

from lightwam_jax.data.episodes import Problem, many
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats import lerobot_listed

_MOST_LOST = 10_000  # unlisted episodes that are named one by one


def faults(data, entry, file, rows):
    """Yields a `Problem` for everything that is wrong with the rows of an episode."""
    length = len(rows.action)
    if length not in (0, entry.length):
        message = f"{many(length, 'row')}, meta/ says {entry.length}"
        yield Problem.error("wrong length", entry.id, file, message)
    if (np.diff(rows.frame_index) != 1).any():
        message = "frame_index does not count up by one"
        yield Problem.error("rows out of order", entry.id, entry.data, message)
    used = set(rows.task_index.tolist())
    if unknown := sorted(used - set(data.tasks)):
        name = "tasks.parquet" if data.packed else "tasks.jsonl"
        message = f"task_index {unknown} of {len(data.tasks)} tasks in meta/{name}"
        message += "".join(f"; {fault}" for fault in data.task_faults[:1])
        yield Problem.error("unknown task", entry.id, file, message)
    else:
        yield from _task_faults(entry, file, [data.tasks[index] for index in sorted(used)])
    if not np.isfinite(rows.timestamp).all():
        at = int(np.argmin(np.isfinite(rows.timestamp)))
        message = f"timestamp is {rows.timestamp[at]}; expected seconds from the episode's start"
        yield Problem.error("wrong timestamp", entry.id, file, message, at)
        return
    shown = [key for key in data.needed if key in entry.videos] if length else []
    if shown:
        yield from _offset(data, entry, file, rows)
    for key in shown:
        yield from video_faults(data, entry, key, length)


def _task_faults(entry, file, used):
    """Yields a warning where the list of episodes gives other instructions than the rows."""
    if entry.tasks and used and set(entry.tasks) != set(used):
        say = lambda tasks: " and ".join(map(repr, sorted(tasks)[:3]))
        message = (
            f"the rows say {say(used)}, {entry.place} says {say(set(entry.tasks))}; the rows are "
            "believed"
        )
        yield Problem.warning("tasks disagree", entry.id, file, message)


def _offset(data, entry, file, rows):
    """Yields an error where the first row is of another time than its frame: all are shifted."""
    fps, first = data.info["fps"], int(rows.frame_index[0])
    frames = (rows.timestamp[0] - first / fps) * fps
    if abs(frames) > 0.5:
        message = (
            f"timestamp begins at {rows.timestamp[0]:.6g} s, where frame_index {first} is due at "
            f"{first / fps:.6g} s: every image would be {frames:+.6g} frames off. Subtract the "
            "difference from the column timestamp, or exclude the episode"
        )
        yield Problem.error("timestamp offset", entry.id, file, message, 0)


def video_faults(data, entry, key, length):
    """Yields a `Problem` for what is wrong with a video; it is not opened."""
    file, frame = entry.videos[key].file, 1 / data.info["fps"]
    if not file.is_file():
        message = f"no such file ({key}); copy it again"
        yield Problem.error("missing video", entry.id, file, message)
    missing = length * frame - entry.seconds.get(key, np.inf)
    if missing > frame / 2:  # the next episode in the file would be read as the end of this one
        message = (
            f"meta/ gives {key} {entry.seconds[key]:.3f} s, {missing:.3f} s less than its "
            f"{length} rows last"
        )
        yield Problem.error("wrong length", entry.id, file, message)


def unlisted(data, listed, broken, spans):
    """Returns a `Problem` for every episode, or data file, that meta/ does not list."""
    known, files = {entry.index for entry in listed}, {entry.data for entry in listed}
    total, name = _count(data, "total_episodes") or 0, lerobot_listed.episode_id
    lost = range(total) if len(known) < total <= len(known) + _MOST_LOST else ()
    extra, absent = sorted(spans.keys() - known), sorted(set(lost) - known - spans.keys())
    forgotten = "it has rows, but meta/ does not list it"
    counted = f"info.json counts {total} episodes, {len(known)} are listed and not this one"
    # In a set of a file per episode, a file may hold what another one is listed for.
    copies = {runs[0] for index in known & spans.keys() for runs in spans[index]} - files
    return [
        *(Problem.error("unlisted episode", name(i), spans[i][0][0], forgotten) for i in extra),
        *(Problem.error("unlisted episode", name(i), data.root / "meta", counted) for i in absent),
        *(
            Problem.error("unlisted episode", file.stem, file, forgotten)
            for file in sorted(copies if not data.packed else ())
        ),
        *(
            Problem.error("unreadable data file", file.stem, file, reason)
            for file, reason in broken.items()
            if file not in files
        ),
    ]


def _count(data, key):
    """A count in info.json; None where there is none that can be used."""
    value = data.info.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def of_the_set(data, listed, tables, unreadable):
    """Returns a warning for everything in meta/ that the rest contradicts or that is no use.

    Args:
      data: `lerobot_meta.LeRobotInfo`.
      listed: of `lerobot_listed.listed`.
      tables: {data file: its `Rows`}.
      unreadable: messages about parts of meta/ that cannot be read.
    """
    said = [("broken metadata", message) for message in (*unreadable, *data.task_faults)]
    said += [("wrong count", message) for message in _counts(data, listed)]
    for name, keys in (("state", data.state), ("action", data.action)):
        width = next((getattr(rows, name).shape[1] for rows in tables.values() if len(rows[0])), 0)
        said += [("wrong shape", message) for message in _shapes(data, keys, width)]
    problems = [Problem.warning(kind, "", data.root / "meta", message) for kind, message in said]
    for file, rows in tables.items():
        if lost := int((rows.episode_index < 0).sum()):
            message = f"{many(lost, 'row')} without a whole number as episode_index: not read"
            problems.append(Problem.warning("broken rows", "", file, message))
    return problems


def _counts(data, listed):
    """Yields sentences about counts in info.json that are not those of the lists."""
    total = _count(data, "total_episodes")
    found = {} if data.task_faults else {"total_tasks": len(data.tasks)}
    if total is not None and total < len(listed):  # `unlisted` names those that are missing
        found["total_episodes"] = len(listed)
    elif total in (None, len(listed)) and not any(entry.faults for entry in listed):
        found["total_frames"] = sum(entry.length for entry in listed)
    for key, number in found.items():
        if _count(data, key) not in (None, number):
            yield f"info.json: {key} is {data.info[key]}, meta/ lists {number}"


def _shapes(data, keys, width):
    """Yields sentences about features whose shape or names in info.json are not the rows'."""
    expected, features = 0, data.info["features"]
    for text in keys:
        key = keys_lib.parse(text)
        shape, names = (features[key.path].get(what) for what in ("shape", "names"))
        if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
            return
        size, named = math.prod(shape), len(list(_leaves(names)))
        expected += len(range(size)[key.dims])
        if named not in (0, 1, size):  # 1: the name of the whole, as converters write it
            yield f"info.json: features.{key.path} has {named} names and shape {shape}"
    if width and expected != width:
        yield (
            f"info.json: {', '.join(keys)} has {expected} numbers by its shape, the rows have "
            f"{width}; the rows are believed"
        )


def _is_size(number):
    return isinstance(number, int) and 0 <= number < 2**31


def _leaves(names):
    """Yields the texts of nested lists and dicts."""
    if isinstance(names, str):
        yield names
    elif isinstance(names, (list, dict)):
        for name in names.values() if isinstance(names, dict) else names:
            yield from _leaves(name)
