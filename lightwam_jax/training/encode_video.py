"""The video of a batch to latents, on the device: for runs with config.data.encode_online."""

import dataclasses
import os
import typing

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax import encoders as encoders_lib
from lightwam_jax import sharding
from lightwam_jax.data import assets
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import pca as pca_lib
from lightwam_jax.training import augment

# Pixels of canvases that a device encodes at once: it bounds the activations of the Wan VAE.
_AT_ONCE = 4 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """The codec of a run, on its devices. `train` and `first` are pure functions, to be traced.

    Attributes:
      codec: `encoders.base.Codec`.
      arrays: its weights, whole on every device of `mesh`.
      config: `Config`.
      layouts: for each dataset of the run the regions of its cameras, (top, left, height, width).
    """

    codec: typing.Any
    arrays: typing.Any
    mesh: jax.sharding.Mesh
    config: config_lib.Config
    layouts: tuple

    def train(self, arrays, batch, key):
        """Returns a training batch with latents bf16 [B,F,H,W,C] in place of its augmented video.

        The augmentation is a function of `key` and the row, whatever the devices.
        """
        draws = augment.draw(
            key, len(batch["video"]), max(map(len, self.layouts)), self.config.data.augment
        )
        return self._encoded(arrays, batch, batch["video"], draws)

    def first(self, arrays, batch):
        """Returns a batch with latents [B,1,H,W,C] of the first frames, all that acting sees."""
        return self._encoded(arrays, batch, batch["video"][:, :1], augment.Draws())

    def _encoded(self, arrays, batch, video, draws):
        rest = {name: x for name, x in batch.items() if name != "video"}
        dataset = batch.get("dataset", jnp.zeros(len(video), jnp.int32))
        whole, rows = sharding.replicated(self.mesh).spec, sharding.batch_sharding(self.mesh).spec
        encode = jax.shard_map(
            self._rows, mesh=self.mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False
        )
        return {**rest, "latents": encode(arrays, (video, dataset, draws))}

    def _rows(self, arrays, rows):
        """A device's rows, as many at once as fit."""
        count, *shape = rows[0].shape[:4]
        most = max(1, _AT_ONCE // int(np.prod(shape)))
        at_once = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
        parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), rows)

        def encode(part):
            video, dataset, draws = part
            if any(x is not None for x in draws):
                video = augment.apply(video, draws, self.layouts, dataset)
            # Rounded as in the latent cache.
            return self.codec.encode_with(arrays, video).astype(jnp.bfloat16)

        latents = jax.lax.map(encode, parts)
        return latents.reshape(count, *latents.shape[2:])


def make_encoder(config, mesh):
    """Returns the `Encoder` of a run on the devices of `mesh`, if it encodes online; else None.

    Raises:
      FileNotFoundError, ValueError: no codec, or another one than the config's (see
        `load_codec`); an augmentation that cannot be.
    """
    augment.check(config.data)
    if not config.data.encode_online:
        return None
    codec = load_codec(config)
    layouts = tuple(
        tuple(cameras_lib.regions(dataset.config.data).values())
        for dataset in config_lib.datasets(config)
    )
    arrays = jax.device_put(codec.arrays, sharding.replicated(mesh))
    return Encoder(codec, arrays, mesh, config, layouts)


def load_codec(config):
    """Returns the codec that encodes the video of a run with config.data.encode_online.

    That of the run's assets; for random data, "pca" is fitted on noise, and others are read from
    config.data.codec_weights.

    Raises:
      FileNotFoundError: none there; says how to make it.
      ValueError: another codec than the config's.
    """
    data, channels = config.data, config.model.latent_channels
    directory = assets.assets_directory(config)
    if directory is not None:
        codec = encoders_lib.load_codec(os.path.join(directory, "codec"))
    elif data.codec == "pca":
        noise = np.random.default_rng(config.seed).integers(0, 256, (8, 5, 32, 32, 3), np.uint8)
        codec = pca_lib.PcaCodec.fit(noise, channels)
    else:
        from lightwam_jax.encoders import wan  # the PCA codec needs none of its models

        codec = wan.WanCodec(data.codec_weights, data.codec, config.model.dtype)
    if (codec.kind, codec.latent_channels) != (data.codec, channels):
        raise ValueError(
            f"the codec in {directory} is {codec.kind!r} with {codec.latent_channels} channels; "
            f"config.data.codec is {data.codec!r}, config.model.latent_channels {channels}: run "
            f"{latent_cache.REBUILD} latents, or change the config"
        )
    return codec
