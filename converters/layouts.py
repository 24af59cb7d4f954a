"""Every layout of weight files we read and write: how to know it, its table, its configuration."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from converters import lightwam, rules, umt5, wan_dit, wan_vae
from lightwam_jax import build, params
from lightwam_jax import config as config_lib
from lightwam_jax.encoders import wan
from lightwam_jax.models import t5, variants

BACKBONE_SIZES = ("dim", "num_heads", "head_dim", "ffn_dim", "num_layers")
BACKBONE_SIZES += ("text_dim", "freq_dim", "latent_channels")


class Layout(NamedTuple):
    """One way of naming the tensors of one model.

    Attributes:
      kind: "dit", "vae", "t5" or "lightwam": the converter's command.
      version: "wan21" or "wan22" of a VAE; "" elsewhere.
      name: "official", "diffusers" or "huggingface".
      signature: a key that all files of this layout have and those of no other.
      table: rows of `rules.py`.
      read_config: function (shapes {key: shape}, told) -> the checkpoint's config.
    """

    kind: str
    version: str
    name: str
    signature: str
    table: tuple
    read_config: Callable


# ---- configurations, read from keys and shapes ---------------------------------------------------


def _lightwam_config(shapes, told):
    return {"model": dataclasses.asdict(lightwam.model_config(shapes, **told))}


def _dit_config(shapes, told):
    return {"model": wan_dit.model_fields(shapes, told.get("head_dim"))}


def _diffusers_dit_config(shapes, told):
    """Through the official names: both tables lead to the same paths."""
    targets = rules.target_shapes(wan_dit.DIFFUSERS, shapes)
    layers = {"block": range(_blocks(shapes))}
    return _dit_config(rules.source_shapes(wan_dit.BASE, targets, layers), told)


def _vae_config(table, shapes, told):
    return {"vae": wan_vae.model_fields(rules.target_shapes(table, shapes))}


def _t5_config(table, shapes, told):
    return {"text_encoder": umt5.model_fields(rules.target_shapes(table, shapes))}


def _blocks(keys):
    """Number of transformer blocks that keys tell: the highest number and one."""
    found = [int(m[1]) for key in keys if (m := re.search(r"\bblocks?\.(\d+)\.", key))]
    if not found:
        raise KeyError("blocks.0")
    return 1 + max(found)


def _lightwam(signature, table):
    return Layout("lightwam", "", "official", signature, table, _lightwam_config)


def _dit(name, signature, table, read_config):
    return Layout("dit", "", name, signature, table, read_config)


def _vae(version, name, signature, table):
    read_config = functools.partial(_vae_config, table)
    return Layout("vae", version, name, signature, table, read_config)


def _t5(name, signature, table):
    return Layout("t5", "", name, signature, table, functools.partial(_t5_config, table))


_TIME_PROJECTION = "condition_embedder.time_proj.weight"
_FIRST_GAMMA22 = "encoder.downsamples.0.downsamples.0.residual.0.gamma"
LAYOUTS = (
    _lightwam("state_fusion_action_expert.fused_norm.weight", lightwam.CHECKPOINT),
    _lightwam("mot.mixtures.action.head.weight", lightwam.CHECKPOINT),
    _dit("official", "head.modulation", wan_dit.RULES, _dit_config),
    _dit("diffusers", _TIME_PROJECTION, wan_dit.DIFFUSERS, _diffusers_dit_config),
    _vae("wan21", "official", "encoder.downsamples.0.residual.0.gamma", wan_vae.RULES),
    _vae("wan22", "official", _FIRST_GAMMA22, wan_vae.RULES22),
    _vae("wan21", "diffusers", "encoder.down_blocks.0.norm1.gamma", wan_vae.DIFFUSERS),
    _vae("wan22", "diffusers", "encoder.down_blocks.0.resnets.0.norm1.gamma", wan_vae.DIFFUSERS22),
    _t5("official", "token_embedding.weight", umt5.OFFICIAL),
    _t5("huggingface", "encoder.final_layer_norm.weight", umt5.HUGGINGFACE),
)


def detect(keys, name):
    """Returns the `Layout` whose signature is among a file's keys.

    Raises:
      UnknownLayout: none of them is.
    """
    for layout in LAYOUTS:
        if layout.signature in keys:
            return layout
    known = "; ".join(f"{x.kind} {x.version} ({x.name}): {x.signature}" for x in LAYOUTS)
    raise rules.UnknownLayout(
        f"{name}: no layout is known that has keys like {rules.some_of(keys, 3)}; "
        f"expected a file with one of these keys: {known}"
    )


def find(kind, version, name):
    """Returns the `Layout` of a kind and version by its name, for export.

    Raises:
      ValueError: this kind has no such layout.
    """
    there = {x.name: x for x in LAYOUTS if (x.kind, x.version) == (kind, version)}
    if name not in there:
        raise ValueError(
            f"--layout {name}: a {kind} {version} checkpoint can be written as {' or '.join(there)}"
        )
    return there[name]


# ---- what a complete file holds ------------------------------------------------------------------


def stacking(config):
    """The indices that the arrays of a config's model are stacked over, for `rules`."""
    if "text_encoder" in config:
        return {"block": range(config["text_encoder"]["num_layers"])}
    if "model" in config:
        fields = config["model"]
        return wan_dit.stacked_layers(fields["num_layers"], fields["lora_layers"])
    return {}


def of_variant(config, name):
    """The config with the backbone sizes of a variant (`models/variants.py`).

    Raises:
      ValueError: unknown variant, or a model that has none.
    """
    if "model" not in config or name not in variants.VARIANTS:
        raise ValueError(
            f"--variant {name}: expected one of {', '.join(variants.VARIANTS)}, for "
            "a dit or lightwam file"
        )
    sizes = {key: variants.VARIANTS[name][key] for key in BACKBONE_SIZES}
    return {**config, "model": {**config["model"], **sizes}}


def expected_shapes(layout, config):
    """{source key: shape} of a complete file, for a layout and the config read from it."""
    if "vae" in config:
        shapes = _shapes(vae_model(config).init, jnp.zeros((1, 1, 16, 16, 3)))
    elif "text_encoder" in config:
        encoder = t5.UMT5Encoder(**config["text_encoder"])
        shapes = _shapes(encoder.init, jnp.zeros((1, 2), jnp.int32))
    elif "action_dim" in config["model"]:
        shapes = model_shapes(config_lib.ModelConfig(**config["model"]))
    else:
        shapes = _dit_shapes(config["model"])
    return rules.source_shapes(layout.table, shapes, stacking(config))


def vae_model(config):
    """The VAE module of a checkpoint's config."""
    fields = dict(config["vae"])
    return wan.VAES[fields.pop("version")](**fields)


def model_shapes(config):
    """{path: shape} of the canonical parameters of a `ModelConfig`'s whole model."""
    model = build.build_model(config)
    init = lambda key: {"params": params.canonical(build.init_params(model, key, config))}
    return _shapes(init)


def _dit_shapes(fields):
    """Those of the transformer alone, with the adapters that its fields tell."""
    given, start = dict(fields), "dit/"
    if not fields["adapter_layers"]:  # a model without adapters cannot be built
        given.update(adapter_layers=(0,), adapter_dim=1)
        start = "dit/(?!adapters_)"
    shapes = model_shapes(config_lib.model_variant("tiny", **given))
    return {path: shape for path, shape in shapes.items() if re.match(start, path)}


def _shapes(init, *args):
    """{path: shape} of the parameters that an initialisation makes."""
    made = jax.eval_shape(init, jax.random.key(0), *args)
    return rules.shapes_of(params.flatten(made["params"]))
