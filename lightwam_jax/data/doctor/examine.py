"""The dataset doctor: is a data set sane? Facts, and problems named by episode, file and frame.

Columns are checked in full, in seconds; images as far as config.data.check_frames says. Broken
episodes do not stop it. `doctor_report` shows what it finds.
"""

import collections
import dataclasses
import hashlib
import time

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import actions, normalize
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.doctor import images as doctor_images
from lightwam_jax.data.episodes import Problem

_STILL = 1e-4  # a smaller range is constant to normalize.py: it is shifted, not scaled
_RARE = 1e-3  # a gripper that closes once in an episode moves in about 1 of 100 steps
_NARROW = 1e-2  # min_max makes one number of 98 % of the values that fill less of the range
_SIGMA = 5.0  # the normalised values are clipped there
_MANY = 1e-3  # share of steps beyond it; of a Gaussian's, 6e-7 are
_FAR = 20.0  # sigma: one such value is a glitch, or a switch that is hardly ever thrown
_DRIFT = 0.5  # steps; beyond it the next image would be nearer
_STUCK_STEPS, _STUCK_OTHERS, _STUCK_SHARE = 10, 8, 0.95

ADVICE = {
    "missing video": "Copy the file again, or exclude the episode.",
    "undecodable image": "The file is cut short, damaged, or of other times than the rows: copy "
    "it again, or exclude the episode.",
    "wrong number of frames": "Record or convert the episode again: images and actions may be "
    "out of step.",
    "wrong fps": "Correct the metadata or resample the episode: its windows would span another "
    "time than the model expects.",
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
    "near-constant dimension": 'Normalise by "quantile", repair the few extreme values, or leave '
    "the dimension out of config.data.fields.",
    "far from the mean": "Look at the named step: glitches widen min_max for all other steps; "
    '"quantile" does not see them.',
    "empty task": "Write down what the robot does: it is what the policy is asked for.",
    "tasks alike": "Spell it in one way, or the same task becomes several prompts.",
    "several fps": "Resample to one rate: a window of the same length spans another time.",
    "no such camera": "Correct config.data.cameras.",
    "does not fit the canvas": "Change config.data.canvas, camera_size or layout.",
    "other image size": "It is resized like the others; check that it shows the same view.",
    "empty image": "Look at the episode: the camera may have been off or covered.",
    "frozen camera": "Look at the episode: the camera may have stopped.",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One dimension of state or action over all steps of the episodes without errors.

    Every step counts the same, units are physical. `beyond`: share further than 5 sigma from the
    mean; `moves`: share of steps that differ from the one before; `clipped`: share that
    normalisation clips (actions only); `flag`: "", "constant", "near-constant" or "outliers".
    """

    name: str
    dim: int
    min: float
    max: float
    mean: float
    std: float
    q01: float
    q99: float
    beyond: float
    moves: float
    flag: str
    clipped: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int [k] between edges [k + 1]; `guessed`: nobody said what it is, it looks so."""

    label: str
    edges: np.ndarray
    counts: np.ndarray
    guessed: bool = False


@dataclasses.dataclass(frozen=True)
class Drift:
    """The largest |t_i - i / fps|, in seconds, and where."""

    seconds: float
    episode: str
    frame: int


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What `examine` found.

    Attributes:
      data: `DataConfig` that was examined.
      problems: `Problem`s, errors first, sorted by kind; an empty episode means the data set.
      ids: of all episodes, also those that could not be read at all.
      lengths: int [E], steps of those that could be read.
      hours: of recorded time. fps: {fps: episodes}. tasks: {instruction: episodes}.
      columns: `Column`s of state, then action.
      grippers: `Histogram`s of the gripper dimensions.
      normalized: `Histogram` of all normalised action values, or None.
      drift: `Drift`; None where the data have no timestamps.
      images: `doctor_images.Images`.
      seconds: it took.
    """

    data: config_lib.DataConfig
    problems: tuple
    ids: tuple
    lengths: np.ndarray
    hours: float
    fps: dict
    tasks: dict
    columns: tuple
    grippers: tuple
    normalized: Histogram | None
    drift: Drift | None
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
    """Examines the data set of a `Config` (of a mixture: of one dataset) and returns its `Report`.

    Args:
      config: `Config`.
      read: what `episodes.read(config)` returned, where it was called before.

    Raises:
      ValueError, FileNotFoundError: of `episodes.read`.
    """
    began = time.monotonic()
    found, problems = episodes_lib.read(config) if read is None else read
    problems = list(problems)
    ids = tuple(dict.fromkeys([e.id for e in found] + [p.episode for p in problems if p.episode]))
    path, filled = config.data.path, [e for e in found if e.length]

    drift, clock = _clock(filled)
    tasks, texts = _tasks(filled, path)
    problems += clock + texts + _lengths(filled, config.data)
    broken = {p.episode for p in problems if p.severity == "error"}
    sound = [e for e in filled if e.id not in broken]
    columns = []
    for name in ("state", "action"):
        more, wrong = _columns(sound, name, path)
        columns += more
        problems += wrong
    problems += _duplicates(sound)
    fps = collections.Counter(e.fps for e in found)
    if len(fps) > 1:
        problems.append(
            Problem(
                "warning",
                "several fps",
                "",
                path,
                None,
                "; ".join(f"{count} episodes at {value:g}" for value, count in fps.items()),
            )
        )
    columns, normalized = _normalized(sound, columns, config)
    images, wrong = doctor_images.examine(filled, broken, config)
    problems = sorted(problems + wrong, key=lambda p: (p.severity != "error", p.kind))
    return Report(
        data=config.data,
        problems=tuple(problems),
        ids=ids,
        lengths=np.array([e.length for e in found], int),
        hours=sum(e.length / e.fps for e in found) / 3600,
        fps=dict(fps),
        tasks=tasks,
        columns=tuple(columns),
        grippers=_grippers(sound, columns, config.data.gripper_dims),
        normalized=normalized,
        drift=drift,
        images=images,
        seconds=time.monotonic() - began,
    )


# ---- columns -------------------------------------------------------------------------------------


def _values(episodes, name, dim):
    """One dimension of all steps, f64 [N]."""
    return np.concatenate([getattr(e, name)[:, dim] for e in episodes]).astype(np.float64)


def _starts(episodes):
    lengths = np.array([e.length for e in episodes])
    return np.cumsum(lengths) - lengths


def _place(episodes, starts, step):
    """(episode, frame) of a step of all."""
    number = int(np.searchsorted(starts, step, "right")) - 1
    return episodes[number], int(step - starts[number])


def _columns(episodes, name, path):
    """Returns ([Column], problems) of "state" or "action"."""
    if not episodes:
        return [], []
    starts, columns, problems = _starts(episodes), [], []
    for dim in range(getattr(episodes[0], name).shape[1]):
        x = _values(episodes, name, dim)
        label, mean, std, low, high = f"{name}[{dim}]", x.mean(), x.std(), x.min(), x.max()
        q01, q99 = np.quantile(x, (0.01, 0.99))
        moved = np.diff(x, prepend=x[0]) != 0
        moved[starts] = False  # from one episode to the next is no movement
        moves = float(moved.sum() / max(1, len(x) - len(episodes)))
        distance = np.abs(x - mean) / (std or 1.0)
        far, flag = int(distance.argmax()), ""
        beyond = float((distance > _SIGMA).mean())
        if high - low < _STILL:
            flag, beyond = "constant", 0.0
            problems.append(
                Problem(
                    "warning",
                    "constant dimension",
                    "",
                    path,
                    None,
                    (
                        f"{label} is {low:.6g} throughout"
                        if high == low
                        else f"{label} stays between {low:.6g} and {high:.6g}; "
                        f"normalisation does not scale a "
                        f"range below {_STILL:g}"
                    ),
                )
            )
        elif moves < _RARE or q99 - q01 < _NARROW * (high - low):
            flag = "near-constant"
            episode, frame = _place(episodes, starts, far)
            problems.append(
                Problem(
                    "warning",
                    "near-constant dimension",
                    "",
                    path,
                    None,
                    (
                        f"{label} moves in {moves:.2%} of the steps"
                        if moves < _RARE
                        else f"98 % of {label} lie within {(q99 - q01) / (high - low):.2%} "
                        f"of its range "
                        f"{low:.6g} to {high:.6g}; the farthest value is {x[far]:.6g} in "
                        f"{episode.id}, "
                        f"frame {frame}"
                    ),
                )
            )
        elif beyond > _MANY or distance[far] > _FAR:
            flag = "outliers"
            episode, frame = _place(episodes, starts, far)
            problems.append(
                Problem(
                    "warning",
                    "far from the mean",
                    episode.id,
                    str(episode.file),
                    frame,
                    f"{label} is {x[far]:.6g}, {distance[far]:.0f} sigma from the mean {mean:.6g}; "
                    f"{beyond:.3%} of the steps are beyond {_SIGMA:g}",
                )
            )
        if flag != "constant":
            problems += _stuck(episodes, starts, x, label)
        columns.append(
            Column(name, dim, *map(float, (low, high, mean, std, q01, q99)), beyond, moves, flag)
        )
    return columns, problems


def _stuck(episodes, starts, x, label):
    """Warnings about episodes in which a dimension stands still that moves in nearly all others."""
    still = np.maximum.reduceat(x, starts) == np.minimum.reduceat(x, starts)
    long = np.array([e.length >= _STUCK_STEPS for e in episodes])
    stuck, others = np.flatnonzero(still & long), int(long.sum()) - 1
    moving = int((~still & long).sum())
    if others < _STUCK_OTHERS or moving < _STUCK_SHARE * others:
        return []
    return [
        Problem(
            "warning",
            "stuck dimension",
            episodes[i].id,
            str(episodes[i].file),
            None,
            f"{label} is {x[starts[i]]:.6g} from beginning to end; it moves in {moving} of "
            f"the {others} other episodes",
        )
        for i in stuck
    ]


def _normalized(episodes, columns, config):
    """Returns (columns with `clipped`, `Histogram` of the normalised actions or None)."""
    transform = actions.from_config(config)
    if not episodes or set(config.data.action_as) - {"absolute"}:
        return columns, None
    values = np.concatenate([e.action for e in episodes])[:, None]
    values = transform.forward(values, None, np.zeros((len(values), 1), bool))[:, 0]
    table = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0, np.float64),
        "std": values.std(0, dtype=np.float64),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    table = {f"global_{field}": value.tolist() for field, value in table.items()}
    normalizer = normalize.from_statistics({"action": {"all": table}}, "action", config.data)
    values = normalizer.normalize(values)
    clipped = (np.abs(values) >= normalizer.clip).mean(0)
    counts, edges = np.histogram(values, 80)
    return (
        [
            dataclasses.replace(c, clipped=float(clipped[c.dim])) if c.name == "action" else c
            for c in columns
        ],
        Histogram("normalised action", edges, counts),
    )


def _grippers(episodes, columns, dims):
    """`Histogram`s of the gripper dimensions; of those that look like one where none is given."""
    out = []
    for column in columns:
        if column.name != "action" or (dims and column.dim not in dims):
            continue
        x = _values(episodes, "action", column.dim)
        counts, edges = np.histogram(x, 40)
        ends = counts[:4].sum(), counts[-4:].sum()
        two_sided = min(ends) >= 0.05 * len(x) and sum(ends) >= 0.8 * len(x)
        if dims or (two_sided and column.flag != "constant"):
            out.append(Histogram(f"action[{column.dim}]", edges, counts, not dims))
    return tuple(out)


# ---- time, length, words -------------------------------------------------------------------------


def _clock(episodes):
    """Returns (largest `Drift` or None, problems) of the recorded times."""
    problems, timed = [], []
    for e in episodes:
        if e.timestamps is not None and np.shape(e.timestamps) != (e.length,):
            problems.append(
                Problem(
                    "error",
                    "wrong length",
                    e.id,
                    str(e.file),
                    None,
                    (
                        f"timestamps have shape {list(np.shape(e.timestamps))}; expected "
                        f"[{e.length}]"
                    ),
                )
            )
        elif e.timestamps is not None:
            timed.append(e)
    if not timed:
        return None, problems
    starts, lengths = _starts(timed), [e.length for e in timed]
    t = np.concatenate([e.timestamps for e in timed]).astype(np.float64)
    index = np.arange(len(t)) - np.repeat(starts, lengths)
    drift = np.abs(t - index / np.repeat([e.fps for e in timed], lengths))
    back = ~(np.diff(t, prepend=-np.inf) > 0)  # also where a time is not a number
    back[starts] = ~np.isfinite(t[starts])
    suspects = np.flatnonzero(np.maximum.reduceat(drift, starts) * [e.fps for e in timed] > _DRIFT)
    shuffled = np.flatnonzero(np.logical_or.reduceat(back, starts))
    for number in np.union1d(suspects, shuffled).astype(int):
        problems.append(_clock_problem(timed[number]))
    if not np.isfinite(drift).any():
        return None, problems
    worst = int(np.nanargmax(np.where(np.isfinite(drift), drift, np.nan)))
    episode, frame = _place(timed, starts, worst)
    return Drift(float(drift[worst]), episode.id, frame), problems


def _clock_problem(episode):
    def problem(severity, kind, frame, message):
        return Problem(severity, kind, episode.id, str(episode.file), frame, message)

    t, fps = np.asarray(episode.timestamps, np.float64), episode.fps
    intervals = np.diff(t)
    back = np.flatnonzero(~(intervals > 0))
    if len(back) or not np.isfinite(t[0]):
        at = int(back[0]) + 1 if len(back) else 0
        return problem(
            "error",
            "shuffled timestamps",
            at,
            (
                f"{t[at]:.6g} s comes after {t[max(0, at - 1)]:.6g} s; expected about "
                f"{at / fps:.6g} "
                f"s ({len(back)} such in all)"
            ),
        )
    rate = 1 / np.median(intervals) if len(intervals) else fps
    if abs(rate / fps - 1) > 0.05:
        return problem(
            "error",
            "wrong fps",
            None,
            (f"its timestamps are those of {rate:.6g} fps, the metadata says {fps:.6g}"),
        )
    drift = np.abs(t - np.arange(len(t)) / fps)
    at = int((drift * fps > _DRIFT).argmax())
    return problem(
        "warning",
        "timestamp drift",
        at,
        (
            f"recorded at {t[at]:.6g} s, due at {at / fps:.6g} s; at most {drift.max() * fps:.1f} "
            "steps apart"
        ),
    )


def _lengths(episodes, data):
    need = max(data.num_frames, data.action_horizon)
    short = [e for e in episodes if e.length < need]
    if episodes and len(short) == len(episodes):
        longest = max(e.length for e in episodes)
        return [
            Problem(
                "error",
                "no long episode",
                "",
                data.path,
                None,
                (
                    f"a window is {need} steps long (the larger of config.data.num_frames and "
                    f"action_horizon), the longest episode {longest}"
                ),
            )
        ]
    return [
        Problem(
            "warning",
            "short episode",
            e.id,
            str(e.file),
            None,
            f"{e.length} steps, fewer than the {need} of a window",
        )
        for e in short
    ]


def _duplicates(episodes):
    first, problems = {}, []
    for e in episodes:
        key = hashlib.sha256(np.ascontiguousarray(e.action)).digest()
        same = first.setdefault(key, e)
        if same is not e:
            problems.append(
                Problem(
                    "warning",
                    "duplicate episode",
                    e.id,
                    str(e.file),
                    None,
                    f"its actions are those of {same.id} ({same.file})",
                )
            )
    return problems


def _tasks(episodes, path):
    """Returns ({task: episodes}, problems)."""
    count, problems = collections.Counter(), []
    for e in episodes:
        own = {}
        for step in range(e.length):
            own.setdefault(e.task_at(step), step)
        count.update(own.keys())
        problems += [
            Problem("error", "empty task", e.id, str(e.file), step, f"the instruction is {task!r}")
            for task, step in own.items()
            if not task.strip()
        ]
    alike = collections.defaultdict(list)
    for task in count:
        alike[" ".join(task.lower().split())].append(task)
    for same in alike.values():
        if len(same) > 1:
            problems.append(
                Problem(
                    "warning",
                    "tasks alike",
                    "",
                    path,
                    None,
                    (" and ".join(map(repr, same)) + " differ only in case or spaces"),
                )
            )
    return dict(count), problems
