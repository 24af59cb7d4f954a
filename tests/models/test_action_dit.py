"""Fast-WAM's action head: sizes, what it depends on, how it starts, where its parameters go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import build, params, sharding
from lightwam_jax import config as config_lib
from lightwam_jax.models import action_dit
from lightwam_jax.training import losses

# Parameters of video transformer, action transformer, proprio encoder (docs/spec.md section 16).
COUNTS = {
    ("wan21_1_3b", 7, 8): (1_418_996_800, 642_937_863, 36_864),
    ("wan21_1_3b", 14, 14): (1_418_996_800, 642_952_206, 61_440),
    ("wan22_5b", 7, 8): (4_999_787_712, 1_020_886_023, 36_864),
    ("wan22_5b", 14, 14): (4_999_787_712, 1_020_900_366, 61_440),
}
PLAIN = dict(adapter_layers=(), lora_rank=0, lora_layers=(), lora_targets=())
SMALL = dict(action_head="flow_dit", dtype="float32", frozen_dtype="float32", num_layers=2)
SMALL |= dict(adapter_layers=(), lora_layers=(0, 1), flow_steps=2)


def shapes_of(config):
    model = build.build_model(config)
    init = lambda key: build.init_params(model, key, config)
    return model, jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("variant, action_dim, proprio_dim", COUNTS)
def test_full_size_parameter_counts(variant, action_dim, proprio_dim):
    sizes = dict(PLAIN, action_head="flow_dit", action_dim=action_dim, proprio_dim=proprio_dim)
    _, shapes = shapes_of(config_lib.model_variant(variant, **sizes))
    parts = (shapes[name] for name in ("dit", "expert", "proprio_encoder"))
    assert tuple(map(params.count, parts)) == COUNTS[variant, action_dim, proprio_dim]


@pytest.fixture(scope="module")
def small():
    """A model with noise on every leaf, and its policy: a jitted function of parameters, noise."""
    config = config_lib.model_variant("tiny", **SMALL)
    model, shapes = shapes_of(config)
    rng = np.random.default_rng(0)
    leaf = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    tree = jax.tree.map(leaf, shapes)
    latents, text = leaf(jnp.zeros((2, 1, 4, 4, 16))), leaf(jnp.zeros((2, 3, 32)))
    latents, text = latents.at[1].set(latents[0]), text.at[1].set(text[0])
    act = lambda tree, noise: model.apply(
        {"params": tree}, latents, text, jnp.zeros((2, 8)), 4, None, noise, method="act"
    )
    return tree, jax.jit(act), leaf(jnp.zeros((2, 4, 7)))


def test_actions_come_from_the_noise_of_their_own_row(small):
    tree, act, noise = small
    actions, taps = act(tree, noise)
    assert actions.shape == (2, 4, 7) and taps["velocity"].shape == (2, 2, 4, 7)
    assert np.abs(actions[0] - actions[1]).max() > 0.01  # the same observation
    swapped, _ = act(tree, noise[::-1])
    np.testing.assert_allclose(swapped[::-1], actions, atol=1e-5)


@pytest.mark.parametrize(
    "path", ["dit/blocks_0/self_attn/k/lora_b", "dit/blocks_0/ffn/2/lora_b", "proprio_encoder/bias"]
)
def test_what_learns_in_the_video_stream_changes_the_actions(small, path):
    """LoRA acts: the reference's own mixing of the streams leaves it out."""
    tree, act, noise = small
    flat = params.flatten(tree)
    changed = params.unflatten(flat | {path: flat[path] + 1.0})
    assert np.abs(act(changed, noise)[0] - act(tree, noise)[0]).max() > 1e-3


def test_the_video_draws_what_it_draws_without_actions():
    config = config_lib.from_config_dict(base.get_config("tiny", **SMALL))
    batch = {"latents": jnp.zeros((64, 2, 4, 4, 16)), "actions": jnp.zeros((64, 8, 7))}
    key = jax.random.key(1)
    both = losses.draw(key, batch, config)
    for got, want in zip(both[:2], losses.draw_noise(key, (64, 2, 4, 4, 16), config.loss)):
        np.testing.assert_array_equal(got, want)
    assert both.action_noise.shape == (64, 8, 7)
    assert abs(np.corrcoef(both.t, both.action_t)[0, 1]) < 0.5
    one = dataclasses.replace(config, model=dataclasses.replace(config.model, flow_shift=1.0))
    assert losses.draw(key, batch, one).action_t.mean() < both.action_t.mean() - 100


def test_from_video_keeps_what_has_its_size_and_the_ends():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    video = {"blocks": {"modulation": draw(2, 1, 6, 5), "o": {"kernel": draw(2, 8, 5)}}}
    action = {"blocks": {"modulation": draw(2, 1, 6, 3), "o": {"kernel": draw(2, 8, 3)}}}
    action["head"] = {"bias": draw(4)}
    made = action_dit.from_video(video, action)
    np.testing.assert_array_equal(made["head"]["bias"], action["head"]["bias"])
    kernel = video["blocks"]["o"]["kernel"]
    # Fewer outputs, the same inputs: the ends and the middle, unscaled.
    np.testing.assert_array_equal(made["blocks"]["o"]["kernel"], kernel[:, :, ::2])
    rows = video["blocks"]["modulation"][..., ::2] * np.sqrt(5 / 3)
    np.testing.assert_allclose(made["blocks"]["modulation"], rows, rtol=1e-6)


def test_parameters_are_split_over_devices_but_never_over_blocks():
    _, shapes = shapes_of(config_lib.model_variant("wan21_1_3b", action_head="flow_dit"))
    split = {
        path: sharding.leaf_spec(f"trainable/expert/{path}", leaf.shape, 4, 8)
        for path, leaf in params.flatten(shapes["expert"]).items()
    }
    stacked = [spec for path, spec in split.items() if path.startswith("blocks/")]
    assert all(spec[:1] in ((), (None,)) for spec in map(tuple, stacked))
    assert sum(len(spec) > 0 for spec in stacked) == 10  # the kernels


def test_without_video_co_training_the_actions_alone_count():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    out = {"velocity": draw(2, 3, 2, 2, 1), "target": draw(2, 3, 2, 2, 1), "actions": draw(2, 4, 3)}
    out |= {"action_target": draw(2, 4, 3), "action_weight": np.float32([0.5, 2.0])}
    pad = np.array([[False, False, False, True], [False, True, True, True]])
    batch = {"action_is_pad": pad, "image_is_pad": np.zeros((2, 9), bool), "actions": draw(2, 4, 3)}
    noise = losses.FlowNoise(jnp.array([200.0, 700.0]), None, None, None)
    config = config_lib.LossConfig(lambda_video=0.0, lambda_action=3.0, temporal_weighting=False)
    total, parts = losses.loss_of(out, batch, noise, config)
    squared = ((out["actions"] - out["action_target"]) ** 2).mean(axis=-1)
    by_hand = (0.5 * squared[0, :3].mean() + 2.0 * squared[1, 0]) / 2
    np.testing.assert_allclose(total, 3 * by_hand, rtol=1e-6)
    np.testing.assert_allclose(parts["loss_action"], by_hand, rtol=1e-6)
    assert parts["loss_video"] > 0, "it is told, and counts for nothing"
