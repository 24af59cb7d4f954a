"""A `Policy` with random weights, and the parts of a call, for the latency benchmark.

Times do not depend on the values of the weights. This file alone uses what is private to `Policy`.
"""

import dataclasses
import functools

import jax
import numpy as np

from benchmarks import action_pass
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize
from lightwam_jax.encoders import base, text, wan
from lightwam_jax.inference.policy import Policy


class RandomCodec(wan.WanCodec):
    """A Wan VAE whose weights are random instead of read from a file."""

    def __init__(self, config):
        self._config, self.kind = config, config.data.codec
        self.model, self.dtype, self.id = action_pass.vae(config), config.model.dtype, "random"
        self.latent_channels, self.stride = self.model.z_dim, base.STRIDES[self.kind]

    @functools.cached_property
    def arrays(self):
        return action_pass.random(action_pass.shapes(self._config)["codec"])


def make(config):
    """Returns the deployed `Policy` of a `Config`, with random weights made on the device."""
    model_config, shapes = action_pass.deployed(config)
    as_it_is = lambda width: normalize.Normalizer(np.ones(width, "f"), np.zeros(width, "f"))
    assets = assets_lib.Assets(
        as_it_is(config_lib.state_width(config)),
        as_it_is(config_lib.action_width(config)),
        RandomCodec(config),
        text.HashedTextEncoder(config.model.text_dim),
        {},
    )
    config = dataclasses.replace(config, model=model_config)
    return Policy(build.build_model(model_config), action_pass.random(shapes), config, assets)


def parts(policy, observed):
    """Returns {name: function without arguments} of the parts of `policy.act(*observed)`.

    "canvas": on the host; "transfer": of what the host made to the device; "vae", "context",
    "blocks" (and head): on the device, each a program of its own. Each returns what to wait for.
    """
    images, state, prompts = observed
    canvas, state = policy._check(images, state, prompts)
    *weights, canvas, context, _, state = policy._padded(canvas, state, prompts)
    host = (canvas, context, state)
    on_device = jax.device_put(host)
    weights = dict(zip(("policy", "codec"), weights))
    do = action_pass.stages(
        policy.model, policy.assets.codec.encode_with, policy.config.data.action_horizon
    )
    encode, to_context, read = (jax.jit(f) for f in (do.encode, do.context, do.read))
    proprio = actions_lib.pad(on_device[2], policy.config.model.proprio_dim)
    latents = encode(weights, on_device[0])
    seen = to_context(weights, on_device[1], proprio)
    return {
        "canvas": lambda: policy._check(images, state[: len(prompts)], prompts)[0],
        "transfer": lambda: jax.device_put(host),
        "vae": lambda: encode(weights, on_device[0]),
        "context": lambda: to_context(weights, on_device[1], proprio),
        "blocks": lambda: read(weights, latents, seen),
    }
