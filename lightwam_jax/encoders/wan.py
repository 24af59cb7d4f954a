"""The Wan VAEs, 2.1 and 2.2, as codecs: weights that the converters wrote."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.config import FRAMES_PER_LATENT
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.encoders import converted
from lightwam_jax.models.vae import WanVAE
from lightwam_jax.models.vae22 import Wan22VAE

VAES = {"wan21": WanVAE, "wan22": Wan22VAE}  # by codec kind
HALVES = {"encode": ("encoder", "conv1"), "decode": ("decoder", "conv2")}
_ENCODING_BYTES = 4 << 30  # of activations; more clips than fit go one part after the other


class WanCodec:
    """A Wan VAE as a `Codec`. The weights are read when they are first needed.

    Only the encoder half stays for encoding, only the decoder half for decoding. Weights and
    activations are of `dtype`; a cache and the policies that learnt from it share it, since the id
    names it.

    Attributes:
      kind: of `VAES`. latent_channels, stride, id, arrays: see `Codec`; arrays is the encoder half.
    """

    def __init__(self, weights, kind, dtype):
        """Args: weights: converted directory; kind: the VAE expected there; dtype: name.

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
        self.model = converted.make_module(
            VAES[kind], fields, self._weights, dtype=jnp.dtype(dtype)
        )
        self.latent_channels, self.stride = self.model.z_dim, encoders_base.STRIDES[kind]
        encoder = {
            path: manifest
            for path, manifest in meta["arrays"]["params"].items()
            if path.split("/")[0] in HALVES["encode"]
        }
        self.id = f"{kind}-{dtype}-{converted.checksum(fields, encoder)}"
        self._encode, self._decode = jax.jit(self.encode_with), jax.jit(self.decode_with)

    @classmethod
    def load(cls, directory, description):
        """Returns the codec that `save` wrote; description: its codec.json."""
        codec = cls(os.path.join(directory, "weights"), description["kind"], description["dtype"])
        if codec.id != description["id"]:
            raise ValueError(
                f"{directory}/weights are {codec.id}, codec.json says "
                f"{description['id']}: one of them was replaced; restore the "
                "directory, or run python -m lightwam_jax.precompute --config CONFIG "
                "--what latents"
            )
        return codec

    @functools.cached_property
    def arrays(self):
        return self._half("encode")

    @functools.cached_property
    def _decoder(self):
        return self._half("decode")

    def _half(self, name):
        whole = checkpoint.load_params(self._weights).params
        return half(whole, name, self.dtype)

    def encode_with(self, arrays, video):
        """Canvases [B, T, H, W, 3] -> f32 [B, F, H/stride, W/stride, C]; a pure function."""
        pixels = (encoders_base.to_float(video) - 0.5) / 0.5
        with jax.default_matmul_precision("highest"):  # where dtype is float32, it is meant
            return self.model.apply({"params": arrays}, pixels, method="encode")

    def decode_with(self, arrays, latents):
        """[B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3]; a pure function."""
        with jax.default_matmul_precision("highest"):
            video = self.model.apply({"params": arrays}, latents, method="decode")
        return ((video + 1) * 127.5).astype(jnp.uint8)  # truncated, as the reference does

    def encode(self, video):
        """Canvases [B, T, H, W, 3] -> latents f32 [B, 1 + (T-1)//4, H/stride, W/stride, C].

        Raises:
          ValueError: see `base.check_video`.
        """
        encoders_base.check_video(video, self.stride)
        return converted.in_parts(
            functools.partial(self._encode, self.arrays), video, self._rows(video.shape[1:4])
        )

    def decode(self, latents):
        """Latents [B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3]."""
        latents = np.asarray(latents)
        if latents.ndim != 5 or latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; expected "
                f"[B, F, h, w, {self.latent_channels}]"
            )
        frames, height, width = latents.shape[1:4]
        shape = (1 + FRAMES_PER_LATENT * (frames - 1), height * self.stride, width * self.stride)
        return converted.in_parts(
            functools.partial(self._decode, self._decoder), latents, self._rows(shape)
        )

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
        with open(os.path.join(directory, "codec.json"), "w") as f:
            json.dump(
                {
                    "kind": self.kind,
                    "id": self.id,
                    "dtype": self.dtype,
                    "latent_channels": self.latent_channels,
                },
                f,
                indent=2,
            )


def half(params, name, dtype):
    """The part of a VAE's parameters that "encode" or "decode" needs, in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), {key: params[key] for key in HALVES[name]})
