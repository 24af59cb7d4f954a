"""Windows of pixels (config.data.encode_online): read while training, encoded on the device.

Rows are those of the latent cache of the same config: row k is the same window either way.
"""

import functools
import typing

import ml_dtypes  # noqa: F401 (else TFDS imports TensorFlow to find bfloat16, when it reads)
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.encoders import base as encoders_base


class Windows:
    """The windows of some episodes: len(), [row] -> raw record of one of them.

    A record holds video uint8 [T, H, W, 3], proprio f32 [P], actions f32 [T, A] (physical units),
    action_is_pad bool [T], image_is_pad bool [frames], and task, the number of its instruction.
    """

    def __init__(self, episodes, tasks, config):
        """Args: episodes: in the order of the rows; tasks: instructions; config: Config."""
        self._episodes, self._config = episodes, config
        self._task = {task: number for number, task in enumerate(tasks)}
        self._ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)

    def __len__(self):
        return int(self._ends[-1]) if self._episodes else 0

    def __getitem__(self, row):
        number = int(np.searchsorted(self._ends, row, side="right"))
        episode, data = self._episodes[number], self._config.data
        start = int(row - self._ends[number]) + episode.length
        window = window_at(
            episode.length, start, data.num_frames, data.frame_stride, data.action_horizon
        )
        return {
            "video": encoders_base.to_uint8(canvases(episode, window.frames, self._config)),
            "proprio": episode.state[start].astype(np.float32),
            "actions": episode.action[window.actions].astype(np.float32),
            "action_is_pad": window.action_is_pad,
            "image_is_pad": window.image_is_pad,
            "task": self._task[episode.task_at(start)],
        }


def open_windows(config, split):
    """Returns (`Windows` of "train" or "val", the instructions of both) of a data set."""
    splits, tasks = _episodes(config_lib.to_json(config))
    return Windows(splits[split], tasks, config), tasks


@functools.lru_cache
def _episodes(config_json):
    """({split: [Episode]}, tasks), read once: the loader opens every split by itself."""
    config = config_lib.from_json(config_json)
    found = episodes_lib.load_episodes(config)
    by_id = {episode.id: episode for episode in found}
    train, val = episodes_lib.split(found, config.data.val_fraction)
    splits = {"train": [by_id[name] for name in train], "val": [by_id[name] for name in val]}
    return splits, episodes_lib.tasks(splits["train"] + splits["val"])


def canvases(episode, indices, config):
    """Returns the canvases [k, H, W, 3] of an episode at `indices` [k]; see `cameras.canvas`."""
    images = {camera: episode.frames(camera, indices) for camera in config.data.cameras}
    return lay_out(images, episode, config)


def lay_out(images, episode, config):
    """Returns the canvases [k, H, W, 3] of images {camera: uint8 [k, h, w, 3]} of an episode."""
    try:
        return cameras_lib.canvas(images, config.data)
    except ValueError as error:
        raise ValueError(f"episode {episode.id}: {error}") from error


def clips(episodes, config, most_episodes, per_episode):
    """Returns video clips [N, frames, H, W, 3], canvases spread evenly over the episodes."""
    data, out = config.data, []
    picked = np.unique(np.linspace(0, len(episodes) - 1, most_episodes).astype(int))
    for episode in (episodes[i] for i in picked):
        for start in np.unique(np.linspace(0, episode.length - 1, per_episode).astype(int)):
            window = window_at(
                episode.length, int(start), data.num_frames, data.frame_stride, data.action_horizon
            )
            out.append(canvases(episode, window.frames, config))
    return np.stack(out)


class Window(typing.NamedTuple):
    """Indices into an episode, clamped to its end, and where they were clamped.

    frames [k] int, actions [T] int, image_is_pad [k] bool, action_is_pad [T] bool.
    """

    frames: np.ndarray
    actions: np.ndarray
    image_is_pad: np.ndarray
    action_is_pad: np.ndarray


def window_at(length, start, num_frames, stride, horizon):
    """Returns the `Window` of the sample that starts at step `start` (every step starts one).

    Args:
      length: steps of the episode.
      start: first step.
      num_frames: raw frames the window spans; every `stride`-th one is a video frame.
      stride: raw frames between two video frames.
      horizon: T, actions of the chunk.
    """
    if not 0 <= start < length:
        raise IndexError(
            f"window starts at step {start} of an episode of {length} steps; "
            "expected 0 <= start < length"
        )
    frames = start + np.arange(0, num_frames, stride)
    actions = start + np.arange(horizon)
    last = length - 1
    return Window(
        np.minimum(frames, last), np.minimum(actions, last), frames > last, actions > last
    )
