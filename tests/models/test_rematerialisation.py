"""What the policy "linears" keeps and computes again, and that it changes no number."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from lightwam_jax import build, params
from lightwam_jax import config as config_lib

SMALL = dict(num_layers=1, adapter_layers=(0,), lora_layers=(0,), lora_rank=3)


def gradient(remat):
    """The gradient of both passes, as a function of the parameters, and parameters of noise."""
    exact = dict(dtype="float32", frozen_dtype="float32")
    config = base.get_config("tiny", remat=remat, **SMALL | exact)
    config = config_lib.from_config_dict(config).model
    model = build.build_model(config)
    shapes = jax.eval_shape(lambda k: build.init_params(model, k, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    args = (draw(2, 3, 4, 4, 16), jnp.array([600.0, 20.0]), draw(2, 1, 4, 8, 16))
    args += (draw(2, 5, 32), draw(2, 8))
    leaves = {k: 0.1 * draw(*x.shape) for k, x in sorted(params.flatten(shapes).items())}

    def loss(tree):
        velocity, actions = model.apply({"params": tree}, *args, 8)
        return (velocity**2).mean() + (actions**2).mean()

    return jax.value_and_grad(loss), params.unflatten(leaves)


def products(remat):
    """The shapes of the products of linears, and of the others (attention's), all runs counted."""
    run, tree = gradient(remat)
    linears, others = [], []
    for times, eqn in equations(jax.make_jaxpr(run)(tree).jaxpr):
        if eqn.primitive.name == "dot_general":
            batched = eqn.params["dimension_numbers"][1][0]
            (others if batched else linears).extend(times * [eqn.outvars[0].aval.shape])
    return sorted(linears), sorted(others)


def equations(jaxpr, times=1):
    for eqn in jaxpr.eqns:
        yield times, eqn
        runs = times * eqn.params.get("length", 1)
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, runs)


def test_linears_computes_no_product_of_a_linear_again():
    none, linears, full = (products(remat) for remat in ("none", "linears", "full"))
    assert none[0] == linears[0] and len(none[0]) < len(full[0])
    assert len(none[1]) < len(linears[1]) < len(full[1])  # scores again, not their sum over values


def test_linears_gives_loss_and_gradients_of_none():
    (plain, tree), (kept, _) = (gradient(remat) for remat in ("none", "linears"))
    (loss, grads), (loss_kept, grads_kept) = jax.jit(plain)(tree), jax.jit(kept)(tree)
    np.testing.assert_allclose(loss_kept, loss, rtol=1e-6)
    largest = max(jnp.abs(x).max() for x in jax.tree.leaves(grads))
    assert largest > 1e-3
    for path, wanted in params.flatten(grads).items():
        got = params.flatten(grads_kept)[path]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * largest, err_msg=path)
