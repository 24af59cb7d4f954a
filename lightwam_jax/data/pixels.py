"""Windows of pixels (config.data.pixels): read while training, encoded on the device.

Rows are those of the latent cache of the same config: row k is the same window either way.
"""

import functools
import os

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import assets, cache, transforms
from lightwam_jax.data import codec as codec_lib
from lightwam_jax.data import episodes as episodes_lib


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
        window = episodes_lib.window(
            episode.length, start, data.num_frames, data.frame_stride, data.action_horizon
        )
        return {
            "video": transforms.to_uint8(cache.canvases(episode, window.frames, self._config)),
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


def load_codec(config):
    """Returns the codec that encodes the video of a run with config.data.pixels.

    That of the run's assets; for random data, "pca" is fitted on noise, and others are read from
    config.data.codec_weights.

    Raises:
      FileNotFoundError: none there; says how to make it.
      ValueError: another codec than the config's.
    """
    data, channels = config.data, config.model.latent_channels
    directory = assets.assets_directory(config)
    if directory is not None:
        codec = codec_lib.load(os.path.join(directory, "codec"))
    elif data.codec == "pca":
        noise = np.random.default_rng(config.seed).integers(0, 256, (8, 5, 32, 32, 3), np.uint8)
        codec = codec_lib.PcaCodec.fit(noise, channels)
    else:
        from lightwam_jax.data import wan  # imports the models, which the PCA codec does not need

        codec = wan.WanCodec(data.codec_weights, data.codec, config.model.dtype)
    if (codec.kind, codec.latent_channels) != (data.codec, channels):
        raise ValueError(
            f"the codec in {directory} is {codec.kind!r} with {codec.latent_channels} channels; "
            f"config.data.codec is {data.codec!r}, config.model.latent_channels {channels}: run "
            f"{cache.REBUILD} latents, or change the config"
        )
    return codec


@functools.lru_cache
def _episodes(config_json):
    """({split: [Episode]}, tasks), read once: the loader opens every split by itself."""
    config = config_lib.from_json(config_json)
    found = episodes_lib.load_episodes(config)
    by_id = {episode.id: episode for episode in found}
    train, val = episodes_lib.split(found, config.data.val_fraction)
    splits = {"train": [by_id[name] for name in train], "val": [by_id[name] for name in val]}
    return splits, episodes_lib.tasks(splits["train"] + splits["val"])
