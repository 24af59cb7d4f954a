"""Composition root: from a config to the model and its initial parameters."""

import jax
import jax.numpy as jnp

from lightwam_jax.models import action, action_dit, dit, lightwam


def build_model(config):
    """Returns the `LightWAM` module of a `ModelConfig`; no parameters are made."""
    dtype = jnp.dtype(config.dtype)

    def make(module, **given):  # fields of a module are named as in the config
        names = module.__dataclass_fields__
        same = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return module(**same | dict(dtype=dtype) | given)

    attention = attention_implementation(config)
    backbone = make(dit.WanDiT, attention=attention)
    if config.action_head == "flow_dit":
        flow = {
            name: getattr(config, f"flow_{name}")
            for name in ("dim", "ffn_dim", "steps", "shift", "reads")
        }
        expert = make(action_dit.ActionDiT, attention=attention, **flow)
    else:
        layers = len(config.adapter_layers)
        sources = action.resolve_sources(config.sources, config.layer_sources, layers)
        expert = make(action.StateFusionActionExpert, layer_sources=sources)
    return lightwam.LightWAM(dit=backbone, expert=expert, dtype=dtype)


def attention_implementation(config):
    """Returns "xla" or "cudnn": config.attention of a `ModelConfig`, with "auto" resolved.

    "auto" is cuDNN where all devices of this process are NVIDIA GPUs from compute capability 8.0
    on, in bfloat16 and with heads that its kernels take. A program that is compiled for devices
    that are not there gets what the devices that are there would: on a CPU, "xla".
    """
    if config.attention != "auto":
        return config.attention
    heads = config.head_dim % 8 == 0 and config.head_dim <= 128
    fits = config.dtype == "bfloat16" and heads and all(map(_has_cudnn, jax.local_devices()))
    return "cudnn" if fits else "xla"


def _has_cudnn(device):
    major = getattr(device, "compute_capability", "").partition(".")[0]  # of AMD: "gfx..."
    return major.isdigit() and int(major) >= 8


def init_params(model, rng, config):
    """Random float32 parameters in the in-memory layout, for a `ModelConfig`.

    Nested dict of arrays; under `jax.eval_shape`, of shapes, and no memory is touched. The grid
    and batch used here leave no trace in the parameters.
    """
    tokens = config.num_queries if config.pooling == "concat" else 1  # a patch is 2x2
    latents = jnp.zeros((1, 1, 2, 2 * tokens, config.latent_channels))
    noisy = jnp.zeros((1, 2, 2, 2, config.latent_channels))
    text = jnp.zeros((1, 1, config.text_dim))
    proprio = jnp.zeros((1, config.proprio_dim))
    noised = (jnp.zeros((1, 1, config.action_dim)), jnp.zeros(1)) if model.generates else None
    inputs = (noisy, jnp.zeros(1), latents, text, proprio, 1, None, noised)
    return model.init(rng, *inputs)["params"]
