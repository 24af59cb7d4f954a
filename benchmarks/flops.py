"""FLOPs of a traced function: what its matrix products and convolutions multiply and add.

The compiler's own count (`cost_analysis`) takes the body of a loop once, whatever its length.
"""

import math


def count(jaxpr):
    """Returns the FLOPs of a jaxpr (as in `jax.jit(f).trace(...).jaxpr`), loops in full.

    A multiply-add counts as two. Elementwise work counts as nothing, of the branches of a condition
    the dearest counts, and a loop without a fixed length counts once.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size // features
        elif name == "cond":
            total += max(map(count, params["branches"]))
        else:
            inner = sum(map(count, _jaxprs(params)))
            total += inner * params["length"] if name == "scan" else inner
    return total


def _jaxprs(params):
    """The jaxprs among an equation's parameters: bodies of loops, calls, rematerialised parts."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
