"""What parameters are before anything is learned, leaf by leaf, no two of them drawn alike."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import build, params
from lightwam_jax import config as config_lib
from lightwam_jax.models import action, blocks, t5

QUERIES = 0.05  # deviation of the learned queries


@pytest.fixture(scope="module")
def initial():
    """{path: array} of a model of two blocks in one run."""
    c = base.get_config(
        "tiny", num_layers=2, lora_layers=(0, 1), adapter_layers=(1,), query_init=QUERIES
    )
    config = config_lib.from_config_dict(c).model
    model = build.build_model(config)
    tree = jax.jit(lambda key: build.init_params(model, key, config))(jax.random.key(0))
    return {path: np.asarray(x) for path, x in params.flatten(tree).items()}


def fan_in(path, initial):
    """Inputs of the linear that a kernel, a bias or a lora_a belongs to."""
    return initial[re.sub(r"(bias|lora_a)$", "kernel", path)].shape[-2]


def test_every_leaf_starts_as_its_kind_does(initial):
    seen = set()
    for path, x in initial.items():
        kind, uniform = "linear", None
        if path.endswith("/lora_b") or re.search(r"/adapters_1/up/|_merge_logits$", path):
            kind = "zero"
        elif re.search(r"norm\w*/(scale|bias)$", path):
            kind = path.rpartition("/")[2]
        elif path.endswith("/in_proj/bias"):
            kind = "zero"
        elif path.endswith("/in_proj/kernel"):
            kind, uniform = "xavier", (6 / sum(x.shape)) ** 0.5
        elif path.endswith(("/modulation", "/query_tokens")):
            kind = path.rpartition("/")[2]
            wanted = QUERIES if kind == "query_tokens" else 48**-0.5
            assert x.std() == pytest.approx(wanted, rel=0.2), path
            assert abs(x.mean()) < 0.3 * wanted, path
        else:
            uniform = fan_in(path, initial) ** -0.5
        if uniform:
            assert np.abs(x).max() <= uniform, path
            assert x.size < 30 or x.std() == pytest.approx(uniform / 3**0.5, rel=0.25), path
        elif kind in ("zero", "bias", "scale"):
            np.testing.assert_array_equal(x, kind == "scale", err_msg=path)
        assert x.dtype == np.float32
        seen.add(kind)
    assert seen == {"linear", "zero", "scale", "bias", "xavier", "modulation", "query_tokens"}


def test_no_two_parameters_and_no_two_blocks_are_drawn_alike(initial):
    drawn = [
        (path, part)
        for path, x in initial.items()
        if len(np.unique(x)) > 1
        for part in (x if "/blocks_" in path else x[None])
    ]
    for (a, x), (b, y) in itertools.combinations(drawn, 2):
        size = min(x.size, y.size)
        # Also as multiples of each other: one key under two deviations.
        close = np.corrcoef(x.ravel()[:size], y.ravel()[:size])[0, 1] > 0.999
        assert not close or size < 8, (a, b)


def test_gates_may_start_open():
    """Only rows 2 and 5 of six are gates."""
    make = lambda gate: blocks._modulation_init(gate)(jax.random.key(0), (1, 6, 8))
    np.testing.assert_allclose(
        make(1.0) - make(0.0), np.ones((1, 6, 8)) * [[0], [0], [1], [0], [0], [1]], atol=1e-6
    )


def test_merged_slots_start_as_plain_means():
    pooler = action.QueryPooler(num_queries=3, num_heads=2, merge_dim=4, merge_slots=2)
    tokens = jnp.ones((1, 2, 4))
    tree = jax.jit(pooler.init)(jax.random.key(0), tokens)["params"]
    np.testing.assert_array_equal(tree["query_slot_merge_logits"], np.zeros((2, 3)))
    _, (_, importance) = pooler.apply({"params": tree}, tokens)
    np.testing.assert_allclose(importance, np.full(3, 1 / 3), rtol=1e-6)


def test_anchored_queries_start_on_tokens_of_their_own():
    """Each head of a query on its run, each slot on its queries; a run may be several tokens."""
    pooler = action.QueryPooler(2, num_heads=2, merge_dim=4, merge_slots=2, query_anchor=50.0)
    tokens = jax.random.normal(jax.random.key(1), (1, 8, 4))
    tree = jax.jit(pooler.init)(jax.random.key(0), tokens[:, :1])["params"]
    _, (weights, _) = pooler.apply({"params": tree}, tokens)
    own = np.repeat(np.eye(2), 4, axis=1)  # two heads of two tokens each
    np.testing.assert_array_equal(weights[0] > 1e-3, own > 0)
    np.testing.assert_allclose(weights.sum(-1), np.ones((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(tree["query_slot_merge_logits"], 50 * np.eye(2))
    heads = action.own_runs(2, 2, 8)  # [heads, queries, tokens]: each head half of its query's
    np.testing.assert_array_equal(np.argmax(heads, -1), [[0, 4], [2, 6]])


def test_blocks_of_the_text_encoder_start_apart():
    encoder = t5.UMT5Encoder(
        vocab=5, dim=4, attention_dim=4, ffn_dim=4, num_heads=2, num_layers=2, num_buckets=4
    )
    tree = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for path, x in params.flatten(tree["blocks"]).items():
        assert path.endswith("/scale") or np.abs(x[0] - x[1]).min() > 0, path
