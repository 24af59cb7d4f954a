"""The PCA codec: latents without pretrained weights, fitted on the data in seconds."""

import functools
import hashlib
import os
import zipfile
import zlib

import einops
import jax
import numpy as np

from lightwam_jax import atomic
from lightwam_jax.config import FRAMES_PER_LATENT
from lightwam_jax.encoders import base
from lightwam_jax.encoders.base import STRIDE

_CHUNK_BYTES = 1 << 20  # encoded at once; more than the CPU's cache holds takes four times as long
# What numpy raises for a damaged .npz file.
_DAMAGE = (ValueError, EOFError, LookupError, NotImplementedError, zipfile.BadZipFile, zlib.error)
PLACES = 4  # latent channels that tell a cell's place on the canvas
_CHROMA = 3.0  # weight of colour differences against brightness when components are chosen


class PcaCodec:
    """Principal components of 8x8 patches (frame 0) and of 4x8x8 patches (later groups of four).

    Metric: colour differences count `_CHROMA` times as much as brightness when components are
    chosen. Otherwise a small object keeps its outline and loses its colour, and instructions name
    objects by colour.

    Scaling: component i, of standard deviation s_i, becomes a latent of deviation ~ sqrt(s_i), with
    a mean variance over channels of 1 per frame kind (`whitening` = 0.5). Unit variance for every
    channel (1.0) would spend most of the video loss on the least visible components and amplify
    their noise. One factor for all (0.0) would hide the small ones, which hold the edges that
    localise objects, in the flow's unit noise.

    Place: latents of a convolutional codec tell where they are on the canvas, because its zero
    padding has effects from the borders inwards; the backbone's rotary positions are relative.
    Components of single patches do not tell, so the last `PLACES` channels hold each cell's row and
    column; decoding ignores them.
    """

    kind, stride = "pca", STRIDE

    def __init__(self, arrays):
        self.arrays = self.image_arrays = arrays
        self.latent_channels = arrays["first_encode"].shape[1] + PLACES

    @functools.cached_property
    def id(self):
        digest = hashlib.sha256(_places(8, 16).tobytes())
        for name in sorted(self.arrays):
            digest.update(name.encode() + np.ascontiguousarray(self.arrays[name]).tobytes())
        return f"pca-{digest.hexdigest()[:16]}"

    @classmethod
    def fit(cls, videos, channels, whitening=0.5):
        """Returns the codec fitted on clips [N, T, H, W, 3], T = 1 + 4k; deterministic.

        Args:
          videos: uint8 or float32 in 0..1; a few hundred are plenty.
          channels: C, of which `PLACES` are places; at most 192 are components.
          whitening: see the class.
        """
        base.check_video(videos)
        components, most, frames = channels - PLACES, 3 * STRIDE**2, videos.shape[1]
        if frames < 1 + FRAMES_PER_LATENT or not 0 < components <= most:
            raise ValueError(
                f"PCA codec of {channels} channels on clips of {frames} frames; expected "
                f"{1 + PLACES} to {most + PLACES} channels, {1 + FRAMES_PER_LATENT} frames or more"
            )
        singles = einops.rearrange(videos[:, ::FRAMES_PER_LATENT], "n t h w c -> (n t) h w c")
        arrays = {}
        patches = {"first": _first_patches(singles), "later": _later_patches(videos)}
        for kind, values in patches.items():
            for name, array in _fit_basis(values, components, whitening).items():
                arrays[f"{kind}_{name}"] = array
        return cls(arrays)

    @staticmethod
    def encode_with(arrays, video):
        """Canvases [B, T, H, W, 3] -> f32 [B, F, H/8, W/8, C]; numpy or traced jax arrays."""
        xp = _namespace(video)
        with jax.default_matmul_precision("highest"):  # accelerators would round to bfloat16
            first = base.in_255(_first_patches(video[:, 0]))
            latents = [(first @ arrays["first_encode"] + arrays["first_bias"])[:, None]]
            if video.shape[1] > 1:
                later = base.in_255(_later_patches(video))
                latents.append(later @ arrays["later_encode"] + arrays["later_bias"])
        latents = xp.concatenate(latents, axis=1)
        places = xp.broadcast_to(_places(*latents.shape[2:4]), (*latents.shape[:-1], PLACES))
        return xp.concatenate([latents, places], axis=-1)

    @staticmethod
    def decode_with(arrays, latents):
        """[B, F, h, w, C] -> f32 [B, 4F - 3, 8h, 8w, 3], in 0..255 but for overshoot."""
        latents = latents[..., :-PLACES].astype(np.float32)
        with jax.default_matmul_precision("highest"):
            first = latents[:, :1] @ arrays["first_decode"] + arrays["first_mean"]
            later = latents[:, 1:] @ arrays["later_decode"] + arrays["later_mean"]
        first = _rearrange(first, "b f h w (p q c) -> b f (h p) (w q) c")
        later = _rearrange(later, "b f h w (g p q c) -> b (f g) (h p) (w q) c", g=FRAMES_PER_LATENT)
        return _namespace(latents).concatenate([first, later], axis=1)

    def encode(self, video):
        """See `base.Codec.encode`; on the host."""
        base.check_video(video)
        rows = max(1, _CHUNK_BYTES // max(1, video[:1].size))
        chunks = (video[i : i + rows] for i in range(0, len(video), rows))
        return np.concatenate([self.encode_with(self.arrays, chunk) for chunk in chunks])

    def decode(self, latents):
        """See `base.Codec.decode`."""
        latents = np.asarray(latents)
        base.check_latents(latents, self.latent_channels)
        pixels = self.decode_with(self.arrays, latents)
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)

    def save(self, directory):
        """Writes codec.json and codec.npz into `directory`."""
        os.makedirs(directory, exist_ok=True)
        np.savez(os.path.join(directory, "codec.npz"), **self.arrays)
        about = {"kind": self.kind, "id": self.id, "latent_channels": self.latent_channels}
        atomic.write_json(os.path.join(directory, "codec.json"), about)

    @classmethod
    def load(cls, directory):
        """Returns the codec that `save` wrote; ValueError: its file is damaged."""
        path = os.path.join(directory, "codec.npz")
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(dict(stored))
        except _DAMAGE as error:
            # Else numpy would advise to load it as a pickle.
            reason = error if zipfile.is_zipfile(path) else "it is no .npz file, or cut off"
            raise ValueError(f"{path} is damaged ({reason})") from error


def _namespace(x):
    return np if isinstance(x, np.ndarray) else jax.numpy


def _places(height, width):
    """[h, w, PLACES] f32: row and column in -1..1, and the column at twice the pace."""
    rows, columns = np.meshgrid(
        (np.arange(height) * 2 + 1) / height - 1,
        (np.arange(width) * 2 + 1) / width - 1,
        indexing="ij",
    )
    turn = 2 * np.pi * columns
    return np.stack([rows, columns, np.sin(turn), np.cos(turn)], axis=-1).astype(np.float32)


def _rearrange(x, pattern, **sizes):
    """`einops.rearrange` with patches of p x q pixels."""
    return einops.rearrange(x, pattern, p=STRIDE, q=STRIDE, **sizes)


def _first_patches(frames):
    """[B, H, W, 3] -> [B, h, w, 192]."""
    return _rearrange(frames, "b (h p) (w q) c -> b h w (p q c)")


def _later_patches(video):
    """[B, T, H, W, 3] -> [B, F-1, h, w, 768]; frame 0 left out."""
    return _rearrange(
        video[:, 1:], "b (f g) (h p) (w q) c -> b f h w (g p q c)", g=FRAMES_PER_LATENT
    )


def _fit_basis(patches, channels, whitening):
    """Principal components of patches [..., D] of canvases as the two matrix products of a codec.

    Returns f32 encode [D, C], bias [C] (latent = patch @ encode + bias), decode [C, D], mean [D]
    (patch = latent @ decode + mean).
    """
    dim = patches.shape[-1]
    x = base.in_255(patches.reshape(-1, dim))
    mean = x.mean(0, dtype=np.float64)
    x -= mean.astype(np.float32)
    covariance = (x.T @ x).astype(np.float64) / len(x)
    gray = np.full((3, 3), 1 / 3)
    metric = np.kron(np.eye(dim // 3), gray + _CHROMA * (np.eye(3) - gray))  # symmetric
    values, vectors = np.linalg.eigh(metric @ covariance @ metric)
    values, vectors = values[::-1][:channels], vectors[:, ::-1][:, :channels]
    # An eigenvector's sign is arbitrary: fix it, or two fits of the same data would differ.
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(channels)])
    deviation = np.sqrt(np.maximum(values, 1e-8))
    scale = deviation**-whitening
    scale /= np.sqrt(np.mean((deviation * scale) ** 2))
    encode = metric @ vectors * scale
    decode = np.linalg.solve(metric, vectors / scale).T
    arrays = {"encode": encode, "bias": -mean @ encode, "decode": decode, "mean": mean}
    return {name: array.astype(np.float32) for name, array in arrays.items()}
