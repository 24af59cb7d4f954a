"""Attention on even lengths, as cuDNN trains it; its own kernels run where a GPU is (`-m gpu`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.models import layers
from lightwam_jax.training import flops

TEXT = 128  # rows in the release; the state's is the 129th


@pytest.fixture
def any_device_has_cudnn(monkeypatch):
    """What JAX asks of the devices before it traces cuDNN's attention."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def draw(queries, keys, dtype=jnp.float32, width=8):
    """q, k, v of two rows and two heads, and a mask that hides some keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 2, width)) for n in (queries, keys, keys))
    seen = np.arange(keys) % 3 > 0
    return *(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.asarray([seen, ~seen])


def value_and_grad(attend, q, k, v, mask, implementation):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def weighted(q, k, v):
        out = attend(q, k, v, mask, implementation)
        assert out.shape == q.shape and out.dtype == q.dtype
        return (out.astype(jnp.float32) * weights).sum()

    return jax.value_and_grad(weighted, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("queries, keys, masked", [(5, 7, True), (5, 7, False), (5, 6, False)])
def test_even_lengths_change_no_number(queries, keys, masked):
    *qkv, mask = draw(queries, keys)
    mask = mask if masked else None
    plain, even = (
        value_and_grad(attend, *qkv, mask, "xla")
        for attend in (layers.attention, layers.even_attention)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain, even)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_differentiates_129_context_rows(masked, any_device_has_cudnn):
    *qkv, mask = draw(6, TEXT + 1, jnp.bfloat16)
    mask = mask if masked else None
    trace = lambda attend: jax.make_jaxpr(
        lambda *qkv: value_and_grad(attend, *qkv, mask, "cudnn")[1]
    )(*qkv)
    lengths = key_lengths(trace(layers.attention).jaxpr)
    assert set(lengths) == {TEXT + 2} and len(lengths) >= 2  # forwards and backwards

    def as_it_is(q, k, v, mask, implementation):
        mask = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    refused = (ValueError, "same seq length") if masked else (NotImplementedError, "KV 129")
    with pytest.raises(refused[0], match=refused[1]):
        trace(as_it_is)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_the_model_with_cudnn_traces(masked, any_device_has_cudnn):
    one = dict(num_layers=1, adapter_layers=(0,), lora_layers=(0,))
    config = config_lib.model_variant("tiny", attention="cudnn", remat="linears", **one)
    model = build.build_model(config)
    tree = jax.eval_shape(lambda key: build.init_params(model, key, config), jax.random.key(0))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    mask = jax.ShapeDtypeStruct((2, TEXT), bool) if masked else None
    args = (shape(2, 3, 4, 4, 16), shape(2), shape(2, 1, 4, 4, 16))
    args += (shape(2, TEXT, config.text_dim), shape(2, 8))

    def loss(tree, args, mask):
        velocity, actions = model.apply({"params": tree}, *args, 8, mask)
        return velocity.sum() + actions.sum()

    lengths = key_lengths(jax.make_jaxpr(jax.grad(loss))(tree, args, mask).jaxpr)
    assert TEXT + 2 in lengths and not any(length % 2 for length in lengths)


def test_fused_attention_counts_like_its_products(any_device_has_cudnn):
    *qkv, _ = draw(6, 8, jnp.bfloat16)
    attend = lambda implementation: lambda *qkv: layers.attention(*qkv, None, implementation)
    fused, plain = (flops.count(jax.make_jaxpr(attend(i))(*qkv)) for i in ("cudnn", "xla"))
    assert fused == plain == 2 * (2 * 2 * 2 * 6 * 8 * 8)
    both = jax.make_jaxpr(lambda *qkv: value_and_grad(layers.attention, *qkv, None, "cudnn"))(*qkv)
    assert flops.count(both) == plain * 7 // 2  # it computes the scores again


def key_lengths(jaxpr):
    """The keys' lengths of every call of cuDNN's attention, those of inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("dot_product_attention"):
            found.append(eqn.invars[1].aval.shape[1])
            continue
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                found += key_lengths(inner) if hasattr(inner, "eqns") else []
    return found


class Device:
    def __init__(self, platform, **has):
        self.platform = platform
        vars(self).update(has)


@pytest.mark.parametrize(
    "devices, changes, chosen",
    [
        ([Device("gpu", compute_capability="9.0")] * 2, {}, "cudnn"),
        ([Device("gpu", compute_capability="8.0")], {}, "cudnn"),
        ([Device("gpu", compute_capability="10.0")], {}, "cudnn"),
        ([Device("gpu", compute_capability="7.5")], {}, "xla"),
        ([Device("gpu", compute_capability="gfx942")], {}, "xla"),
        ([Device("cpu")], {}, "xla"),
        ([Device("tpu"), Device("tpu")], {}, "xla"),
        ([Device("gpu", compute_capability="9.0")], {"dtype": "float32"}, "xla"),
        ([Device("gpu", compute_capability="9.0")], {"head_dim": 20}, "xla"),
        ([Device("gpu", compute_capability="9.0")], {"attention": "xla"}, "xla"),
        ([Device("cpu")], {"attention": "cudnn"}, "cudnn"),
    ],
)
def test_auto_is_cudnn_where_it_can_be(devices, changes, chosen, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    config = config_lib.model_variant("tiny", **changes)
    assert build.attention_implementation(config) == chosen
    assert build.build_model(config).dit.attention == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries, keys", [(98, 129), (294, 294)])
def test_cudnn_agrees_with_xla(queries, keys, masked):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu on one")
    *qkv, mask = draw(queries, keys, jnp.bfloat16, width=128)
    mask = mask if masked else None
    xla, fused = (value_and_grad(layers.attention, *qkv, mask, i) for i in ("xla", "cudnn"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), atol=0.02 * np.abs(np.float32(a)).max()
        ),
        xla,
        fused,
    )
