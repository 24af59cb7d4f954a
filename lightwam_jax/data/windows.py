"""Windows: the samples that are cut from episodes, one from every step.

A window has the images, the state and the actions from its step on. Indices past the end of the
episode repeat the last step and are marked as padding. The latent cache stores windows, encoded, in
the order of `Windows`: row k is the same window from the cache and from pixels
(config.data.encode_online), which are encoded on the device while training.
"""

import functools
import typing

import ml_dtypes  # noqa: F401 (else TFDS imports TensorFlow to find bfloat16, when it reads)
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax import encoders
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import episodes as episodes_lib


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
    frames, actions = start + np.arange(0, num_frames, stride), start + np.arange(horizon)
    last = length - 1
    return Window(
        np.minimum(frames, last), np.minimum(actions, last), frames > last, actions > last
    )


def window_of(episode, start, data):
    """Returns the `Window` of an episode at step `start` that a `DataConfig` describes."""
    return window_at(episode.length, start, data.num_frames, data.frame_stride, data.action_horizon)


def raw_values(episode, start, window, task_number):
    """Returns {name: array} of what a window has beside its images, in physical units.

    proprio f32 [P], actions f32 [T, A], action_is_pad bool [T], image_is_pad bool [frames], and
    task, the number of its instruction by the dictionary task_number.
    """
    return {
        "proprio": episode.state[start].astype(np.float32),
        "actions": episode.action[window.actions].astype(np.float32),
        "action_is_pad": window.action_is_pad,
        "image_is_pad": window.image_is_pad,
        "task": task_number[episode.task_at(start)],
    }


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
    out = []
    for number in spread(len(episodes), most_episodes):
        episode = episodes[number]
        for start in spread(episode.length, per_episode):
            window = window_of(episode, start, config.data)
            out.append(canvases(episode, window.frames, config))
    return np.stack(out)


def spread(length, most):
    """Returns at most `most` numbers below length, spread evenly from the first to the last."""
    return np.unique(np.linspace(0, length - 1, most).astype(int)).tolist()


class Windows:
    """The windows of some episodes: len(), [row] -> raw record of one of them.

    A record holds video uint8 [frames, H, W, 3], the canvases, and `raw_values`.
    """

    def __init__(self, episodes, tasks, config):
        """Args: episodes: in the order of the rows; tasks: instructions; config: Config."""
        self._episodes, self._config = episodes, config
        self._task_number = {task: number for number, task in enumerate(tasks)}
        self._ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)

    def __len__(self):
        return int(self._ends[-1]) if self._episodes else 0

    def place(self, row):
        """Returns (`Episode`, the step a row's window starts at)."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        episode = self._episodes[number]
        return episode, int(row - self._ends[number]) + episode.length

    def __getitem__(self, row):
        episode, start = self.place(row)
        window = window_of(episode, start, self._config.data)
        video = encoders.base.to_uint8(canvases(episode, window.frames, self._config))
        return {"video": video, **raw_values(episode, start, window, self._task_number)}


def open_windows(config, split):
    """Returns (`Windows` of "train" or "val", the instructions of both) of a dataset."""
    splits, tasks = _episodes(config_lib.to_json(config))
    return Windows(splits[split], tasks, config), tasks


@functools.lru_cache
def _episodes(config_json):
    """({split: [Episode]}, tasks), read once: the loader opens every split by itself."""
    config = config_lib.from_json(config_json)
    train, val = episodes_lib.split(episodes_lib.load_episodes(config), config.data.val_fraction)
    return {"train": train, "val": val}, episodes_lib.tasks(train + val)
