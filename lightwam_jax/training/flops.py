"""FLOPs of a traced function: what its matrix products and convolutions multiply and add.

The compiler's own count (`cost_analysis`) takes the body of a loop once, whatever its length.
"""

import dataclasses
import math
from typing import NamedTuple

import jax

from lightwam_jax import sharding
from lightwam_jax.data import spec
from lightwam_jax.training import step as step_lib


class Product(NamedTuple):
    """A product, convolution or fused attention: how often it runs, and of one run FLOPs and bytes.

    The bytes are those of its operands and its result, each moved once.
    """

    times: int
    flops: int
    bytes: int


def of_step(config):
    """Returns the FLOPs of a training step of a `Config`, of the whole batch.

    They are those of the model, however it is executed: what config.model.remat computes again
    costs time and counts as nothing.
    """
    plain = dataclasses.replace(config.model, remat="none", attention="xla")
    plain = dataclasses.replace(config, model=plain)
    model, optimizer, state = step_lib.state_shapes(plain)
    places = sharding.tree_shardings(sharding.single_device_mesh(), state)
    step = step_lib.make_train_step(model, plain, optimizer, places)
    # The step's own input is what the codec made of the video, if there is any.
    batch = spec.model_batch_spec(plain, plain.train.batch_size)
    return count(jax.jit(step).trace(state, batch).jaxpr)


def count(jaxpr):
    """Returns the FLOPs of a jaxpr (as in `jax.jit(f).trace(...).jaxpr`), loops in full.

    A multiply-add counts as two. Elementwise work counts as nothing, of the branches of a condition
    the dearest counts, and a loop without a fixed length counts once. The body of a
    `jax.shard_map` counts as it stands: for one device.
    """
    return sum(times * work for times, work, _ in products(jaxpr))


def products(jaxpr):
    """Yields the `Product`s of a jaxpr; see `count`."""
    for times, eqn in equations(jaxpr):
        name, result = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            work = 2 * result.size * math.prod(left[i] for i in contracted)
            yield Product(times, work, _bytes(eqn))
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            yield Product(times, 2 * result.size * kernel.size // features, _bytes(eqn))
        elif name.startswith("dot_product_attention"):  # cuDNN's: two products, five backwards
            query, key = (x.aval for x in eqn.invars[:2])
            work = 2 * query.size * key.shape[1] * (5 if "bwd" in name else 2)
            yield Product(times, work, _bytes(eqn))


def equations(jaxpr, times=1):
    """Yields (how often it runs, equation) of a jaxpr; those inside loops and calls too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield times, eqn
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        parts = _jaxprs(eqn.params)
        if eqn.primitive.name == "cond":
            parts = [max(eqn.params["branches"], key=count)]
        for part in parts:
            yield from equations(part, inner)


def _bytes(eqn):
    values = (x.aval for x in (*eqn.invars, *eqn.outvars))
    return sum(value.size * value.dtype.itemsize for value in values)


def _jaxprs(params):
    """The jaxprs among an equation's parameters: bodies of loops, calls, rematerialised parts."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
