"""What the config says about execution reaches the program: seen in traces, nothing is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.models import adapters, dit, layers, lora

ONE = dict(num_layers=1, adapter_layers=(0,), lora_layers=(0,))  # traces of one block are quick


def make(**overrides):
    config = config_lib.from_config_dict(base.get_config("tiny", **overrides)).model
    model = build.build_model(config)
    tree = jax.eval_shape(lambda key: build.init_params(model, key, config), jax.random.key(0))
    return config, model, tree


def traced(model, tree):
    """The equations of both passes of a training step, those of inner programs included."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    x = shape(2, 3, 4, 4, 16)
    args = (x, shape(2), shape(2, 1, 4, 4, 16), shape(2, 5, 32), shape(2, 8))
    run = lambda tree, *args: model.apply({"params": tree}, *args, 8)
    jaxpr = jax.make_jaxpr(run)(tree, *args)
    assert all(out.dtype == jnp.float32 for out in jaxpr.out_avals)
    return list(equations(jaxpr.jaxpr))


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_in_bfloat16_what_must_be_exact_is_float32():
    _, model, tree = make(dtype="bfloat16", **ONE)
    found = traced(model, tree)
    exact = ("exp", "tanh", "logistic", "rsqrt", "sqrt", "cos", "sin", "reduce_sum", "cumsum")
    wrong = [e for e in found if e.primitive.name in exact and e.invars[0].aval.dtype != "float32"]
    assert not wrong, wrong
    assert {e.primitive.name for e in found} >= {"exp", "tanh", "logistic", "rsqrt", "cos"}
    products = [e for e in found if e.primitive.name == "dot_general"]
    full = [e for e in products if e.invars[0].aval.dtype == jnp.float32]
    # The timestep's path in both passes, three each, and the video head; in any order.
    assert len(full) == 7


@pytest.mark.parametrize("remat, policy", [("full", None), ("dots", True), ("linears", True)])
def test_rematerialisation_and_unrolling_are_as_configured(remat, policy):
    _, model, tree = make(remat=remat, scan_unroll=3, **ONE)
    found = traced(model, tree)
    kept = [e for e in found if e.primitive.name in ("checkpoint", "remat2", "remat")]
    assert kept
    for eqn in kept:
        assert (eqn.params["policy"] is not None) == bool(policy)
        assert not eqn.params["prevent_cse"]
    scans = [e for e in found if e.primitive.name == "scan"]
    assert scans and all(e.params["unroll"] == 3 for e in scans)


def test_attention_is_done_as_configured_and_never_with_a_mask(monkeypatch):
    asked, original = [], jax.nn.dot_product_attention

    def attention(q, k, v, mask=None, implementation=None, key_value_seq_lengths=None):
        asked.append((implementation, mask, q.dtype, k.dtype, v.dtype))
        return original(q, k, v, mask=mask)

    monkeypatch.setattr(layers.jax.nn, "dot_product_attention", attention)
    _, model, tree = make(attention="cudnn", dtype="bfloat16", **ONE)
    asked.clear()  # by the initialisation, whose single token is padded
    traced(model, tree)
    assert set(asked) == {("cudnn", None, *3 * (jnp.dtype("bfloat16"),))}


def test_every_field_of_the_config_reaches_its_module():
    odd = dict(
        dim=24,
        num_heads=1,
        head_dim=12,
        ffn_dim=20,
        eps=0.25,
        attention_mask="per_frame_causal",
        gate_init=0.5,
        lora_rank=3,
        lora_alpha=7.0,
        lora_layers=(1, 2),
        lora_targets=("ffn.0", "self_attn.q"),
        adapter_layers=(1, 3),
        adapter_dim=5,
        adapter_scale=0.75,
        query_init=0.5,
        merge_dim=6,
        merge_slots=3,
        sources=("delta", "backbone"),
        scan_unroll=2,
        remat="dots",
        dtype="float32",
    )
    config, model, tree = make(**odd)
    for module in (model.dit, model.expert):
        for field in dataclasses.fields(module):
            if hasattr(config, field.name) and field.name not in ("dtype", "layer_sources"):
                wanted = "xla" if field.name == "attention" else getattr(config, field.name)
                assert getattr(module, field.name) == wanted, field.name
        assert module.dtype == model.dtype == jnp.float32
    assert model.expert.layer_sources == (("delta", "backbone"),) * 2
    shared = {name: odd[name] for name in ("dim", "num_heads", "head_dim", "ffn_dim", "eps")}
    for with_lora in (True, False):
        assert model.dit.block_fields(with_lora) == dict(
            shared,
            alpha=7.0,
            ranks={"ffn.0": 3, "self_attn.q": 3} if with_lora else {},
            mode="per_frame_causal",
            gate_init=0.5,
            implementation="xla",
            dtype=jnp.float32,
        )
    assert [tuple(s) for s in dit.segments(4, (1, 3), (1, 2))] == [
        (0, 1, False),
        (1, 2, True),
        (2, 3, True),
        (3, 4, False),
    ]
    adapter = model.bind({"params": tree}).dit.adapters_3
    assert (adapter.width, adapter.scale, adapter.eps) == (5, 0.75, 0.25)


def test_lora_adds_alpha_over_rank_and_merges_into_the_kernel():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tree = {"kernel": draw(4, 5), "bias": draw(5), "lora_a": draw(4, 2), "lora_b": draw(2, 5)}
    x = draw(3, 4)
    wanted = tree["kernel"] + 6 / 2 * tree["lora_a"] @ tree["lora_b"]
    got = lora.LoRALinear(5, rank=2, alpha=6.0).apply({"params": tree}, x)
    np.testing.assert_allclose(got, x @ wanted + tree["bias"], rtol=1e-4, atol=1e-4)
    stacked = {name: np.stack([value, 2 * value]) for name, value in tree.items()}
    merged = lora.merge_lora({"blocks": {"q": stacked, "norm": {"scale": 1}}}, alpha=6.0)
    assert merged["blocks"]["norm"] == {"scale": 1} and set(merged["blocks"]["q"]) == {
        "kernel",
        "bias",
    }
    twice = 2 * tree["kernel"] + 4 * (wanted - tree["kernel"])
    np.testing.assert_allclose(merged["blocks"]["q"]["kernel"], [wanted, twice], rtol=1e-4)
    half = {**tree, "kernel": jnp.asarray(tree["kernel"], jnp.bfloat16)}
    assert lora.merge_lora(half, 6.0)["kernel"].dtype == jnp.bfloat16


def test_an_adapter_corrects_in_proportion_to_its_scale():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x = draw(2, 3, 4)
    tree = {
        "norm": {"scale": draw(4), "bias": draw(4)},
        "down": {"kernel": draw(4, 2), "bias": draw(2)},
        "up": {"kernel": draw(2, 4), "bias": draw(4)},
    }
    one, two = (adapters.Adapter(2, scale).apply({"params": tree}, x) - x for scale in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-4, atol=1e-6)
    assert np.abs(one).max() > 0.1
