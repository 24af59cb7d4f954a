"""The deployed form: the same actions from fewer weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import libero
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.inference import contexts, deploy
from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.models import vae as vae_lib
from tests.inference.test_policy import make_config, make_policy, observe, random_params, take

VARIANTS = {
    "released": {},
    "LoRA in some blocks": dict(lora_layers=(1, 3)),
    "queries merged in slots": dict(merge_dim=24),
    "queries that start apart": dict(merge_dim=24, query_anchor=3.0),
    "anchored queries, one sum": dict(query_anchor=3.0),
    "every source": dict(layer_sources=(("backbone", "delta"), ("delta", "adapted"))),
    "mean": dict(pooling="mean"),
    "concat": dict(pooling="concat", adapter_scale=0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_acts_as_the_whole_model(name):
    sizes = dict(num_layers=4, lora_layers=(0, 1, 2, 3), adapter_layers=(0, 2)) | VARIANTS[name]
    config = make_config(**sizes).model
    model = build.build_model(config)
    params, rng = random_params(model, config, seed=2), np.random.default_rng(0)
    sizes = (2, 1, 4, 8, 8), (2, 6, config.text_dim), (2, 5)
    latents, text, proprio = (rng.normal(size=size).astype(np.float32) for size in sizes)
    mask = rng.random((2, 6)) < 0.6

    def whole(params, mask):
        return model.apply({"params": params}, latents, text, proprio, 8, mask, method="act")

    def small(weights, mask):
        keys_values = deploy.keys_values(weights, text, config)
        return deploy.act(weights, latents, keys_values, mask, proprio, config, taps=True)

    with jax.default_matmul_precision("highest"):
        weights = deploy.deployed(params, config, 8)
        whole, small = jax.jit(whole), jax.jit(small)
        (want, taps), (got, seen) = whole(params, mask), small(weights, mask)
        if name == "released":
            everything, _ = whole(params, None)
            assert np.abs(everything - want).max() > 1e-3 * np.abs(want).max(), "the mask matters"
            np.testing.assert_allclose(
                small(weights, None)[0], everything, atol=1e-6 * float(np.ptp(everything))
            )
    assert len(weights["blocks"]) == 3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(np.ptp(want)))
    shown = {n for n in taps if n.startswith(("attention", "query_importance"))}
    assert set(seen) == shown and bool(shown) == (config.pooling == "learned_query")
    for name, tap in seen.items():
        assert tap.shape == taps[name].shape
        np.testing.assert_allclose(tap, taps[name], rtol=0, atol=1e-6)


def test_full_size_is_25_blocks_in_the_compute_dtype():
    config = config_lib.from_config_dict(libero.get_config("spatial")).model
    model = build.build_model(config)
    whole = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config))
    small = jax.eval_shape(lambda p: deploy.deployed(p, config, 32), whole)
    assert len(small["blocks"]) == 25 and {x.dtype.name for x in jax.tree.leaves(small)} == {
        "bfloat16"
    }
    paths = params_lib.flatten({**small, "blocks": {}, "adapters": {}, "text": {}, "expert": {}})
    assert not [path for path in paths if "head" in path or "lora" in path]
    gibibytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(small)) / 2**30
    assert 2.6 < gibibytes < 2.8
    text = jnp.zeros((1, 128, config.text_dim))
    keys, values = jax.eval_shape(lambda w: deploy.keys_values(w, text, config), small)
    assert keys.shape == values.shape == (25, 1, 128, 12, 128)
    latents, state = jnp.zeros((1, 1, 28, 56, 16)), jnp.zeros((1, 8))
    inputs = latents, (keys, values), None, state
    actions, taps = jax.eval_shape(lambda w, *x: deploy.act(w, *x, config), small, *inputs)
    assert (actions.shape, actions.dtype, taps) == ((1, 32, 7), jnp.float32, {})


def test_bfloat16_is_as_near_as_that_of_the_whole_model():
    """Folding rounds other numbers, not more of them."""
    config = make_config(num_layers=4, lora_layers=(0, 1, 2, 3), adapter_layers=(0, 3)).model
    low = dataclasses.replace(config, dtype="bfloat16")
    rng = np.random.default_rng(1)
    latents, text, state = (
        rng.normal(size=size).astype(np.float32) for size in ((8, 1, 4, 8, 8), (8, 6, 32), (8, 5))
    )
    params = random_params(build.build_model(config), config, seed=3)

    def whole(config):
        model = build.build_model(config)
        act = lambda p: model.apply({"params": p}, latents, text, state, 8, method="act")[0]
        return np.asarray(jax.jit(act)(params))

    weights = deploy.deployed(params, low, 8)
    act = lambda w: deploy.act(w, latents, deploy.keys_values(w, text, low), None, state, low)[0]
    exact = whole(config)
    error = np.abs(np.asarray(jax.jit(act)(weights)) - exact).mean()
    assert 0 < error < 1.2 * np.abs(whole(low) - exact).mean()


def test_an_image_needs_a_third_of_the_kernels():
    vae = vae_lib.WanVAE(dim=8, z_dim=4, latent_mean=(0,) * 4, latent_std=(1,) * 4)
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 3)).astype(np.float32)
    params = jax.jit(lambda: vae.init(jax.random.key(0), image, method="encode")["params"])()
    few = vae_lib.still_params(params)
    assert params_lib.count(few) < 0.45 * params_lib.count(params)
    encode = lambda params, x: vae.apply({"params": params}, x, method="encode")
    np.testing.assert_array_equal(jax.jit(encode)(few, image), jax.jit(encode)(params, image))
    with pytest.raises(Exception, match="expected to generate shape"):
        jax.eval_shape(encode, few, np.zeros((1, 5, 16, 16, 3), np.float32))


# ---- as a policy ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies():
    whole = make_policy(make_config())
    return whole, whole.deployed()


def test_a_deployed_policy_acts_as_the_whole_one_and_predicts_no_video(policies):
    whole, small = policies
    seen = observe(3)
    want, taps = whole.act(*seen, return_taps=True)
    got, small_taps = small.act(*seen, return_taps=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert set(small_taps) == set(taps)
    for name, tap in taps.items():
        np.testing.assert_allclose(small_taps[name], tap, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(small.act(*seen), got)
    assert small.deployed() is small is whole.deployed() and small.step == whole.step
    with pytest.raises(ValueError, match=r"Policy.load\(..., deploy=False\) to predict video"):
        small.predict_video(*seen)


def test_instructions_change_from_call_to_call(policies):
    """Keys and values are kept per instruction: each row must get those of its own."""
    _, small = policies
    images, state, prompts = observe(3)
    assert len(set(prompts)) == 3
    first = small.act(images, state, prompts)
    other = small.act(images, state, prompts[::-1])
    assert np.abs(first - other)[[0, 2]].max() > 1e-5
    np.testing.assert_array_equal(small.act(images, state, prompts), first)
    for row in range(3):
        alone = small.act(*take((images, state, prompts), [row]))
        np.testing.assert_allclose(alone, first[[row]], rtol=0, atol=1e-4)


def test_untrained_is_the_untrained_whole_model_deployed(policies):
    whole, small = policies
    seen = observe(1)
    traces, want = small.traces, whole.untrained(3).act(*seen)
    fresh = small.untrained(3)
    got = fresh.act(*seen)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(got - small.act(*seen)).max() > 1e-3, "it has its own keys and values"
    assert small.traces <= traces + 1 and fresh.step is None
    again = whole.untrained(3).deployed()
    np.testing.assert_allclose(again.act(*seen), want, rtol=0, atol=1e-5)


def test_the_last_instructions_stay_on_the_device(monkeypatch):
    monkeypatch.setattr(contexts, "KEPT", 2)
    encoded, prepared = [], []

    def encode(texts):
        encoded.append(list(texts))
        numbers = np.array([[len(text)] for text in texts], np.float32)
        return numbers, numbers > 1

    def prepare(rows, mask):
        prepared.append(int(rows[0, 0]))
        return {"keys": jnp.asarray(rows)[None] * 10, "mask": jnp.asarray(mask)}

    batch = contexts.Contexts(encode, prepare, {"keys": 1, "mask": 0})
    found = batch(["aaa", "b", "aaa"], 4)
    assert found["keys"][0, :, 0].tolist() == [30, 10, 30, 30]
    assert found["mask"][:, 0].tolist() == [True, False, True, True]
    assert batch(("aaa", "b", "aaa"), 4) is found and prepared == [3, 1]
    batch(["cc", "b"], 2), batch(["aaa"], 1)  # cc takes the place of aaa
    assert (encoded, prepared) == ([["aaa", "b"], ["cc"]], [3, 1, 2, 3])
    other = batch.prepared_by(lambda rows, mask: {"keys": rows[None], "mask": mask})
    assert other(["b"], 1)["keys"].tolist() == [[[1]]] and len(encoded) == 2


def test_on_a_cpu_a_policy_computes_in_float32(policies, monkeypatch, tmp_path):
    whole, _ = policies
    config = dataclasses.replace(
        whole.config, model=dataclasses.replace(whole.config.model, dtype="bfloat16")
    )
    stored = dict(config=config, assets="there", params=params_lib.canonical(whole.params))
    stored = type("Stored", (), dict(stored, meta={"step": 7}, path=tmp_path))
    monkeypatch.setattr(policy_lib.checkpoint, "load_params", lambda directory: stored)
    monkeypatch.setattr(policy_lib.assets_lib, "load_assets", lambda *of: whole.assets)
    for wanted, dtype in (("", "float32"), ("bfloat16", "bfloat16")):
        policy = policy_lib.Policy.load(tmp_path, deploy=True, dtype=wanted)
        assert policy.config.model.dtype == dtype and policy.model.dtype == jnp.dtype(dtype)
        assert {x.dtype for x in jax.tree.leaves(policy.params)} == {jnp.dtype(dtype)}


def test_other_templates_and_roundings_reach_the_deployed_form(policies):
    whole, _ = policies
    seen = observe(1)
    other = whole.with_prompt_template("Task: {task}")
    want = other.act(*seen)
    assert np.abs(want - whole.act(*seen)).max() > 1e-4
    np.testing.assert_allclose(other.deployed().act(*seen), want, rtol=0, atol=1e-5)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), whole.params)
    rest = whole.config, whole.assets
    run = policy_lib.Policy(whole.model, rounded, *rest)
    want = run.untrained(3).act(*seen)
    np.testing.assert_allclose(run.deployed().untrained(3).act(*seen), want, rtol=0, atol=1e-4)
    assert np.abs(whole.untrained(3).act(*seen) - want).max() > 1e-3, "rounding matters"


def test_importance_sums_to_one_in_bfloat16():
    config = make_config(dtype="bfloat16")
    _, taps = make_policy(config).deployed().act(*observe(1), return_taps=True)
    shares = [tap for name, tap in taps.items() if name.startswith("query_importance")]
    assert shares and {tap.dtype.name for tap in shares} == {"float32"}
    np.testing.assert_allclose([tap.sum() for tap in shares], 1, atol=1e-6)
