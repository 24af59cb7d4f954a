"""What a data source hands over: episodes, and the windows cut from them.

A source differs from another only in how it reads an episode; everything behind this file is
shared.
"""

import dataclasses
import os
import typing

import numpy as np

SOURCES = ("demo", "fake")
RECORD = "python -m lightwam_jax.precompute --config CONFIG --what demo"


class Episode(typing.Protocol):
    """One demonstration of n steps: the robot saw frame i and state i when it chose action i.

    Attributes:
      id: name, unique in its data set.
      length: n.
      fps: control steps per second.
      task: the instruction, e.g. "put the red cube in the bowl".
      state: proprioception, f32 [n, P], physical units.
      action: f32 [n, A], physical units.
    """
    id: str
    length: int
    fps: float
    task: str
    state: np.ndarray
    action: np.ndarray

    def frames(self, camera, indices):
        """Returns the frames of one camera at `indices` [k] as uint8 [k, H, W, 3]."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayEpisode:
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
        if camera not in self.images:
            raise KeyError(f"episode {self.id} has no camera {camera!r}; it has "
                           f"{', '.join(sorted(self.images))}: correct config.data.cameras")
        return self.images[camera][np.asarray(indices)]


class Window(typing.NamedTuple):
    """Indices into an episode, clamped to its end, and where they were clamped.

    frames [k] int, actions [T] int, image_is_pad [k] bool, action_is_pad [T] bool.
    """
    frames: np.ndarray
    actions: np.ndarray
    image_is_pad: np.ndarray
    action_is_pad: np.ndarray


def window(length, start, num_frames, stride, horizon):
    """Returns the `Window` of the sample that starts at step `start` (every step starts one).

    Args:
      length: steps of the episode.
      start: first step.
      num_frames: raw frames the window spans; every `stride`-th one is a video frame.
      stride: raw frames between two video frames.
      horizon: T, actions of the chunk.
    """
    if not 0 <= start < length:
        raise IndexError(f"window starts at step {start} of an episode of {length} steps; "
                         "expected 0 <= start < length")
    frames = start + np.arange(0, num_frames, stride)
    actions = start + np.arange(horizon)
    last = length - 1
    return Window(np.minimum(frames, last), np.minimum(actions, last),
                  frames > last, actions > last)


def split(episodes, val_fraction):
    """Returns (train ids, val ids), the reference's seeded split by episode.

    Without validation the order is kept; otherwise both lists come in shuffled order, which is
    then the order of the samples in a latent cache.

    Raises:
      ValueError: the split leaves no training episode.
    """
    ids = [episode.id for episode in episodes]
    if val_fraction < 1e-6:
        return ids, []
    order = np.arange(len(ids))
    np.random.default_rng(42).shuffle(order)
    train = int(len(ids) * (1 - val_fraction))
    if train == 0:
        raise ValueError(
            f"config.data.val_fraction={val_fraction} of {len(ids)} episodes leaves none to train "
            "on; record more episodes or set config.data.val_fraction=0")
    return [ids[i] for i in order[:train]], [ids[i] for i in order[train:]]


def load_episodes(config):
    """Returns the `Episode`s that config.data.source and config.data.path name, validated.

    Raises:
      ValueError: unknown source, or a source without episodes ("fake").
      FileNotFoundError: nothing at config.data.path; the message says which command makes it.
    """
    source, path = config.data.source, config.data.path
    if source == "fake":
        raise ValueError("config.data.source='fake' makes random batches and has no episodes: "
                         "there is nothing to precompute, run train.py directly")
    if source not in SOURCES:
        raise ValueError(
            f"config.data.source is {source!r}; known sources: {', '.join(SOURCES)}")
    if not path or not os.path.isdir(path):
        raise FileNotFoundError(
            f"config.data.path={path!r} is not a directory of episodes; make it with: {RECORD}")
    from lightwam_jax.data import demo  # imports the simulator, which other sources do not need
    episodes = list(demo.episodes(path))
    validate(episodes, config)
    return episodes


def validate(episodes, config):
    """Raises ValueError, with the episode's id, where episodes contradict the config or themselves.

    Checked: at least one episode, ids unique, lengths agree, the widths of state and action are
    config.model.proprio_dim and action_dim, every number is finite.
    """
    if not episodes:
        raise ValueError(f"config.data.path={config.data.path!r} holds no episode; record some "
                         f"with: {RECORD}")
    seen = set()
    for episode in episodes:
        if episode.id in seen:
            raise ValueError(
                f"two episodes are called {episode.id!r}; ids must be unique, rename one")
        seen.add(episode.id)
        for name, key in (("state", "proprio_dim"), ("action", "action_dim")):
            values = getattr(episode, name)
            width = getattr(config.model, key)
            if values.ndim != 2 or len(values) != episode.length or not episode.length:
                raise ValueError(
                    f"episode {episode.id}: {name} has shape {list(values.shape)}; expected "
                    f"[{episode.length}, {width}] with at least one step")
            if values.shape[1] != width:
                raise ValueError(
                    f"episode {episode.id}: {name} has {values.shape[1]} dimensions, "
                    f"config.model.{key} is {width}; set --config.model.{key}={values.shape[1]} or "
                    "point config.data.path to the right data")
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                step, dim = bad[0]
                raise ValueError(
                    f"episode {episode.id}: {name}[{dim}] is {values[step, dim]} at step {step} "
                    f"({len(bad)} non-finite values in all); repair or remove the episode")
