"""The deployed policy's arithmetic, canvas to actions, and random weights for it.

For benchmarks that need no checkpoint. It imports the models and nothing that reads files, so that
it runs where Orbax and Grain are not installed. This file alone knows what the deployed form looks
like inside.
"""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax import sharding
from lightwam_jax.inference import folded
from lightwam_jax.inference.deployment import form
from lightwam_jax.models import vae as vae_lib
from lightwam_jax.models.vae22 import Wan22VAE
from lightwam_jax.training import losses
from lightwam_jax.training import step as step_lib

_VAES = {"wan21": vae_lib.WanVAE, "wan22": Wan22VAE}  # by config.data.codec
_TINY_DATA = dict(canvas=(32, 64), camera_size=(), text_len=24)


def config_of(config, **changes):
    """Returns the `Config` of a ConfigDict, with fake data and values changed by their path.

    Args:
      changes: {"model.remat": value}; with tiny=True, the smallest model and canvas first.
    """
    config.data.source = "fake"
    if changes.pop("tiny", False):
        kept = ("action_dim", "proprio_dim", "action_head", "flow_steps", "flow_reads")
        kept = {name: config.model[name] for name in kept}
        config.model.update(config_lib.defaults("tiny", **kept)["model"])
        config.data.update(_TINY_DATA)
        config.loss.downsample = 1
    config.update_from_flattened_dict(changes)
    return config_lib.from_config_dict(config)


def shapes(config):
    """Returns {"policy", "codec"}: ShapeDtypeStructs of the deployed weights, as they are kept."""
    codec = vae(config)
    clip = jax.ShapeDtypeStruct((1, 1, *config.data.canvas, 3), jnp.float32)
    encoder = jax.eval_shape(
        lambda x: vae_lib.still_params(codec.init(jax.random.key(0), x, method="encode")["params"]),
        clip,
    )
    kept = lambda x: jax.ShapeDtypeStruct(x.shape, codec.dtype)
    return {"policy": deployed(config), "codec": jax.tree.map(kept, encoder)}


def vae(config):
    """Returns the VAE of a config, in the compute dtype of its model: a thin one of a tiny one."""
    width = {"dim": 16} if config.model.variant == "tiny" else {}
    return _VAES[config.data.codec](dtype=jnp.dtype(config.model.dtype), **width)


def of_config(config):
    """Returns the `stages` of a config, with its VAE."""
    codec = vae(config)

    def encode(arrays, video):
        return codec.apply({"params": arrays}, (video - 0.5) / 0.5, method="encode")

    return stages(config, encode)


def stages(config, encode_with):
    """Returns the parts of a deployed policy as pure functions of its weights (see `shapes`).

    Args:
      config: `Config`. encode_with: of its codec.

    Returns:
      a namespace of functions
        encode(weights, canvas [B,H,W,3] in 0..1) -> latents,
        remember(weights, text [B,L,dim]) -> what is kept of an instruction,
        context(weights, state [B,P]) -> what a state adds to it,
        read(weights, latents, kept, state) -> actions [B,T,A]: that, the blocks and the head,
        act(weights, canvas, kept, state) -> actions: all but `remember`.
    """

    model_config, deployed_as = config.model, form(config.model)

    def encode(weights, canvas):
        return encode_with(weights["codec"], canvas[:, None])

    def remember(weights, text):
        return deployed_as.keys_values(weights["policy"], text, model_config)

    def context(weights, state):
        row = folded.linear(weights["policy"]["proprio"], state)[:, None]
        return deployed_as.keys_values(weights["policy"], row, model_config)

    def read(weights, latents, kept, state):
        inputs = [weights["policy"], latents, kept, None, state, model_config]
        if model_config.generates:
            rows = (len(latents),)
            inputs += [False, losses.plan_noise(jax.random.key(0), latents.shape, config, rows)]
        return deployed_as.act(*inputs)[0]

    def act(weights, canvas, kept, state):
        return read(weights, encode(weights, canvas), kept, state)

    return types.SimpleNamespace(
        encode=encode, remember=remember, context=context, read=read, act=act
    )


def inputs(config, rows):
    """Returns (canvas, text, state) as ShapeDtypeStructs of `rows` rows."""
    data, model = config.data, config.model
    return (
        jax.ShapeDtypeStruct((rows, *data.canvas, 3), jnp.float32),
        jax.ShapeDtypeStruct((rows, data.text_len, model.text_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, model.proprio_dim), jnp.float32),
    )


def deployed(config):
    """Returns the ShapeDtypeStructs of the deployed weights of a config's model."""
    _, _, state = step_lib.state_shapes(config)
    whole, horizon = params_lib.merge(state.trainable, state.frozen), config.data.action_horizon
    fold = form(config.model).deployed
    return jax.eval_shape(lambda params: fold(params, config.model, horizon), whole)


# ---- random weights ----------------------------------------------------------------------------


def random(shapes):
    """Returns arrays of `shapes`, made on the device: norms are ones, products keep magnitudes."""
    pairs = jax.tree_util.tree_flatten_with_path(shapes)[0]
    leaves = [_leaf(jax.tree_util.keystr(path), x, i) for i, (path, x) in enumerate(pairs)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def random_batch(shapes, seed=0):
    """Returns {name: array} of a training batch: small normal values; nothing is padded."""
    rng = np.random.default_rng(seed)
    fill = lambda x: (
        rng.normal(0, 0.3, x.shape).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else np.zeros(x.shape, x.dtype)
    )
    return jax.tree.map(fill, shapes)


def training(config):
    """Returns (jitted step, state, batch) of a training step on one device; the state is random."""
    model, optimizer, shapes = step_lib.state_shapes(config)
    places = sharding.tree_shardings(sharding.single_device_mesh(), shapes)
    step = step_lib.make_train_step(model, config, optimizer, places)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    learns = random(shapes.trainable)
    state = zeros(shapes.replace(trainable=None, frozen=None, ema=None)).replace(
        trainable=learns,
        frozen=random(shapes.frozen),
        ema=shapes.ema and jax.tree.map(jnp.copy, learns),
    )
    batch = jax.device_put(random_batch(step_lib.batch_shapes(config)))
    return step_lib.jit_train_step(step, places), jax.device_put(state, places), batch


def _leaf(name, x, number):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    if re.search("scale|gamma|norm", name) and "bias" not in name:
        return jnp.ones(x.shape, x.dtype)
    terms = math.prod(x.shape[:-1]) if len(x.shape) > 3 else x.shape[-2] if len(x.shape) > 1 else 1
    size = 0.5 * terms**-0.5 if len(x.shape) > 1 else 0.02
    return _maker(x.shape, jnp.dtype(x.dtype), size)(number)


@functools.cache
def _maker(shape, dtype, deviation):
    """A jitted function of a number: pseudo-random values, by a hash cheaper than a generator."""

    def make(number):
        index = jax.lax.iota(jnp.uint32, math.prod(shape)) + number * jnp.uint32(40503)
        hashed = (index * jnp.uint32(2654435761)).astype(jnp.float32) * 2.0**-32
        return ((hashed - 0.5) * (12**0.5 * deviation)).astype(dtype).reshape(shape)

    return jax.jit(make)
