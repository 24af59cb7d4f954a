"""What a policy gives its model and makes of its answer, with stand-ins that compile in no time."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lightwam_jax.encoders import pca
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.inference import deploy
from lightwam_jax.inference import policy as policy_lib
from lightwam_jax.inference import rows as rows_lib
from tests.inference.test_policy import CAMERAS, make_assets, make_config, observe, take

LAYERS = ("1_adapted", "3_delta")


class Mirror:
    """In place of the model: actions, attention and video that tell what it was given."""

    def apply(self, variables, latents, *inputs, method):
        return getattr(self, method)(latents, *inputs)

    def act(self, latents, context, proprio, horizon, mask):
        first = context.astype(jnp.float32).sum((1, 2))[:, None] + proprio[:, :1]
        actions = jnp.broadcast_to(first[:, None], (len(latents), horizon, 4))
        weights = proprio[:, :3, None] * jnp.arange(8.0)
        taps = {"state_1": latents, "pooled_1": latents}
        for k, name in enumerate(LAYERS):
            taps[f"attention_{name}"] = weights + k
            taps[f"query_importance_{name}"] = jnp.arange(3.0) + k
        return actions, taps

    def denoise(self, first, noise, context, proprio, mask, steps, shift, downsample):
        self.seen = (first.shape, noise.shape, steps, shift, downsample, mask is None)
        return jnp.ones(noise.shape) + 0 * noise, {}


@pytest.fixture(scope="module")
def assets():
    """With a codec of four random components, which takes no time to fit."""
    rng, arrays = np.random.default_rng(0), {}
    for kind, size in (("first", 192), ("later", 768)):
        shapes = {"encode": (size, 4), "bias": 4, "decode": (4, size), "mean": size}
        for name, shape in shapes.items():
            arrays[f"{kind}_{name}"] = rng.normal(0, 0.005, shape).astype(np.float32)
    return make_assets(make_config(), pca.PcaCodec(arrays))


@pytest.fixture
def policy(assets):
    return policy_lib.Policy(Mirror(), {"dit": {"head": {}}}, make_config(), assets, step=7)


def laid_out(policy, rows):
    """Canvas float32 [rows,H,W,3] and state of `observe`, as the model's passes get them."""
    images, state = policy._check(*observe(rows))
    return np.asarray(policy._canvas(images)), state


def changed(policy, **values):
    """A policy of other config.loss."""
    loss = dataclasses.replace(policy.config.loss, **values)
    config = dataclasses.replace(policy.config, loss=loss)
    return policy_lib.Policy(policy.model, policy.params, config, policy.assets)


# ---- before the model ----------------------------------------------------------------------------


def test_latents_are_rounded_as_those_of_the_cache(policy):
    canvas, state = laid_out(policy, 3)
    assert canvas.dtype == np.float32 and 0.9 < canvas.max() <= 1
    exact = policy.assets.codec.encode(canvas[:, None])
    latents, _ = policy._inputs(policy.assets.codec.arrays, canvas, state)
    assert latents.shape == (3, 1, 4, 8, 8) and latents.dtype == jnp.float32
    rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.abs(rounded - exact).max() > 1e-3
    np.testing.assert_allclose(latents, rounded, rtol=2**-7, atol=1e-4)  # a last bit may tip over
    again = np.asarray(latents).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(latents, again)


def test_the_state_is_normalised_as_the_states_were_and_padded(assets):
    config = make_config({"action_dim": 4, "state_dim": 5}, action_dim=6, proprio_dim=9)
    wide = policy_lib.Policy(Mirror(), {"dit": {}}, config, assets)
    canvas, _ = laid_out(wide, 2)
    state = np.float32([[-2, -1, 0, 1, 2], [0, 0.5, 100, -100, 1]])
    _, proprio = wide._inputs(wide.assets.codec.arrays, canvas, state)
    want = [[-1, -0.5, 0, 0.5, 1, 0, 0, 0, 0], [0, 0.25, 5, -5, 0.5, 0, 0, 0, 0]]
    np.testing.assert_allclose(proprio, want, atol=1e-6)


def test_texts_are_rounded_and_each_row_has_its_own(policy):
    a, b = "put the red cube in the tray", "go"
    context, mask = (policy._contexts([b, a, b], 4)[name] for name in ("text", "mask"))
    filled = [text_lib.prompt(task, policy.config.data.prompt_template) for task in (b, a)]
    encoder = text_lib.HashedTextEncoder(policy.config.model.text_dim)
    exact, real_rows = encoder.encode(filled, policy.config.data.text_len)
    assert mask.dtype == bool and len(set(real_rows.sum(1))) == 2
    np.testing.assert_array_equal(mask, real_rows[[0, 1, 0, 0]])
    np.testing.assert_array_equal(context, exact.astype(ml_dtypes.bfloat16)[[0, 1, 0, 0]])
    again = policy._contexts([a, "stop", b], 3)["text"]
    np.testing.assert_array_equal(again[np.array([0, 2])], context[np.array([1, 0])])


def test_padding_of_texts_is_masked_only_where_the_config_says(policy):
    mask = np.ones((1, 3), bool)
    for wanted in (True, False):
        got = changed(policy, mask_text_padding=wanted)._mask({"mask": mask})
        assert (got is mask) == wanted and (got is None) != wanted


@pytest.mark.parametrize("rows, size", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (33, 64), (64, 64)])
def test_the_smallest_padded_size_that_is_large_enough(rows, size):
    assert rows_lib.padded_size(rows) == size
    with pytest.raises(ValueError, match="65 rows at once; expected at most 64"):
        rows_lib.padded_size(65)


def test_batches_are_filled_with_their_first_row():
    rows = np.array([[1, 2], [3, 4]])
    assert rows_lib.pad(rows, 4).tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert rows_lib.pad(rows, 2).tolist() == rows.tolist()


def test_warming_up_compiles_each_padded_size_once(policy):
    policy.warm_up([3, 1, 4])
    assert policy._traced == [1, 4]
    policy.act(*observe(4))
    assert policy.traces == 2


# ---- behind the model ----------------------------------------------------------------------------


def test_rows_beyond_the_largest_padded_size_keep_their_own_inputs(policy, monkeypatch):
    monkeypatch.setattr(policy_lib, "PADDED_SIZES", (1, 4))
    images, state, prompts = observe(10)
    actions, taps = policy.act(images, state, prompts, return_taps=True)
    assert actions.shape == (10, 8, 4) and actions.dtype == np.float32
    for row in range(10):
        alone = policy.act(*take((images, state, prompts), [row]))
        np.testing.assert_allclose(actions[[row]], alone, rtol=1e-5, atol=1e-3)
    # Only what the figures draw comes back: attention by row, importance once.
    assert set(taps) == {
        f"{kind}_{n}" for kind in ("attention", "query_importance") for n in LAYERS
    }
    proprio = state[:, :3] / 2  # of -2..2
    for k, name in enumerate(LAYERS):
        want = proprio[..., None] * np.arange(8) + k
        assert isinstance(taps[f"attention_{name}"], np.ndarray)
        np.testing.assert_allclose(taps[f"attention_{name}"], want, atol=1e-5)
        np.testing.assert_array_equal(taps[f"query_importance_{name}"], np.arange(3) + k)


def test_actions_are_turned_back_with_the_statistics_of_actions(policy):
    """Normalised x of dimension i is 3 x + i: the range is i - 3 to i + 3."""
    images, state, prompts = observe(2)
    actions = policy.act(images, state, prompts)
    x = (
        np.asarray(policy._contexts(prompts, 2)["text"], np.float32).sum((1, 2))[:, None]
        + state[:, :1] / 2
    )
    want = np.broadcast_to((3 * x + np.arange(4))[:, None], (2, 8, 4))
    np.testing.assert_allclose(actions, want, rtol=1e-4, atol=1e-3)


def test_a_residual_video_is_added_to_its_first_frame(policy):
    canvas, state = laid_out(policy, 2)
    context = policy._contexts(["go", "stop"], 2)
    arguments = (policy.params, policy.assets.codec.arrays, canvas, context, state)
    key = jax.random.key(0)
    exact = policy.assets.codec.encode(canvas[:, None])
    pooled = exact.reshape(2, 1, 2, 2, 4, 2, 8).mean((3, 5))
    loss = policy.config.loss
    assert loss.downsample == 2
    for residual in (False, True):
        one = changed(policy, residual_target=residual, shift=3.0, mask_text_padding=True)
        for full, first in ((False, pooled), (True, exact)):
            x = np.asarray(one._video_pass(*arguments, key, 6, full))
            assert one.model.seen == (
                first.shape,
                (2, 2, *first.shape[2:]),
                6,
                3.0,
                2 if full else 1,
                False,
            )
            np.testing.assert_array_equal(x[:, 0], 1)
            want = 1 + first[:, 0] if residual else np.ones(first[:, 0].shape)
            np.testing.assert_allclose(x[:, 1], want, rtol=2**-6, atol=0.02)


def test_a_video_is_asked_for_by_seed_and_form(policy, monkeypatch):
    asked = []

    def imagine(params, codec, canvas, context, state, key, steps, full):
        asked.append((jax.random.key_data(key).tolist(), steps, full, len(canvas), len(state)))
        return np.zeros((len(canvas), 2, 2, 4, 8), np.float32)

    monkeypatch.setattr(policy, "_imagine", imagine)
    seen = observe(3)
    assert policy.predict_video(*seen, seed=5, steps=4).shape == (3, 5, 16, 32, 3)
    policy.predict_video(*seen, resolution="full")
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (5, 0)]
    assert asked == [(keys[0], 4, False, 4, 4), (keys[1], 10, True, 4, 4)]
    with pytest.raises(ValueError, match="resolution is 'half'"):
        policy.predict_video(*seen, resolution="half")


# ---- from a checkpoint ---------------------------------------------------------------------------


def test_a_policy_is_loaded_with_what_its_checkpoint_says(policy, monkeypatch, tmp_path):
    asked = []
    config = dataclasses.replace(
        policy.config, data=dataclasses.replace(policy.config.data, text_weights="old")
    )

    def load_params(directory):
        asked.append(str(directory))
        return types.SimpleNamespace(
            config=config, assets="its assets", params="params", meta={"step": 12}, path=directory
        )

    def deployed(params, model, horizon):
        return f"{horizon} steps of deployed {params} for {model.num_layers} blocks"

    monkeypatch.setattr(policy_lib.checkpoint, "load_params", load_params)
    monkeypatch.setattr(
        policy_lib.assets_lib, "load_assets", lambda directory, c: (directory, c.data.text_weights)
    )
    monkeypatch.setattr(policy_lib.params_lib, "segmented", lambda params, model: params)
    monkeypatch.setattr(deploy, "deployed", deployed)
    monkeypatch.setattr(policy_lib.build, "build_model", lambda model: model.num_layers)
    monkeypatch.setattr(policy_lib.jax, "device_put", lambda params: params)
    loaded = policy_lib.Policy.load(tmp_path)
    assert (loaded.step, loaded.model, loaded.params) == (12, 2, "params")
    assert loaded.assets == ("its assets", "old") and loaded.config == config
    small = policy_lib.Policy.load(tmp_path, 0, deploy=True, text_weights="new")
    assert (small.model, small.params) == (2, "8 steps of deployed params for 2 blocks")
    assert small.assets == ("its assets", "new") and small.is_deployed and not loaded.is_deployed
    assert asked == [str(tmp_path), str(tmp_path / "checkpoints" / "0")]


def test_only_the_cameras_of_the_config_are_asked_for(policy):
    images, *_ = observe(1)
    more = {"behind": images["scene"] * 0, **dict(reversed(images.items()))}
    np.testing.assert_array_equal(policy.canvas(more), policy.canvas(images))
    np.testing.assert_array_equal(policy.canvas(images)[:, :, :32], images[CAMERAS[0]])
