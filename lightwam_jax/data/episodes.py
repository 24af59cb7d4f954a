"""What a data source gives: episodes, checked and split.

Sources differ only in how they read an episode. All code after this file is shared.
"""

import collections
import dataclasses
import importlib
import os
import typing

import numpy as np

from lightwam_jax import config as config_lib

_SHOWN = 20  # errors listed in full


class Episode(typing.Protocol):
    """One demonstration of n steps: the robot saw frame i and state i when it chose action i.

    Sources subclass it. They read columns when they are opened and images when asked.

    Attributes:
      id: name, unique in its dataset.
      length: n.
      fps: control steps per second.
      task: the instruction, e.g. "put the red cube in the bowl"; of the first step, if it changes.
      state: proprioception, f32 [n, P], physical units.
      action: f32 [n, A], physical units.
      timestamps: recorded times f64 [n] in seconds from the start of the episode; None where the
        data have none.
      file: where it lies, for messages.
    """

    id: str
    length: int
    fps: float
    task: str
    state: np.ndarray
    action: np.ndarray
    timestamps: np.ndarray | None = None
    file: str = ""

    def frames(self, camera, indices):
        """Returns the frames of one camera at `indices` [k] as uint8 [k, H, W, 3].

        Raises:
          FrameError: a frame is missing or cannot be decoded.
          KeyError: no such camera; names those there are.
        """
        ...

    def task_at(self, step):
        """Returns the instruction of a step."""
        return self.task

    def video(self, camera):
        """Returns (file, index of its first frame in it) of a camera that is a video, or None."""
        return None

    def files(self, camera):
        """Returns the files that hold the images of one camera; () where they are in memory."""
        return ()

    def images_of(self, camera):
        """Returns `images[camera]` of a source that has `images`; KeyError names the cameras."""
        if camera not in self.images:
            raise KeyError(
                f"episode {self.id} has no camera {camera!r}; it has "
                f"{', '.join(sorted(self.images))}: correct config.data.cameras"
            )
        return self.images[camera]


class FrameError(ValueError):
    """An image that is missing or cannot be decoded.

    Attributes: file, frame (of the episode; None: all of them), reason.
    """

    def __init__(self, file, frame, reason):
        where = f"{file}, frame {frame}" if frame is not None else f"{file}"
        super().__init__(f"{where}: {reason}")
        self.file, self.frame, self.reason = str(file), frame, reason


class Problem(typing.NamedTuple):
    """Something wrong with an episode. An "error" stops everything but the doctor's report.

    Attributes:
      severity: "error" or "warning".
      kind: a few words, the same for every problem of the kind: "missing video".
      episode: id. file: path. frame: step, or None.
      message: what was found, what was expected, what to do.
    """

    severity: str
    kind: str
    episode: str
    file: str
    frame: int | None
    message: str

    @classmethod
    def error(cls, kind, episode, file, message, frame=None):
        """Returns the error `kind`."""
        return cls("error", kind, episode, str(file), frame, message)

    @classmethod
    def warning(cls, kind, episode, file, message, frame=None):
        """Returns the warning `kind`."""
        return cls("warning", kind, episode, str(file), frame, message)

    def line(self):
        """Returns it as one line."""
        place = f", frame {self.frame}" if self.frame is not None else ""
        return f"{self.episode or 'the dataset'} ({self.file}{place}): {self.kind}: {self.message}"


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayEpisode(Episode):
    """An `Episode` held in memory; `images` maps a camera name to uint8 [n, H, W, 3]."""

    id: str
    fps: float
    task: str
    state: np.ndarray
    action: np.ndarray
    images: dict

    @property
    def length(self):
        return len(self.action)

    def frames(self, camera, indices):
        """Returns uint8 [k, H, W, 3]; KeyError names the cameras there are."""
        return self.images_of(camera)[np.asarray(indices)]


def many(count, noun):
    """Returns e.g. "1 step" or "1,200 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def split(episodes, val_fraction):
    """Returns (training episodes, validation episodes), the reference's seeded split.

    Without validation the order is kept. Otherwise both lists are shuffled, and their order is that
    of the samples in a latent cache.

    Raises:
      ValueError: the split leaves no training episode.
    """
    episodes = list(episodes)
    if val_fraction < 1e-6:
        return episodes, []
    order = np.arange(len(episodes))
    np.random.default_rng(42).shuffle(order)
    train = int(len(episodes) * (1 - val_fraction))
    if train == 0:
        raise ValueError(
            f"config.data.val_fraction={val_fraction} of {many(len(episodes), 'episode')} leaves "
            "none to train on; record more episodes or set config.data.val_fraction=0"
        )
    return [episodes[i] for i in order[:train]], [episodes[i] for i in order[train:]]


def load_episodes(config):
    """Returns the `Episode`s that config.data.source and config.data.path name, checked.

    Raises:
      ValueError: no source, a source without episodes ("fake"), or episodes with errors;
        every one is named.
      FileNotFoundError: nothing at config.data.path; the message says which command makes it.
    """
    found, problems = read(config)
    refuse_errors(problems, config)
    return found


def refuse_errors(problems, config):
    """Raises ValueError, naming them, where there are errors among `Problem`s."""
    errors = [problem.line() for problem in problems if problem.severity == "error"]
    if errors:
        shown = errors[:_SHOWN] + [f"... and {len(errors) - _SHOWN} more"] * (len(errors) > _SHOWN)
        raise ValueError(
            f"{many(len(errors), 'error')} in the episodes of config.data.path="
            f"{config.data.path!r}:\n  "
            + "\n  ".join(shown)
            + "\nRepair the data, or list the ids of these episodes in "
            "config.data.exclude. python -m lightwam_jax.precompute --config CONFIG --what stats "
            "writes a report of all of them."
        )


def read(config):
    """Returns (episodes, problems): what can be read at all, and what is wrong with the data.

    Episodes listed in config.data.exclude are left out of both.

    Raises:
      ValueError: no source, a source without episodes ("fake"), an id in config.data.exclude
        that no episode has, or a config that fits none of the episodes.
      FileNotFoundError: nothing at config.data.path.
    """
    source, path = config.data.source, config.data.path
    if source == "fake":
        raise ValueError(
            "config.data.source='fake' makes random batches and has no episodes: "
            "there is nothing to precompute, run train.py directly"
        )
    if not source:
        raise ValueError("config.data.source is empty; expected lerobot, rlds or hdf5")
    paths = directories(path)
    for directory in paths or [path]:
        if not os.path.isdir(directory):
            raise FileNotFoundError(
                f"config.data.path={directory!r} is not a directory of episodes{_recorded(config)}"
            )
    # Imported here: each source needs packages that the others do not.
    reader = importlib.import_module(f"lightwam_jax.data.formats.{source}")
    several = len(paths) > 1
    found, problems = _read_several(reader, config, paths) if several else reader.read(config)
    names = {e.id for e in found} | {p.episode for p in problems}
    unknown = sorted(set(config.data.exclude) - names)
    if unknown:
        raise ValueError(
            f"config.data.exclude lists {', '.join(unknown)}, and {path} has no such "
            "episode; correct the list"
        )
    found = [e for e in found if e.id not in config.data.exclude]
    problems = [p for p in problems if p.episode not in config.data.exclude]
    if not found and not any(problem.severity == "error" for problem in problems):
        raise ValueError(f"config.data.path={path!r} holds no episode{_recorded(config)}")
    return found, problems + [p for e in found for p in check(e, config)] + _duplicates(found)


def _recorded(config):
    """Returns the end of a message: where the episodes come from."""
    suite = config.evaluation.suite
    # What starts from released weights has data of others.
    if not suite or config.data.codec != "pca":
        return "; correct it, or put them there (the config's file says what it trains on)"
    places = directories(config.data.path)
    place = next((p for p in places if not os.path.isdir(p)), places[0])
    return (
        ": correct it, or record some with: python -m lightwam_jax.envs.record --suite "
        f"{suite} --out {place} (with which flags, the config's file says)"
    )


def directories(path):
    """Returns the directories that a config.data.path names: one, or several between commas."""
    return [directory.strip() for directory in path.split(",") if directory.strip()]


def _read_several(reader, config, paths):
    """Reads datasets one after the other; ids get the name of their directory in front."""
    found, problems = [], []
    for name, path in zip(_distinct(paths), paths):
        prefix = f"{name}/"
        excluded = [i.removeprefix(prefix) for i in config.data.exclude if i.startswith(prefix)]
        data = dataclasses.replace(config.data, path=path, exclude=tuple(excluded))
        episodes, wrong = reader.read(dataclasses.replace(config, data=data))
        found += [dataclasses.replace(e, id=prefix + e.id) for e in episodes]
        problems += [p._replace(episode=prefix + p.episode) for p in wrong]
    return found, problems


def _distinct(paths):
    """Returns names of directories: the last part of each path, or as many as tell them apart."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-n:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(
        f"config.data.path={','.join(paths)!r} names a directory twice: the ids of its episodes "
        "would not be unique; name it once"
    )


def tasks(episodes):
    """Returns the distinct instructions of all steps, in the order of their first use."""
    steps = (episode.task_at(step) for episode in episodes for step in range(episode.length))
    return list(dict.fromkeys(steps))


def check(episode, config):
    """Returns the `Problem`s of an episode's columns; no image is read.

    Errors: no step at all, state or action of another length or width than the config says,
    numbers that are not finite.
    """
    if not episode.length:
        return [_error(episode, "empty episode", "it has no step")]
    widths = config_lib.state_width(config), config_lib.action_width(config)
    out = []
    for name, key, width in zip(("state", "action"), ("proprio_dim", "action_dim"), widths):
        values = getattr(episode, name)
        bad = np.argwhere(~np.isfinite(values))
        if values.ndim != 2 or len(values) != episode.length:
            said = f"{name} has shape {list(values.shape)}; expected [{episode.length}, {width}]"
            out.append(_error(episode, "wrong length", said))
        elif values.shape[1] != width:
            has = values.shape[1]
            said = (
                f"{name} has {has} dimensions, the config says {width}; set config.model.{key} to "
                f"{has}, or config.data.{name}_dim where the model's is larger"
            )
            out.append(_error(episode, "wrong width", said))
        elif len(bad):
            step, dim = bad[0]
            said = f"{name}[{dim}] is {values[step, dim]} ({len(bad)} such values in all)"
            out.append(_error(episode, "not finite", said, int(step)))
    return out


def _error(episode, kind, message, frame=None):
    return Problem.error(kind, episode.id, episode.file, message, frame)


def _duplicates(episodes):
    count = collections.Counter(episode.id for episode in episodes)
    return [
        Problem.error(
            "duplicate id", name, "", f"{n} episodes have this id; ids must be unique, rename one"
        )
        for name, n in count.items()
        if n > 1
    ]
