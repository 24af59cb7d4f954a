"""Checks of the pretrained parts: the Wan VAEs, the umT5 encoder, and what is made of prompts."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from converters import umt5
from converters.parity.fixtures import Compare, NotCovered, channels_first, channels_last
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.encoders import umt5 as umt5_lib
from lightwam_jax.encoders import wan
from lightwam_jax.models import t5

# ---- f_vae -------------------------------------------------------------------------------------


def f_vae(fixtures):
    """Encoding and decoding by each VAE of the directory, images and videos."""
    for version in ("wan21", "wan22"):
        name = version.replace("wan", "vae")
        if not fixtures.has(f"f_vae/{name}.npz"):
            continue
        data = fixtures.arrays(f"f_vae/{name}.npz")
        if version in fixtures.vaes:
            yield from _vae(fixtures, name, data, *fixtures.vaes[version])
        else:
            yield NotCovered(f"f_vae/{name}.npz, whose weights are not there")


def _vae(fixtures, name, data, model, tree):
    def run(method, **options):
        function = jax.jit(
            lambda tree, x: model.apply({"params": tree}, x, method=method, **options)
        )
        return lambda x: channels_first(function(tree, channels_last(x)))

    # The policy loads one half of the parameters: each direction must do with its own.
    halves = {method: wan.half(tree, method, jnp.float32) for method in wan.HALVES}
    tree = halves["encode"]
    encode = run("encode")
    got = {"image_latent": encode(data["image"]), "video_latent": encode(data["video"])}
    if "video_mu_unscaled" in data:
        # What the normalisation was applied to: its inverse, not a second compilation.
        mean, std = (np.reshape(x, (-1, 1, 1, 1)) for x in (model.latent_mean, model.latent_std))
        unscaled = got["video_latent"] * std + mean
        got["video_mu_unscaled"] = unscaled[: len(data["video_mu_unscaled"])]
    tree = halves["decode"]
    unclamped = run("decode", clip=False)
    got["decoded_unclamped"] = unclamped(data["latent"])
    got["decoded"] = np.clip(got["decoded_unclamped"], -1, 1)
    got["decoded_1frame"] = run("decode")(data["latent"][:, :, :1])
    for tensor in sorted(data):
        if tensor in got:
            kin = "decoded_unclamped" if tensor.startswith("decoded") else "video_latent"
            noise = fixtures.noise(f"{name}.{tensor}") or fixtures.noise(f"{name}.{kin}")
            yield Compare("f_vae", name)(tensor, got[tensor], data[tensor], noise)
        elif tensor not in ("image", "video", "latent"):
            yield NotCovered(f"f_vae/{name}/{tensor}")


# ---- g_text ------------------------------------------------------------------------------------


def g_text(fixtures):
    """The encoder whole and block by block, its buckets, cleaning, prompts and cache names."""
    if fixtures.has("g_text/encoder.npz"):
        yield from _encoder(fixtures, fixtures.arrays("g_text/encoder.npz"))
    if fixtures.has("g_text/cleaning.json"):
        yield from _cleaning(fixtures.json("g_text/cleaning.json"))
    if fixtures.has("g_text/prompts.json"):
        yield from _prompts(fixtures.json("g_text/prompts.json"))


def _encoder(fixtures, data):
    model, tree = fixtures.text_encoder()
    ids, mask = data["ids"].astype(np.int32), data["mask"].astype(bool)
    run = jax.jit(lambda tree, mask: model.apply({"params": tree}, ids, mask))
    got = {
        "embedding": run(tree, mask),
        "embedding_without_mask": run(tree, None),
        "encode_prompt_context": umt5_lib.encode_ids(model, tree, ids, mask),
        # The release shows attention the zeroed padding too: loss.mask_text_padding=False.
        "encode_prompt_mask": np.ones_like(mask),
        "rel_bucket": _buckets(model, data),
    }
    got.update(_blocks(model, tree, ids, mask, data))
    compare, noise = Compare("g_text", "encoder"), fixtures.noise("g_text.embedding")
    for tensor in sorted(data):
        if tensor in got:
            tolerance = 0.0 if data[tensor].dtype.kind in "bi" else None
            yield compare(tensor, got[tensor], data[tensor], noise, tolerance)
        elif tensor not in ("ids", "mask", "rel_pos"):
            yield NotCovered(f"g_text/encoder/{tensor}")


def _buckets(model, data):
    """The bucket of every recorded distance: one row or column of a table."""
    distance = data.get("rel_pos", np.zeros(1, int))
    table = t5.relative_buckets(np.abs(distance).max() + 1, model.num_buckets, model.max_distance)
    return table[np.maximum(-distance, 0), np.maximum(distance, 0)]


def _blocks(model, tree, ids, mask, data):
    """Each block alone, fed the recorded input, so that an error names its block."""
    positions = t5.relative_buckets(ids.shape[1], model.num_buckets, model.max_distance)
    block = t5.Block(**model.block_fields())
    run = jax.jit(lambda tree, x: block.apply({"params": tree}, x, positions, mask)[0])
    x, got = tree["token_embedding"]["embedding"][ids], {}
    for i in range(model.num_layers):
        got[f"block_{i}"] = run(jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]), x)
        x = data.get(f"block_{i}", got[f"block_{i}"])
    return got


def _cleaning(told):
    modes = dict.fromkeys(mode for case in told["cases"] for mode in case if mode != "raw")
    for mode in modes:
        if mode not in text_lib.CLEANING:
            yield NotCovered(f"g_text/cleaning {mode}")
            continue
        clean = lambda text, mode=mode: text_lib.clean(text, mode)
        wrong = [case["raw"] for case in told["cases"] if clean(case["raw"]) != case[mode]]
        tensor = f"{mode}: texts that differ {wrong or ''}"
        yield Compare("g_text", "cleaning").none(tensor, len(wrong))


def _prompts(told):
    cases, compare = told["cases"], Compare("g_text", "prompts")
    wrong = sum(text_lib.prompt(case["task"], told["template"]) != case["prompt"] for case in cases)
    yield compare.none("prompts that differ", wrong)
    models = {encoder: model for model, encoder in told["cache_ids"].items()}
    wrong = 0
    for case in cases:
        length, encoder = re.search(r"\.t5_len(\d+)\.(\w+)\.pt$", case["cache_file"]).groups()
        wrong += umt5.cache_name(case["prompt"], length, models[encoder]) != case["cache_file"]
    for encoder, model in models.items():
        wrong += not umt5.cache_name("", 1, model).endswith(f".{encoder}.pt")
    yield compare.none("names of cache files that differ", wrong)
