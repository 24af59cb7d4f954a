"""Tiny random weights of the VAEs and of umT5, as the converters would write the real ones."""

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.encoders import wan
from lightwam_jax.models.t5 import UMT5Encoder

VAE = dict(dim=4, num_res_blocks=1)
VAE22 = dict(dim=3, decoder_dim=2, num_res_blocks=1)
T5 = dict(vocab=80, dim=32, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=2)
WORDS = ("put", "the", "red", "blue", "green", "cube", "in", "on", "bowl", "plate", "a", "very")


def random_params(model, *example, seed=0):
    """Random parameters without compiling the initialisers."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    scale = lambda shape: 0.5 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
    draw = lambda s: rng.normal(0, scale(s.shape), s.shape).astype(np.float32)
    return jax.tree.map(draw, shapes)


def save_vae(directory, version="wan21", seed=0, **fields):
    fields = {**(VAE if version == "wan21" else VAE22), **fields}
    model = wan.VAES[version](**fields)
    params = random_params(model, jnp.zeros((1, 5, 16, 16, 3)), seed=seed)
    checkpoint.save_params(directory, params, {"config": {"vae": {"version": version, **fields}}})
    return model, params


def save_tokenizer(directory, end=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def save_t5(directory, end=True, **meta):
    model = UMT5Encoder(**T5)
    params = random_params(model, jnp.zeros((1, 4), jnp.int32))
    assets = save_tokenizer(directory.with_name(directory.name + "_assets"), end)
    meta = meta or {"config": {"text_encoder": T5}}
    checkpoint.save_params(directory, params, meta, assets=assets)
    return model, params


def clips(rows, frames=5, seed=0, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (rows, frames, *size, 3), np.uint8)
