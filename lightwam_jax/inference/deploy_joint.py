"""The deployed form of a policy whose actions read the frames that it imagines; see `deploy.py`.

The same actions as `LightWAM.act`. Every block runs on the whole clip at every step of the solver,
and its modulation changes from step to step. So little can be made beforehand: LoRA is merged, the
weights have the compute dtype, and keys and values of the context are made once for all steps, of
the text once per instruction.

Letters as in `deploy.py`; n are the blocks of a stream.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lightwam_jax import build
from lightwam_jax.inference import folded
from lightwam_jax.models import dit, lightwam, lora


def deployed(params, config, horizon):
    """As `deploy.deployed`; the horizon is that of the noise that `act` is given."""
    del horizon

    @jax.jit  # one program: casts and merges of many small arrays
    def fold(params):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return jax.tree.map(
            lambda x: x.astype(config.dtype), lora.merge_lora(wide, config.lora_alpha)
        )

    with jax.default_matmul_precision("highest"):
        merged = fold(params)
    return {"proprio": merged.pop("proprio_encoder"), **merged}


def _apply(weights, config, method, *inputs):
    """A function of the model without LoRA, whose parameters the weights are."""
    model = build.build_model(dataclasses.replace(config, lora_rank=0))
    params = {"dit": weights["dit"], "expert": weights["expert"]}
    return model.apply({"params": params}, *inputs, method=method)


def keys_values(weights, rows, config):
    """Raw context rows [B,L,text_dim] -> keys and values of all blocks, [2n,B,L,N,K] each.

    The video's first.
    """

    def both(model, rows):
        return [*model.encode_context(rows).keys_values.values(), model.encode_action_context(rows)]

    parts = _apply(weights, config, both, rows)
    return tuple(jnp.concatenate(pair) for pair in zip(*parts))


def act(weights, latents, text, mask, proprio, config, taps=False, noise=None):
    """As `deploy.act`, from noise of video and actions; there is no attention to return."""
    del taps
    keys, values, mask = folded.with_state(keys_values, weights, text, mask, proprio, config)
    runs = dit.segments(config.num_layers, config.adapter_layers, config.lora_layers)
    of_run = lambda run: (keys[run.start : run.stop], values[run.start : run.stop])
    context = lightwam.Context({run.name: of_run(run) for run in runs}, mask)
    own = keys[config.num_layers :], values[config.num_layers :]
    inputs = latents, noise, context, own
    return _apply(weights, config, "imagine_and_act", *inputs)[0], {}
