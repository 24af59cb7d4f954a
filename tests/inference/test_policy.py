import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from lightwam_jax import build
from lightwam_jax import config as config_lib
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import normalize
from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.inference import policy as policy_lib

CAMERAS = ("scene", "wrist")


def make_config(data=(), **model):
    sizes = dict(
        dtype="float32",
        action_dim=4,
        proprio_dim=5,
        latent_channels=8,
        num_layers=2,
        lora_layers=(0, 1),
        adapter_layers=(0, 1),
    )
    c = base.get_config("tiny", **sizes | model)
    c.data.cameras, c.data.canvas, c.data.text_len = CAMERAS, (32, 64), 32
    c.data.num_frames, c.data.frame_stride, c.data.action_horizon = 9, 2, 8
    c.evaluation.replan_steps = 4
    c.data.update(dict(data))
    return config_lib.from_config_dict(c)


def random_params(model, config, seed):
    """Random parameters without compiling the initialisers, which takes longer than the tests."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config))
    return jax.tree.map(
        lambda s: rng.normal(0, 0.3 if len(s.shape) < 2 else s.shape[-2] ** -0.5, s.shape).astype(
            np.float32
        ),
        shapes,
    )


def make_assets(config, own_codec=None):
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (4, 5, 32, 64, 3), np.uint8)
    return assets_lib.Assets(
        state=normalize.min_max(np.full(5, -2.0), np.full(5, 2.0)),
        action=normalize.min_max(np.arange(4) - 3.0, np.arange(4) + 3.0),
        codec=own_codec or pca.PcaCodec.fit(clips, config.model.latent_channels),
        text_encoder=text_lib.HashedTextEncoder(config.model.text_dim),
        statistics={},
    )


def make_policy(config):
    model = build.build_model(config.model)
    params = random_params(model, config.model, 1)
    return policy_lib.Policy(model, params, config, make_assets(config), step=7)


def observe(rows, seed=0):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (rows, 32, 32, 3), np.uint8) for camera in CAMERAS}
    prompts = [f"put the {colour} cube in the tray" for colour in ("red", "green", "blue")]
    return (
        images,
        rng.normal(size=(rows, 5)).astype(np.float32),
        [prompts[i % 3] for i in range(rows)],
    )


def take(observation, rows):
    images, state, prompts = observation
    return {c: i[rows] for c, i in images.items()}, state[rows], [prompts[r] for r in rows]


@pytest.fixture(scope="module")
def policy():
    return make_policy(make_config())


def test_one_compilation_per_padded_batch_size(policy):
    before = policy.traces
    shapes = [policy.act(*observe(rows)).shape for rows in (5, 8, 6, 7, 5)]
    assert shapes == [(rows, 8, 4) for rows in (5, 8, 6, 7, 5)]
    assert policy.traces == before + 1
    policy.warm_up([7])
    assert policy.traces == before + 1


def test_rows_are_independent_of_their_neighbours_and_place_to_the_bit(policy):
    observation = observe(8)
    actions = policy.act(*observation)
    assert actions.dtype == np.float32
    order = [3, 7, 0, 5, 1, 2, 6, 4]
    np.testing.assert_array_equal(policy.act(*take(observation, order)), actions[order])
    np.testing.assert_array_equal(
        policy.act(*take(observation, [6, 1, 2, 3, 4])), actions[[6, 1, 2, 3, 4]]
    )
    np.testing.assert_allclose(
        policy.act(*take(observation, [2])), actions[[2]], atol=1e-4
    )  # another padded batch size


def test_every_input_matters_and_units_are_physical(policy):
    images, state, prompts = observe(5)
    actions = policy.act(images, state, prompts)
    assert np.abs(actions - policy.act(images, state, ["put it away"] * 5)).max() > 1e-6
    assert np.abs(actions - policy.act(images, -state, prompts)).max() > 1e-6
    assert (
        np.abs(actions - policy.act({c: 255 - i for c, i in images.items()}, state, prompts)).max()
        > 1e-6
    )
    # normalised 0 is the middle of the range: dimension i lies around i
    action = normalize.min_max(np.arange(4) + 97.0, np.arange(4) + 103.0)
    shifted = policy_lib.Policy(
        policy.model,
        policy.params,
        policy.config,
        dataclasses.replace(policy.assets, action=action),
    )
    np.testing.assert_allclose(shifted.act(*observe(1)) - policy.act(*observe(1)), 100, atol=1e-3)


def test_each_prompt_is_encoded_once(policy, monkeypatch):
    calls = []

    class Counting(text_lib.HashedTextEncoder):
        def encode(self, prompts, text_len):
            calls.extend(prompts)
            return super().encode(prompts, text_len)

    monkeypatch.setattr(
        policy,
        "assets",
        dataclasses.replace(policy.assets, text_encoder=Counting(policy.config.model.text_dim)),
    )
    monkeypatch.setattr(policy, "_contexts", policy._contexts.encoded_by(policy._encode_texts))
    policy.act(*observe(1))
    policy.act(*observe(1))
    template = policy.config.data.prompt_template
    assert calls == [template.format(task="put the red cube in the tray")]


def test_taps_are_attention_over_the_canvas(policy):
    observation = observe(5)
    _, taps = policy.act(*observation, return_taps=True)
    assert {n for n in taps if n.startswith("att")} == {f"attention_{i}_adapted" for i in (0, 1)}
    assert taps["attention_1_adapted"].shape == (5, 4, 2 * 4)
    np.testing.assert_allclose(taps["attention_1_adapted"].sum(-1), 1, atol=1e-5)
    assert taps["query_importance_1_adapted"].shape == (4,)
    np.testing.assert_allclose(taps["query_importance_1_adapted"].sum(), 1, atol=1e-5)
    order = [4, 2, 0, 1, 3]
    _, others = policy.act(*take(observation, order), return_taps=True)
    for name in ("attention_0_adapted", "attention_1_adapted"):
        weights = taps[name]
        assert weights.min() >= 0 and np.ptp(weights, axis=-1).min() > 1e-4, "they choose"
        assert np.ptp(weights, axis=0).max() > 1e-4, "by what is to be seen"
        assert np.ptp(weights, axis=1).max() > 1e-4, "and each query for itself"
        np.testing.assert_array_equal(others[name], weights[order])


def test_predicted_video_starts_now_and_is_seeded(policy):
    observation = observe(2)
    video = policy.predict_video(*observation, seed=3, steps=2)
    assert video.shape == (2, 5, 16, 32, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video, policy.predict_video(*observation, seed=3, steps=2))
    other = policy.predict_video(*observation, seed=4, steps=2)
    np.testing.assert_array_equal(video[:, 0], other[:, 0])
    assert (video[:, 1:] != other[:, 1:]).any()


def test_observations_are_checked_at_the_door(policy):
    images, state, prompts = observe(2)
    bad = [
        (({"scene": images["scene"]}, state, prompts), "no image of camera 'wrist'"),
        (({**images, "wrist": images["wrist"].astype(np.float32)}, state, prompts), "float32"),
        (({**images, "wrist": images["wrist"][:1]}, state, prompts), r"\[1, 32, 32, 3\]; expected"),
        (({c: i[0] for c, i in images.items()}, state, prompts), "expected a batch"),
        ((images, state[:, :4], prompts), r"shape \[2, 4\]; expected \[2, 5\]"),
        ((images, state * np.nan, prompts), r"not finite in rows \[0, 1\]"),
        ((images, state, prompts[0]), "expected a list of 2 instructions"),
        ((images, state, prompts[:1]), "expected a list of 2 instructions"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            policy.act(*arguments)


def test_cameras_of_any_size_need_no_new_compilation(policy):
    """Images are resized before what is compiled; an image in its place's size is not."""
    images, state, prompts = observe(1)
    policy.warm_up([1])
    before = policy.traces
    actions = policy.act(images, state, prompts)
    large = {camera: image.repeat(2, axis=1).repeat(2, axis=2) for camera, image in images.items()}
    assert policy.canvas(images).dtype == np.uint8 and policy.canvas(large).dtype == np.float32
    resized = policy.act(large, state, prompts)
    assert policy.traces == before
    assert np.abs(resized - actions).max() > 0
    same = {camera: np.full_like(image, 80) for camera, image in large.items()}
    np.testing.assert_allclose(
        policy.act(same, state, prompts),
        policy.act({c: i[:, :32, :32] for c, i in same.items()}, state, prompts),
        atol=1e-4,
    )


class Echo:
    """In place of the model: actions [B,T,6] from what it reads, so that nothing large compiles."""

    def apply(self, variables, latents, context, proprio, horizon, mask, method):
        assert proprio.shape[1:] == (9,) and method == "act"
        seen = latents.mean((1, 2, 3))[:, None, :6] + proprio[:, None, :6]
        return 3 * seen * jnp.cos(jnp.arange(horizon))[:, None], {}


def test_a_smaller_robot_in_a_larger_model_with_its_own_conventions(policy):
    """4 actions and 5 states in a model of 6 and 9; deltas, a gripper, cameras upside down."""

    def robot(**data):
        config = make_config(dict(data, action_dim=4, state_dim=5), action_dim=6, proprio_dim=9)
        return policy_lib.Policy(Echo(), {"dit": {}}, config, policy.assets)

    images, state, prompts = observe(2)
    actions = robot().act(images, state, prompts)
    assert actions.shape == (2, 8, 4)
    assert actions[..., 3].min() < 0.5 < 1 < actions[..., 3].max()
    own = robot(
        action_as=("delta_state", "delta_previous", "absolute", "absolute"),
        action_state_dims=(4, 1, 0, 0),
        gripper_dims=(3,),
        gripper_snap=True,
        gripper_closed_open=(1.0, -1.0),
        orientation=("rotate_180", "flip_vertical"),
    )
    turned = {"scene": images["scene"][:, ::-1, ::-1], "wrist": images["wrist"][:, ::-1]}
    got = own.act(turned, state, prompts)
    np.testing.assert_allclose(got[..., 0], actions[..., 0] + state[:, 4:], atol=1e-5)
    np.testing.assert_allclose(got[..., 1], actions[..., 1].cumsum(1) + state[:, 1:2], atol=1e-4)
    np.testing.assert_allclose(got[..., 2], actions[..., 2], atol=1e-5)
    np.testing.assert_array_equal(got[..., 3], np.where(actions[..., 3] < 0.5, 1, -1))


def test_more_rows_than_the_largest_padded_batch_size(policy, monkeypatch):
    monkeypatch.setattr(policy_lib, "PADDED_SIZES", (1, 8))
    observation = observe(11)
    actions = policy.act(*observation)
    np.testing.assert_array_equal(actions[:8], policy.act(*take(observation, range(8))))
    np.testing.assert_array_equal(actions[8:], policy.act(*take(observation, [8, 9, 10])))
    assert actions.shape == (11, 8, 4)


def test_untrained_is_seeded_and_shares_what_is_compiled(policy, monkeypatch):
    monkeypatch.setattr(
        build,
        "init_params",
        lambda model, key, config: (
            lambda scale: jax.tree.map(
                lambda x: scale * np.ones(x.shape, np.float32), policy.params
            )
        )(jax.random.uniform(key)),
    )
    policy.act(*observe(1))
    before = policy.traces
    a, b, c = (policy.untrained(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.act(*observe(1)), b.act(*observe(1)))
    assert (a.act(*observe(1)) != c.act(*observe(1))).any()
    assert (a.step, policy.step, policy.traces) == (None, 7, before)


def test_an_untrained_policy_keeps_no_trained_weights():
    trained = make_policy(make_config())
    fresh = jax.tree.map(np.zeros_like, jax.device_get(trained.params))
    trained._initialise = lambda key: fresh
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(trained.params)]
    alone = trained.with_prompt_template("do this: {task}").untrained(1)
    del trained
    gc.collect()
    assert not any(leaf() is not None for leaf in kept)
    assert np.isfinite(alone.stages(*observe(1))["context"]).all(), "it encodes instructions still"
