"""Every layout of weight files we read and write: how to know it, its table, its configuration."""

import dataclasses
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

BACKBONE_SIZES = (
    "dim",
    "num_heads",
    "head_dim",
    "ffn_dim",
    "num_layers",
    "text_dim",
    "freq_dim",
    "latent_channels",
)


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


def _vae_config(table):
    return lambda shapes, told: {"vae": wan_vae.model_fields(rules.target_shapes(table, shapes))}


def _t5_config(table):
    def read(shapes, told):
        return {"text_encoder": umt5.model_fields(rules.target_shapes(table, shapes))}

    return read


def _blocks(keys):
    """Number of transformer blocks that keys tell: the highest number and one."""
    found = [int(m[1]) for key in keys if (m := re.search(r"\bblocks?\.(\d+)\.", key))]
    if not found:
        raise KeyError("blocks.0")
    return 1 + max(found)


def _vae(version, name, signature, table):
    return Layout("vae", version, name, signature, table, _vae_config(table))


def _t5(name, signature, table):
    return Layout("t5", "", name, signature, table, _t5_config(table))


LAYOUTS = (
    Layout(
        "lightwam",
        "",
        "official",
        "state_fusion_action_expert.fused_norm.weight",
        lightwam.CHECKPOINT,
        _lightwam_config,
    ),
    Layout("dit", "", "official", "head.modulation", wan_dit.RULES, _dit_config),
    Layout(
        "dit",
        "",
        "diffusers",
        "condition_embedder.time_proj.weight",
        wan_dit.DIFFUSERS,
        _diffusers_dit_config,
    ),
    _vae("wan21", "official", "encoder.downsamples.0.residual.0.gamma", wan_vae.RULES),
    _vae(
        "wan22", "official", "encoder.downsamples.0.downsamples.0.residual.0.gamma", wan_vae.RULES22
    ),
    _vae("wan21", "diffusers", "encoder.down_blocks.0.norm1.gamma", wan_vae.DIFFUSERS),
    _vae("wan22", "diffusers", "encoder.down_blocks.0.resnets.0.norm1.gamma", wan_vae.DIFFUSERS22),
    _t5("official", "token_embedding.weight", umt5.OFFICIAL),
    _t5("huggingface", "encoder.final_layer_norm.weight", umt5.HUGGINGFACE),
)


def detect(keys, name):
    """Returns the `Layout` whose signature is among a file's keys.

    Raises:
      ValueError: none of them is.
    """
    for layout in LAYOUTS:
        if layout.signature in keys:
            return layout
    known = "; ".join(
        f"{layout.kind} {layout.version} ({layout.name}): {layout.signature}" for layout in LAYOUTS
    )
    raise ValueError(
        f"{name}: no layout is known that has keys like {rules.some_of(keys, 3)}; "
        f"expected a file with one of these keys: {known}"
    )


def find(kind, version, name):
    """Returns the `Layout` of a kind and version by its name, for export.

    Raises:
      ValueError: this kind has no such layout.
    """
    there = {
        layout.name: layout
        for layout in LAYOUTS
        if (layout.kind, layout.version) == (kind, version)
    }
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
        flat = params.flatten(
            jax.eval_shape(vae_model(config).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))[
                "params"
            ]
        )
    elif "text_encoder" in config:
        flat = params.flatten(
            jax.eval_shape(
                t5.UMT5Encoder(**config["text_encoder"]).init,
                jax.random.key(0),
                jnp.zeros((1, 2), jnp.int32),
            )["params"]
        )
    else:
        flat = _lightwam_shapes(config["model"])
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    return rules.source_shapes(layout.table, shapes, stacking(config))


def vae_model(config):
    """The VAE module of a checkpoint's config."""
    fields = dict(config["vae"])
    return wan.VAES[fields.pop("version")](**fields)


def _lightwam_shapes(fields):
    """Of the whole model, or of the transformer alone where that is all the fields describe."""
    alone = "action_dim" not in fields
    if alone:
        adapters = fields["adapter_layers"]
        none = {} if adapters else {"adapter_layers": (0,), "adapter_dim": 1}
        config = config_lib.model_variant("tiny", **{**fields, **none})
    else:
        config = config_lib.ModelConfig(**fields)
    model = build.build_model(config)
    flat = params.flatten(
        jax.eval_shape(
            lambda key: params.canonical(build.init_params(model, key, config)), jax.random.key(0)
        )
    )
    if alone:
        flat = {
            path: leaf
            for path, leaf in flat.items()
            if path.startswith("dit/") and (adapters or not path.startswith("dit/adapters_"))
        }
    return flat
