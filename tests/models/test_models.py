"""The model's own properties: what parity with fixed fixtures does not show."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import build, flow, params
from lightwam_jax import config as config_lib
from lightwam_jax.models import adapters, dit, layers, lora
from lightwam_jax.models.lightwam import pool_latents


def make(**overrides):
    """Noise on every leaf: zero-initialised parts would hide their own mistakes."""
    exact = {"dtype": "float32", "frozen_dtype": "float32"}
    c = base.get_config("tiny", **{**exact, **overrides})
    c.data.update(num_frames=9, frame_stride=1, action_horizon=8)
    c.evaluation.replan_steps = 4
    config = config_lib.from_config_dict(c)
    model = build.build_model(config.model)
    shapes = jax.eval_shape(lambda k: build.init_params(model, k, config.model), jax.random.key(0))
    rng = np.random.default_rng(1)

    def noise(path, shape):
        if path.endswith("/kernel"):
            return rng.normal(0, (3 * shape[-2]) ** -0.5, shape)
        return path.endswith("/scale") + rng.normal(0, 0.05, shape)

    leaves = {
        path: jnp.asarray(noise(path, leaf.shape), jnp.float32)
        for path, leaf in sorted(params.flatten(shapes).items())
    }
    return config, model, params.unflatten(leaves)


@pytest.fixture(scope="module")
def tiny():
    return make()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "latents": draw(2, 3, 4, 8, 16),
        "text": draw(2, 5, 32),
        "proprio": draw(2, 8),
        "t": jnp.array([600.0, 20.0]),
    }


@pytest.fixture(scope="module")
def act(tiny):
    _, model, _ = tiny
    return jax.jit(
        lambda tree, x, text, proprio: model.apply(
            {"params": tree}, x, text, proprio, 8, method="act"
        )
    )


@pytest.mark.parametrize("suite, dims", [("libero", (7, 8)), ("robotwin", (14, 14))])
def test_full_size_parameter_counts(golden, suite, dims):
    told = json.loads((golden / "param_counts.json").read_text(encoding="utf-8"))[suite]
    c = base.get_config("wan21_1_3b", action_dim=dims[0], proprio_dim=dims[1])
    config = config_lib.from_config_dict(c)
    model = build.build_model(config.model)
    shapes = jax.eval_shape(
        lambda key: build.init_params(model, key, config.model), jax.random.key(0)
    )
    rows = {row[0]: row[1:] for row in params.count_table(shapes, config.train.trainable)}
    assert rows["lora"] == (told["lora"],) * 2
    assert rows["adapters"] == (told["adapters"],) * 2
    assert rows["video_head"] == (told["video_head"],) * 2
    assert rows["action_expert"] == (told["state_fusion_action_expert"],) * 2
    assert rows["proprio_encoder"] == (told["proprio_encoder"],) * 2
    assert rows["backbone"] == (told["wan_dit_without_head"], 0)
    assert rows["total"] == (told["total_without_vae"], told["trainable"])

    from lightwam_jax.models.vae import WanVAE

    vae = jax.eval_shape(
        lambda key: WanVAE().init(key, jnp.zeros((1, 1, 16, 16, 3))), jax.random.key(0)
    )
    assert params.count(vae) == told["vae"]
    assert rows["total"][0] + params.count(vae) == told["total"]
    assert rows["backbone"][0] + params.count(vae) == told["frozen"]


def test_the_action_pass_stops_at_the_last_tap(tiny, act, inputs):
    config, _, tree = tiny
    assert max(config.model.adapter_layers) < config.model.num_layers - 1
    later = f"blocks_{max(config.model.adapter_layers) + 1}"
    grads = jax.jit(
        jax.grad(
            lambda tree: act(tree, inputs["latents"][:, :1], inputs["text"], inputs["proprio"])[
                0
            ].sum()
        )
    )(tree)
    dead = [path for path, g in params.flatten(grads).items() if not np.any(g)]
    assert all(
        path.startswith((f"dit/{later}/", "dit/head/")) for path in dead if "bias" not in path
    )
    assert any(path.startswith(f"dit/{later}/") for path in dead)
    text = (
        jax.jit(act)
        .lower(tree, inputs["latents"][:, :1], inputs["text"], inputs["proprio"])
        .as_text()
    )
    assert "xi1>" not in text.replace("tensor<i1>", "")  # no boolean mask is ever materialised


def test_the_segmented_layout_is_a_view(tiny):
    config, _, tree = tiny
    disk = params.canonical(tree)
    assert params.flatten(disk)["dit/blocks/ffn/0/kernel"].shape[0] == config.model.num_layers
    jax.tree.map(np.testing.assert_array_equal, params.segmented(disk, config.model), tree)


def test_lora_on_some_layers_cuts_segments_and_round_trips():
    config, _, tree = make(lora_layers=(0, 3), adapter_layers=(1,), lora_targets=("ffn.0",))
    names = [s.name for s in dit.segments(4, (1,), (0, 3))]
    assert names == ["blocks_0", "blocks_1", "blocks_2", "blocks_3"]
    disk = params.canonical(tree)
    assert params.flatten(disk)["dit/blocks/ffn/0/lora_a"].shape[0] == 2
    jax.tree.map(np.testing.assert_array_equal, params.segmented(disk, config.model), tree)


def test_another_adapter_set_needs_no_other_checkpoint(tiny):
    """The same weights on disk load into a model cut elsewhere, every block at its place."""
    _, _, tree = tiny  # cut after each of its four blocks
    other, _, wanted = make(adapter_layers=(0, 2))
    disk = {
        path: x
        for path, x in params.flatten(params.canonical(tree)).items()
        if not path.startswith(("dit/adapters_1", "expert/"))
    }
    view = params.flatten(params.segmented(params.unflatten(disk), other.model))
    given = params.flatten(tree)
    blocks = {"blocks_0": (0,), "blocks_1": (1, 2), "blocks_3": (3,)}
    for path, leaf in params.flatten(wanted).items():
        if not path.startswith("dit/"):
            continue
        assert view[path].shape == leaf.shape
        _, run, rest = path.split("/", 2)
        parts = [given[f"dit/blocks_{i}/{rest}"] for i in blocks.get(run, ())] or [given[path]]
        np.testing.assert_array_equal(view[path], np.concatenate(parts), err_msg=path)


@pytest.mark.slow
def test_merged_lora_gives_the_same_actions(tiny, act, inputs):
    config, _, tree = tiny
    merged = {**tree, "dit": lora.merge_lora(tree["dit"], config.model.lora_alpha)}
    assert not any("lora" in path for path in params.flatten(merged))
    plain, model, _ = make(lora_rank=0, lora_layers=())
    x = (inputs["latents"][:, :1], inputs["text"], inputs["proprio"])
    disk = params.segmented(params.canonical(merged), plain.model)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda tree: model.apply({"params": tree}, *x, 8, method="act")[0])(disk)
        expected = act(tree, *x)[0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_rows_of_a_batch_do_not_see_each_other(tiny, act, inputs):
    _, _, tree = tiny
    both = act(tree, inputs["latents"][:, :1], inputs["text"], inputs["proprio"])[0]
    swapped = act(tree, inputs["latents"][::-1, :1], inputs["text"][::-1], inputs["proprio"][::-1])[
        0
    ]
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-5)


def test_first_frame_ignores_time_and_future(tiny, inputs):
    _, model, tree = tiny
    run = jax.jit(
        lambda x, t: model.apply(
            {"params": tree}, x, t, inputs["text"], inputs["proprio"], method="velocity"
        )
    )
    a = run(inputs["latents"], inputs["t"])
    b = run(inputs["latents"].at[:, 1:].add(1.0), inputs["t"] + 100)
    np.testing.assert_allclose(a[:, 0], b[:, 0], atol=1e-5)
    assert np.abs(a[:, 1:] - b[:, 1:]).max() > 1e-3


def test_predicted_video_keeps_the_frame_it_started_from(tiny, inputs):
    _, model, tree = tiny
    first = inputs["latents"][:, :1]
    video = jax.jit(
        lambda tree: model.apply(
            {"params": tree},
            first,
            inputs["latents"],
            inputs["text"],
            inputs["proprio"],
            steps=3,
            method="predict_video",
        )
    )(tree)
    assert video.shape == inputs["latents"].shape and np.isfinite(video).all()
    np.testing.assert_array_equal(video[:, :1], first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variation",
    [dict(remat=r) for r in ("linears", "dots", "full")] + [dict(scan_unroll=8)],
    ids=str,
)
def test_execution_switches_change_no_number(tiny, inputs, variation):
    _, model, tree = tiny
    _, other, _ = make(**variation)
    run = lambda m: jax.jit(
        jax.grad(
            lambda tree: m.apply(
                {"params": tree},
                inputs["latents"],
                inputs["t"],
                inputs["text"],
                inputs["proprio"],
                method="velocity",
            ).sum()
        )
    )(tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), run(model), run(other)
    )


@pytest.mark.slow
def test_bfloat16_stays_close(tiny, inputs):
    _, model, tree = tiny
    _, half, _ = make(dtype="bfloat16")
    x = (inputs["latents"], inputs["t"], inputs["text"], inputs["proprio"])
    run = lambda m: jax.jit(lambda tree: m.apply({"params": tree}, *x, method="velocity"))(tree)
    exact, rounded = run(model), run(half)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_sinusoid_is_exact_for_every_time_a_sampler_draws():
    t = np.random.default_rng(0).uniform(0, 1000, 2000).astype(np.float32)
    got = jax.jit(layers.sinusoid, static_argnums=1)(t, 256)
    np.testing.assert_allclose(got, layers.sinusoid_table(t, 256), atol=2e-6)


def test_pooling_needs_a_grid_it_divides():
    x = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    np.testing.assert_allclose(pool_latents(x, 2)[0, 0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    with pytest.raises(ValueError, match="multiples of 8"):
        pool_latents(x, 4)


def test_errors_say_what_to_do(tiny, inputs):
    _, model, tree = tiny
    with pytest.raises(ValueError, match="must be even"):
        model.apply(
            {"params": tree},
            jnp.zeros((1, 1, 3, 4, 16)),
            inputs["text"][:1],
            inputs["proprio"][:1],
            8,
            method="act",
        )
    with pytest.raises(ValueError, match="do not exist"):
        dit.segments(4, (9,), ())
    with pytest.raises(ValueError, match="every part must be even"):
        layers.rope_table(1, 2, 2, 16)
    with pytest.raises(ValueError, match="matches no parameter"):
        params.partition(tree, ("typo",))


def test_schedule_ends_and_default_layers():
    assert float(flow.sample_time(0.0, 5.0)) == 0.0
    times, deltas = flow.sampling_schedule(4, 5.0)
    assert times[0] == 1000 and deltas.sum() == pytest.approx(-1)
    assert adapters.default_adapter_layers(30) == (16, 20, 25, 29)
