"""The Wan VAEs, 2.1 and 2.2, as codecs: weights that the converters wrote."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import atomic
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.config import FRAMES_PER_LATENT
from lightwam_jax.encoders import base, converted
from lightwam_jax.models.vae import WanVAE, still_params
from lightwam_jax.models.vae22 import Wan22VAE

VAES = {"wan21": WanVAE, "wan22": Wan22VAE}  # by codec kind
HALVES = {"encode": ("encoder", "conv1"), "decode": ("decoder", "conv2")}
_ENCODING_BYTES = 4 << 30  # of activations; more clips than fit are encoded part by part


class WanCodec:
    """A Wan VAE as a `Codec`. The weights are read when they are first needed.

    Encoding keeps only the encoder half in memory, decoding only the decoder half. Weights and
    activations have `dtype`. The id names it, so that a cache and the policies trained on it share
    it.

    Attributes: see `base.Codec`; kind is of `VAES`, arrays is the encoder half.
    """

    def __init__(self, weights, kind, dtype):
        """Args: weights: converted directory; kind: the VAE expected there; dtype: its name.

        Raises:
          FileNotFoundError, ValueError: nothing there, or another model's weights.
        """
        self._weights, meta, fields = converted.open_converted(
            weights, "vae", "data.codec_weights", "vae"
        )
        version = fields.pop("version", "absent")
        if version != kind:
            raise ValueError(
                f"config.data.codec_weights={str(weights)!r} holds VAE {version!r}, "
                f"config.data.codec is {kind!r}: change one of them"
            )
        self.kind, self.dtype = kind, dtype
        dtype = jnp.dtype(dtype)
        self.model = converted.make_module(VAES[kind], fields, self._weights, dtype=dtype)
        self.latent_channels, self.stride = self.model.z_dim, base.STRIDES[kind]
        arrays = meta["arrays"]["params"].items()
        encoder = {path: x for path, x in arrays if path.split("/")[0] in HALVES["encode"]}
        self.id = f"{kind}-{self.dtype}-{converted.checksum(fields, encoder)}"
        self._encode, self._decode = jax.jit(self.encode_with), jax.jit(self.decode_with)

    @functools.cached_property
    def arrays(self):
        return self._half("encode")

    @property
    def image_arrays(self):
        """See `base.Codec`; not kept."""
        return still_params(self._half("encode"))

    @functools.cached_property
    def _decoder(self):
        return self._half("decode")

    def _half(self, name):
        return half(checkpoint.load_params(self._weights).params, name, self.dtype)

    def encode_with(self, arrays, video):
        """Canvases [B, T, H, W, 3] -> f32 [B, F, H/stride, W/stride, C]; a pure function."""
        pixels = (base.to_float(video) - 0.5) / 0.5
        with jax.default_matmul_precision("highest"):  # where dtype is float32, it is meant
            return self.model.apply({"params": arrays}, pixels, method="encode")

    def decode_with(self, arrays, latents):
        """[B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3]; a pure function."""
        with jax.default_matmul_precision("highest"):
            video = self.model.apply({"params": arrays}, latents, method="decode")
        return ((video + 1) * 127.5).astype(jnp.uint8)  # truncated, as the reference does

    def encode(self, video):
        """See `base.Codec.encode`."""
        base.check_video(video, self.stride)
        encode = functools.partial(self._encode, self.arrays)
        return converted.in_parts(encode, video, self._rows(video.shape[1:4]))

    def decode(self, latents):
        """See `base.Codec.decode`."""
        latents = np.asarray(latents)
        base.check_latents(latents, self.latent_channels)
        frames, height, width = latents.shape[1:4]
        shape = (1 + FRAMES_PER_LATENT * (frames - 1), height * self.stride, width * self.stride)
        decode = functools.partial(self._decode, self._decoder)
        return converted.in_parts(decode, latents, self._rows(shape))

    def _rows(self, shape):
        """Clips of `shape` [T, H, W] whose activations fit: a power of two."""
        widest = max(self.model.dim, getattr(self.model, "decoder_dim", 0))
        pixels = np.prod(shape) / (self.stride // 8) ** 2  # 2.2 first folds pixels into channels
        rows = _ENCODING_BYTES / (pixels * widest * 16)  # four float32 copies live at once
        return 1 << max(0, int(np.log2(max(rows, 1))))

    def save(self, directory):
        """Writes codec.json and weights/ (large files hard-linked) into `directory`."""
        os.makedirs(directory, exist_ok=True)
        storage.copy_files(self._weights, os.path.join(directory, "weights"), storage.LARGE)
        about = {"kind": self.kind, "id": self.id, "dtype": self.dtype}
        about["latent_channels"] = self.latent_channels
        atomic.write_json(os.path.join(directory, "codec.json"), about)


def half(params, name, dtype):
    """The part of a VAE's parameters that "encode" or "decode" needs, in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), {key: params[key] for key in HALVES[name]})
