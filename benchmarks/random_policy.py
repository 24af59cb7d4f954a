"""A `Policy` with random weights, and the parts of a call, for the latency benchmark.

Times do not depend on the values of the weights. This file alone uses what is private to `Policy`.
"""

import jax
import numpy as np

from benchmarks import action_pass
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize
from lightwam_jax.encoders import base, text, wan
from lightwam_jax.inference import rows
from lightwam_jax.inference.policy import Policy


class RandomCodec(wan.WanCodec):
    """A Wan VAE whose weights are random instead of read from a file."""

    def __init__(self, config):
        self._config, self.kind = config, config.data.codec
        self.model, self.dtype, self.id = action_pass.vae(config), config.model.dtype, "random"
        self.latent_channels, self.stride = self.model.z_dim, base.STRIDES[self.kind]

    @property
    def image_arrays(self):
        """See `base.Codec`."""
        return action_pass.random(action_pass.shapes(self._config)["codec"])


def make(config):
    """Returns the deployed `Policy` of a `Config`, with random weights made on the device."""
    as_it_is = lambda width: normalize.Normalizer(np.ones(width, "f"), np.zeros(width, "f"))
    assets = assets_lib.Assets(
        as_it_is(config_lib.state_width(config)),
        as_it_is(config_lib.action_width(config)),
        RandomCodec(config),
        text.HashedTextEncoder(config.model.text_dim),
        {},
    )
    weights = action_pass.random(action_pass.deployed(config))
    return Policy(build.build_model(config.model), weights, config, assets, deploy=True)


def parts(policy, observed):
    """Returns {name: function without arguments} of the parts of `policy.act(*observed)`.

    "host": what Python does with the images; "transfer": the images to the device; "canvas",
    "vae", "context", "blocks" (and head): on the device, each a program of its own. Each returns
    what to wait for.
    """
    images, state, prompts = observed
    images, state = policy._check(images, state, prompts)
    *weights, canvas, kept, state = policy._padded(images, state, prompts)
    weights = dict(zip(("policy", "codec"), weights))
    images = {camera: rows.pad(image, len(canvas)) for camera, image in images.items()}
    on_device = jax.device_put(images)
    config = policy.config
    encode = policy.assets.codec.encode_with
    do = action_pass.stages(config, encode)
    encode, to_context, read = (jax.jit(f) for f in (do.encode, do.context, do.read))
    proprio = actions_lib.pad(jax.device_put(state), policy.config.model.proprio_dim)
    latents, kept = encode(weights, canvas), (kept["keys"], kept["values"])
    return {
        "host": lambda: policy._check(*observed)[1],
        "transfer": lambda: jax.device_put(images),
        "canvas": lambda: policy._canvas(on_device),
        "vae": lambda: encode(weights, canvas),
        "context": lambda: to_context(weights, proprio),
        "blocks": lambda: read(weights, latents, kept, proprio),
    }
