"""From images and words to what the backbone reads: latent codecs and text encoders, by name."""

import os

from lightwam_jax import atomic
from lightwam_jax.encoders import base, pca, text

# wan.py and umt5.py are imported where they are used: they import the models, which the PCA codec
# and the hashed text encoder do not need.


def load_codec(directory):
    """Returns the `Codec` saved in `directory`.

    Raises:
      FileNotFoundError: no codec there; says how to make one.
      ValueError: unknown kind, or weights that are not the ones codec.json describes.
    """
    make = "python -m lightwam_jax.precompute --config CONFIG --what latents"
    path = os.path.join(directory, "codec.json")
    redo = f"restore it, or delete {directory} and run {make}"
    description = atomic.read_json(path, {"kind": str, "id": str}, redo)
    if description is None:
        raise FileNotFoundError(f"{path} is missing; make it with: {make}")
    kind = description["kind"]
    if kind not in base.STRIDES:
        raise ValueError(
            f"{path}: codec kind {kind!r} is unknown; known kinds: "
            f"{', '.join(map(repr, base.STRIDES))}"
        )
    if kind == "pca":
        try:
            codec = pca.PcaCodec.load(directory)
        except ValueError as error:
            raise ValueError(f"{error}; {redo}") from error
    else:
        from lightwam_jax.encoders import wan

        atomic.check_json(description, {"dtype": str}, path, redo)
        codec = wan.WanCodec(os.path.join(directory, "weights"), kind, description["dtype"])
    if codec.id != description["id"]:
        raise ValueError(
            f"the weights in {directory} are {codec.id}, codec.json says {description['id']}: one "
            f"of them was replaced; restore it, or delete {directory} and run {make}"
        )
    return codec


def check_weights(config, steps, assets):
    """Raises where weights are not there that a step of precompute will read, hours later perhaps.

    Args:
      steps: of "stats", "text", "latents". assets: directory; what it holds needs no weights.

    Raises:
      ValueError, FileNotFoundError: says which converter makes them.
    """
    have = lambda name: os.path.exists(os.path.join(assets, name))
    read = []
    copied = "latents" in steps and config.codec in base.STRIDES and config.codec != "pca"
    if copied and (config.codec_weights or not have("codec")):
        read.append((config.codec_weights, "vae", "data.codec_weights", "vae"))
    if "text" in steps and config.text_encoder == "umt5" and not have("text"):
        read.append((config.text_weights, "text_encoder", "data.text_weights", "t5"))
    if read:
        from lightwam_jax.encoders import converted

        for weights in read:
            converted.open_converted(*weights)


def make_text_encoder(kind, dim, weights="", cache=None):
    """Returns the `TextEncoder` of config.data.text_encoder with rows of config.model.text_dim.

    Args:
      kind, dim: those two keys.
      weights: config.data.text_weights; read when the first prompt is encoded.
      cache: `TextCache` of prompts encoded already. With one, the weights may be absent, and they
        leave memory after every new prompt.

    Raises:
      ValueError, FileNotFoundError: unknown kind, or not the weights of such an encoder.
    """
    if kind == "hashed":
        return text.HashedTextEncoder(dim)
    if kind != "umt5":
        raise ValueError(
            f"config.data.text_encoder={kind!r} has no encoder here; known encoders: "
            "'umt5', 'hashed'"
        )
    if cache is not None and not os.path.isdir(weights):
        return text.AbsentTextEncoder(dim, cache.encoder_id, weights)
    from lightwam_jax.encoders import umt5

    encoder = umt5.UMT5TextEncoder(weights, keep=cache is None)
    if encoder.dim != dim:
        raise ValueError(
            f"config.data.text_weights={weights!r} gives rows of width {encoder.dim}, "
            f"config.model.text_dim is {dim}"
        )
    return encoder
