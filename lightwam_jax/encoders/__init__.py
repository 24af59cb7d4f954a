"""Images and words to what the backbone reads: latent codecs and text encoders, by name."""

import json
import os

import numpy as np

from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib


def load_codec(directory):
    """Returns the `Codec` saved in `directory`.

    Raises:
      FileNotFoundError: no codec there; says how to make one.
      ValueError: unknown kind, or arrays that are not the ones codec.json describes.
    """
    path = os.path.join(directory, "codec.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path} is missing; make it with: "
            "python -m lightwam_jax.precompute --config CONFIG --what latents"
        )
    with open(path) as f:
        description = json.load(f)
    if description["kind"] not in encoders_base.STRIDES:
        raise ValueError(
            f"{path}: codec kind {description['kind']!r} is unknown; known kinds: "
            f"{', '.join(map(repr, encoders_base.STRIDES))}"
        )
    if description["kind"] != "pca":
        from lightwam_jax.encoders import (
            wan,  # imports the models, which the PCA codec does not need
        )

        return wan.WanCodec.load(directory, description)
    with np.load(os.path.join(directory, "codec.npz")) as stored:
        codec = pca.PcaCodec(dict(stored))
    if codec.id != description["id"]:
        raise ValueError(
            f"{directory}/codec.npz is {codec.id}, codec.json says {description['id']}: one of "
            f"them was replaced; delete {directory} and run python -m lightwam_jax.precompute "
            "--config CONFIG --what latents"
        )
    return codec


def make_text_encoder(kind, dim, weights="", cache=None):
    """Returns the `TextEncoder` of config.data.text_encoder with rows of config.model.text_dim.

    Args:
      kind, dim: those two keys.
      weights: config.data.text_weights; read when the first prompt is encoded.
      cache: `TextCache` of prompts encoded already; with one, the weights may be absent, and
        leave memory after every new prompt.

    Raises:
      ValueError, FileNotFoundError: unknown kind, or not the weights of such an encoder.
    """
    if kind == "hashed":
        return text_lib.HashedTextEncoder(dim)
    if kind != "umt5":
        raise ValueError(
            f"config.data.text_encoder={kind!r} has no encoder here; known encoders: "
            "'umt5', 'hashed'"
        )
    if cache is not None and not os.path.isdir(weights):
        return text_lib.AbsentTextEncoder(dim, cache.encoder_id, weights)
    from lightwam_jax.encoders import umt5  # imports the models, which other encoders do not need

    encoder = umt5.UMT5TextEncoder(weights, keep=cache is None)
    if encoder.dim != dim:
        raise ValueError(
            f"config.data.text_weights={weights!r} gives rows of width {encoder.dim}, "
            f"config.model.text_dim is {dim}"
        )
    return encoder
