"""Composition root: from a config to the model and its initial parameters."""

import jax.numpy as jnp

from lightwam_jax.models import action, dit, lightwam


def build_model(config):
    """Returns the `LightWAM` module of a `ModelConfig`; no parameters are made."""
    dtype = jnp.dtype(config.dtype)

    layers = len(config.adapter_layers)
    sources = action.resolve_sources(config.sources, config.layer_sources, layers)

    def make(module, **given):  # fields of a module are named as in the config
        names = module.__dataclass_fields__
        same = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return module(**same | dict(dtype=dtype) | given)

    backbone = make(dit.WanDiT)
    expert = make(action.StateFusionActionExpert, layer_sources=sources)
    return lightwam.LightWAM(dit=backbone, expert=expert, dtype=dtype)


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
    return model.init(rng, noisy, jnp.zeros(1), latents, text, proprio, 1)["params"]
