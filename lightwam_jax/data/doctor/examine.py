"""The dataset doctor: is a dataset sane? Facts, and problems named by episode, file and frame.

Columns are checked in full, in seconds; images as far as config.data.check_frames says. Broken
episodes do not stop it. `report.py` shows what it finds.
"""

import collections
import dataclasses
import hashlib
import time

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.doctor import clock, gripper_range, whole_set
from lightwam_jax.data.doctor import columns as columns_lib
from lightwam_jax.data.doctor import images as doctor_images
from lightwam_jax.data.episodes import Problem, many

_ON_PURPOSE = 10  # episodes of the same length, shorter than a window
ADVICE = {
    "missing video": "Copy the file again, or exclude the episode.",
    "undecodable image": "The file is cut short, damaged, or of other times than the rows: copy "
    "it again, or exclude the episode. Where images are only late, see config.data.tolerance_s.",
    "timestamp offset": "Subtract the offset from the column timestamp, so that every episode "
    "begins at 0.",
    "wrong timestamp": "Repair the column timestamp, or exclude the episode.",
    "wrong episode": "Correct the column episode_index, or exclude the episode.",
    "broken metadata": "Correct the file in meta/, or exclude the episode.",
    "tasks disagree": "Correct the list of episodes, or the column task_index.",
    "wrong count": "Was an episode deleted, or added, by hand? Correct meta/info.json.",
    "wrong shape": "Correct meta/info.json.",
    "broken rows": "Repair the column episode_index.",
    "unknown task": "Correct the list of tasks, or the column task_index.",
    "unlisted episode": "Was an episode deleted by hand? Delete its files, list it in meta/, or "
    "exclude it.",
    "missing filter": "Install it: pip install hdf5plugin has nearly all.",
    "broken link": "Is a disk not mounted? Correct the link, or delete it.",
    "unreadable folder": "Give yourself the right to read it.",
    "wrong number of frames": "Record or convert the episode again: images and actions may be "
    "out of step.",
    "wrong fps": "Correct fps where it is given (LeRobot: meta/info.json, else "
    "config.data.fields.fps), or resample the episode: its windows would span another time than "
    "the model expects.",
    "shuffled timestamps": "Sort the rows of the episode by time, or exclude it.",
    "timestamp drift": "Steps were lost or recorded late: resample the episode at an even rate.",
    "not finite": "Repair the numbers at their source, or exclude the episode.",
    "empty episode": "Delete it, or exclude it.",
    "short episode": "It is used, with its last step repeated; exclude it if it was broken off.",
    "no long episode": "Lower config.data.num_frames and config.data.action_horizon, or record "
    "longer episodes.",
    "wrong width": "Make config.model and config.data.fields fit the data.",
    "wrong length": "Convert the episode again: its columns do not belong together.",
    "duplicate id": "Rename one of the episodes.",
    "duplicate episode": "Keep one of them: it weighs double, and may be in training and "
    "validation at once.",
    "constant dimension": "Leave it out of config.data.fields if it means nothing; a sensor may be "
    "dead.",
    "stuck dimension": "Look at the episode: a sensor or a gripper may have failed.",
    "near-constant dimension": "Look at its rare values: glitches are to be repaired; what means "
    'something (a gripper that closes once) is kept by config.data.normalization="min_max". Or '
    "leave the dimension out of config.data.fields.",
    "clipped values": "Repair the values if they are glitches; if they mean something, "
    'config.data.normalization="min_max" (or a wider normalization_range) keeps them.',
    gripper_range.KIND: gripper_range.ADVICE,
    "far from the mean": "Look at the named step: glitches widen min_max for all other steps; "
    '"quantile" does not see them.',
    "empty task": "Write down what the robot does: it is what the policy is asked for.",
    "tasks alike": "Spell it in one way, or the same task becomes several prompts.",
    "several fps": "Resample to one rate: a window of the same length spans another time.",
    "no such camera": "Correct config.data.cameras.",
    "does not fit the canvas": "Change config.data.canvas, camera_size or layout.",
    doctor_images.STRETCHED: "The model sees it stretched, in training and when it acts. Give "
    "config.data.canvas or camera_size the aspect of the images, or crop them, if shapes matter.",
    "other image size": "It is resized like the others; check that it shows the same view.",
    "empty image": "Look at the episode: the camera may have been off or covered.",
    "frozen camera": "Look at the episode: the camera may have stopped.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What `examine` found.

    Attributes:
      data: `DataConfig` that was examined.
      problems: `Problem`s, errors first, sorted by kind; an empty episode means the dataset.
      ids: of all episodes, also those that could not be read at all.
      lengths: int [E], steps of those that could be read.
      begun: {steps: episodes} of those that are short on purpose; see `_lengths`.
      hours: of recorded time. fps: {fps: episodes}. tasks: {instruction: episodes}.
      columns: `columns.Column`s of state, then action.
      grippers: `columns.Histogram`s of the gripper dimensions.
      normalized: `Histogram` of all normalised action values, or None.
      drift: `clock.Drift`; None where the data have no timestamps.
      images: `doctor_images.Images`.
      seconds: it took.
    """

    data: config_lib.DataConfig
    problems: tuple
    ids: tuple
    lengths: np.ndarray
    begun: dict
    hours: float
    fps: dict
    tasks: dict
    columns: tuple
    grippers: tuple
    normalized: columns_lib.Histogram | None
    drift: clock.Drift | None
    images: doctor_images.Images
    seconds: float

    @property
    def errors(self):
        """The `Problem`s that stop everything else."""
        return [p for p in self.problems if p.severity == "error"]

    @property
    def warnings(self):
        """The other ones."""
        return [p for p in self.problems if p.severity != "error"]


def examine(config, read=None):
    """Examines the dataset of a `Config` (of a mixture: of one dataset) and returns its `Report`.

    Args:
      config: `Config`.
      read: what `episodes.read(config)` returned, where it was called before.

    Raises:
      ValueError, FileNotFoundError: of `episodes.read`.
    """
    began, path = time.monotonic(), config.data.path
    found, problems = episodes_lib.read(config) if read is None else read
    ids = tuple(dict.fromkeys([e.id for e in found] + [p.episode for p in problems if p.episode]))
    filled = [e for e in found if e.length]
    drift, times = clock.examine(filled)
    tasks, texts = _tasks(filled, path)
    begun, short = _lengths(filled, config.data)
    problems = [*problems, *times, *texts, *short]
    broken = {p.episode for p in problems if p.severity == "error"}
    sound = [e for e in filled if e.id not in broken]
    state, state_problems = columns_lib.examine(sound, "state", path)
    action, action_problems = columns_lib.examine(sound, "action", path)
    fps = collections.Counter(e.fps for e in found)
    problems += [*state_problems, *action_problems, *_duplicates(sound), *_rates(fps, path)]
    numbers, normalized = columns_lib.normalized(sound, state + action, config)
    problems += columns_lib.clipped(numbers, config.data)
    problems += gripper_range.examine(sound, config.data, path)
    images, image_problems = doctor_images.examine(filled, broken, config)
    problems = whole_set.grouped(problems + image_problems, ids, config.data)
    problems = sorted(problems, key=lambda p: (p.severity != "error", p.kind))
    return Report(
        data=config.data,
        problems=tuple(problems),
        ids=ids,
        lengths=np.array([e.length for e in found], int),
        begun=begun,
        hours=sum(e.length / e.fps for e in found) / 3600,
        fps=dict(fps),
        tasks=tasks,
        columns=tuple(numbers),
        grippers=columns_lib.grippers(sound, numbers, config.data.gripper_dims),
        normalized=normalized,
        drift=drift,
        images=images,
        seconds=time.monotonic() - began,
    )


def _rates(fps, path):
    """A warning where episodes were recorded at several rates; `fps` is {rate: episodes}."""
    if len(fps) < 2:
        return []
    message = "; ".join(f"{many(n, 'episode')} at {value:g}" for value, n in fps.items())
    return [Problem.warning("several fps", "", path, message)]


def _lengths(episodes, data):
    """Returns ({steps: episodes} that are short on purpose, [`Problem`]).

    An error where no episode is as long as a window, else a warning for each that is not. A
    recording that broke off is one of its length; where many end at the same step, they were meant
    to (as those of `envs.record --starts`).
    """
    need = max(data.num_frames, data.action_horizon)
    short = [e for e in episodes if e.length < need]
    if episodes and len(short) == len(episodes):
        message = (
            f"a window is {need} steps long (the larger of config.data.num_frames and "
            f"action_horizon), the longest episode {max(e.length for e in episodes)}"
        )
        return {}, [Problem.error("no long episode", "", data.path, message)]
    counts = collections.Counter(e.length for e in short)
    begun = {length: n for length, n in sorted(counts.items()) if n >= _ON_PURPOSE}
    fewer = f"fewer than the {need} of a window"
    return begun, [
        Problem.warning("short episode", e.id, e.file, f"{many(e.length, 'step')}, {fewer}")
        for e in short
        if e.length not in begun
    ]


def _duplicates(episodes):
    """Warnings about episodes with the actions of another."""
    first, problems = {}, []
    for e in episodes:
        key = hashlib.sha256(np.ascontiguousarray(e.action)).digest()
        same = first.setdefault(key, e)
        if same is not e:
            message = f"its actions are those of {same.id} ({same.file})"
            problems.append(Problem.warning("duplicate episode", e.id, e.file, message))
    return problems


def _tasks(episodes, path):
    """Returns ({task: episodes}, problems)."""
    count, problems = collections.Counter(), []
    for e in episodes:
        own = {}  # {task: first step of it}
        for step in range(e.length):
            own.setdefault(e.task_at(step), step)
        count.update(own.keys())
        problems += [
            Problem.error("empty task", e.id, e.file, f"the instruction is {task!r}", step)
            for task, step in own.items()
            if not task.strip()
        ]
    alike = collections.defaultdict(list)
    for task in count:
        alike[" ".join(task.lower().split())].append(task)
    for same in alike.values():
        if len(same) > 1:
            message = " and ".join(map(repr, same)) + " differ only in case or spaces"
            problems.append(Problem.warning("tasks alike", "", path, message))
    return dict(count), problems
