"""Actions as the model sees them and back, in both worlds that use them: numpy and jit."""

import itertools

import jax
import numpy as np
import pytest

from lightwam_jax import precompute
from lightwam_jax.data import actions, assets, episodes, loader, normalize, spec
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.doctor import report as doctor_report
from tests import synthetic

RNG = np.random.default_rng(0)
ACTIONS = RNG.normal(size=(2, 6, 4)).astype(np.float32)  # [B, T, A]
STATE = RNG.normal(size=(2, 5)).astype(np.float32)
REAL = np.zeros((2, 6), bool)


def config(**data):
    """A config of 4 actions and 5 states, with these data keys."""
    data = {
        "model.action_dim": 4,
        "model.proprio_dim": 5,
        **{f"data.{key}": value for key, value in data.items()},
    }
    return synthetic.make_config(**data)


def transform(**data):
    return actions.from_config(config(**data))


EVERYTHING = dict(
    delta_mask=(True, False, False, False),
    action_as=("absolute", "delta_state", "delta_previous", "absolute"),
    action_state_dims=(0, 4, 0, 0),
    gripper_dims=(3,),
    gripper_closed_open=(0.08, -0.02),
)


def test_forward_by_hand():
    x = transform(**EVERYTHING).forward(ACTIONS, STATE, REAL)
    np.testing.assert_array_equal(x[..., 0], ACTIONS[..., 0])
    np.testing.assert_allclose(x[..., 1], ACTIONS[..., 1] - STATE[:, 4:])
    np.testing.assert_allclose(x[:, 0, 2], ACTIONS[:, 0, 2] - STATE[:, 0])
    np.testing.assert_allclose(x[:, 1:, 2], np.diff(ACTIONS[..., 2], axis=1))
    np.testing.assert_allclose(x[..., 3], (0.08 - ACTIONS[..., 3]) / 0.1, rtol=1e-5)
    ends = np.zeros((1, 2, 4), np.float32)
    ends[0, :, 3] = 0.08, -0.02
    np.testing.assert_allclose(
        transform(**EVERYTHING).forward(ends, STATE[:1], REAL[:1, :2])[0, :, 3], [0, 1], atol=1e-6
    )


@pytest.mark.parametrize("kind", ["absolute", "delta_state", "delta_previous"])
@pytest.mark.parametrize("state_dims", [(), (4, 0, 0, 1)])
def test_there_and_back(kind, state_dims):
    pair = transform(action_as=(kind,) * 4, action_state_dims=state_dims)
    back = pair.inverse(pair.forward(ACTIONS, STATE, REAL), STATE)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, ACTIONS, atol=1e-6)


def test_under_jit_and_for_a_single_window():
    pair = transform(**EVERYTHING)
    x = pair.forward(ACTIONS, STATE, REAL)
    np.testing.assert_allclose(jax.jit(pair.forward)(ACTIONS, STATE, REAL), x, atol=1e-6)
    back = jax.jit(pair.inverse)(x, STATE)
    np.testing.assert_allclose(back, ACTIONS, atol=1e-6)
    np.testing.assert_allclose(pair.inverse(x[1], STATE[1]), back[1], atol=1e-6)


def test_padded_steps():
    """Deltas of the data stop, targets and grippers are held: whatever the representation."""
    window = windows_lib.window_at(length=6, start=3, num_frames=9, stride=2, horizon=6)
    chunk = ACTIONS[0, window.actions]
    x = transform(**EVERYTHING).forward(chunk, STATE[0], window.action_is_pad)
    padded = x[window.action_is_pad]
    assert len(padded) == 3
    np.testing.assert_array_equal(padded[:, 0], 0)
    np.testing.assert_allclose(padded[:, 1], chunk[2, 1] - STATE[0, 4], atol=1e-6)
    np.testing.assert_array_equal(padded[:, 2], 0)
    np.testing.assert_array_equal(padded[:, 3], x[2, 3])
    back = transform(**EVERYTHING).inverse(x, STATE[0])
    np.testing.assert_allclose(back[:, 1:], chunk[:, 1:], atol=1e-6)  # a zeroed delta stays zero


def test_snap_gives_the_nearer_end():
    pair = transform(gripper_dims=(1, 3), gripper_closed_open=(1, -1), gripper_snap=True)
    x = np.full((1, 5, 4), 0.3, np.float32)
    x[..., 3] = [-0.2, 0.4, 0.5, 0.6, 1.3]
    back = pair.inverse(x, STATE[:1])
    np.testing.assert_array_equal(back[0, :, 3], [1, 1, -1, -1, -1])
    np.testing.assert_array_equal(back[0, :, 1], 1)
    np.testing.assert_array_equal(back[..., [0, 2]], x[..., [0, 2]])
    ends = pair.forward(back, STATE[:1], REAL[:1, :5])
    np.testing.assert_array_equal(ends[0, :, 3], [0, 0, 1, 1, 1])


def test_identity_touches_nothing():
    assert transform().forward(ACTIONS, STATE, REAL) is ACTIONS
    assert transform().inverse(ACTIONS, STATE) is ACTIONS
    assert transform(
        delta_mask=(True,) * 4, action_as=("absolute",) * 4, gripper_dims=()
    ).is_identity
    assert not transform(gripper_dims=(3,), gripper_closed_open=(1, -1)).is_identity
    assert not transform(action_as=("delta_state",) * 4).is_identity


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            dict(delta_mask=(True,) * 4, action_as=("delta_state",) * 4),
            "delta_mask says .* action 0 ",
        ),
        (
            dict(action_as=("delta_previous",) * 4, action_state_dims=(0, 1, 5, 2)),
            "action 2 is 'delta_previous' to state 5, and there are 5 states: .*action_state_dims",
        ),
        (
            dict(action_as=("delta_state",) * 4, gripper_dims=(3,)),
            "gripper_dims names action 3, which is a delta by config.data.action_as",
        ),
        (dict(delta_mask=(True,) * 4, gripper_dims=(3,)), "a delta by config.data.delta_mask"),
        (dict(gripper_dims=(4,)), r"gripper_dims names \[4\]; the actions have dimensions 0 to 3"),
        (
            dict(gripper_dims=(3,), gripper_closed_open=(1.0, 1.0)),
            "gripper_closed_open .* different",
        ),
        (dict(gripper_snap=True), "gripper_snap=True without config.data.gripper_dims"),
    ],
)
def test_contradictions_name_the_key(keys, message):
    with pytest.raises(ValueError, match=message):
        transform(**keys)


def test_kinds_are_of_what_the_robot_is_sent():
    """What the model sees as a difference is a target again when the robot gets it."""
    assert actions.kinds(config(**EVERYTHING)) == ("delta", "absolute", "absolute", "gripper")
    assert actions.kinds(config()) == ("absolute",) * 4
    told = ("delta", "delta", "absolute", "gripper")
    assert actions.kinds(config(action_kinds=told)) == told


@pytest.mark.parametrize(
    "dim, kind, key",
    [(0, "absolute", "delta_mask"), (1, "delta", "action_as"), (3, "absolute", "gripper_dims")],
)
def test_kinds_that_other_keys_contradict_are_refused(dim, kind, key):
    kinds = ["delta", "absolute", "absolute", "gripper"]
    assert actions.kinds(config(**EVERYTHING, action_kinds=tuple(kinds))) == tuple(kinds)
    kinds[dim] = kind
    with pytest.raises(ValueError, match=f"action {dim} is '{kind}', config.data.{key} makes it"):
        config(**EVERYTHING, action_kinds=tuple(kinds))


def test_statistics_are_of_what_the_model_sees():
    """Windows written out by hand; padded deltas count as they are in the data."""
    pair = transform(**EVERYTHING)
    made = [
        episodes.ArrayEpisode(
            f"e{k}",
            10.0,
            "",
            RNG.normal(size=(n, 5)).astype(np.float32),
            RNG.normal(size=(n, 4)).astype(np.float32),
            {},
        )
        for k, n in enumerate((9, 1, 30))
    ]
    got = normalize.fit_statistics(made, 6, pair)["action"]["default"]
    chunks = []
    for episode in made:
        windows = [
            windows_lib.window_at(episode.length, start, 9, 2, 6) for start in range(episode.length)
        ]
        chunks.append(
            np.stack(
                [
                    pair.forward(episode.action[w.actions], episode.state[start], np.zeros(6, bool))
                    for start, w in enumerate(windows)
                ]
            ).astype(np.float64)
        )
    means = np.stack([chunk.mean(0) for chunk in chunks])
    variances = np.stack(
        [chunk.var(0, ddof=1) if len(chunk) > 1 else 0 * chunk[0] for chunk in chunks]
    )
    wanted = {
        "global_min": np.concatenate(chunks).min((0, 1)),
        "stepwise_max": np.concatenate(chunks).max(0),
        "global_q01": np.stack([np.quantile(c, 0.01, axis=0) for c in chunks]).min((0, 1)),
        "stepwise_q99": np.stack([np.quantile(c, 0.99, axis=0) for c in chunks]).max(0),
        "global_mean": means.mean((0, 1)),
        "global_std": np.sqrt((variances + (means - means.mean((0, 1))) ** 2).mean((0, 1))),
    }
    for key, values in wanted.items():
        exact = 1e-5 if "q" in key else 1e-12  # the reference's ranks are float32
        np.testing.assert_allclose(got[key], values, rtol=exact, atol=exact, err_msg=key)


def test_a_smaller_robot_loads_into_a_larger_action_space(tmp_path, monkeypatch):
    """7 actions and 8 states in a model of 14 and 14: statistics, cache and batches fit."""
    made = synthetic.make_config(
        tmp_path,
        **{
            "model.action_dim": 14,
            "model.proprio_dim": 14,
            "data.action_dim": 7,
            "data.state_dim": 8,
            "data.action_as": ("delta_state",) * 6 + ("absolute",),
        },
    )
    monkeypatch.setattr(episodes, "read", lambda config: (synthetic.make_episodes(3), []))
    monkeypatch.setattr(doctor_report, "write", lambda report, directory: [directory])  # slow
    precompute.precompute(made, ("stats", "text", "latents"))
    _, state, action = assets.load_normalizers(assets.assets_directory(made), made)
    source, pair = latent_cache.open_cache(made).source("train"), actions.from_config(made)
    iterator = loader.train_loader(made)
    for batch in itertools.islice(iterator, 1):
        spec.check_batch(batch, made)
        for row, index in enumerate(batch["index"]):
            record = source[int(index)]
            wanted = action.normalize(
                pair.forward(record["actions"], record["proprio"], record["action_is_pad"])
            )
            np.testing.assert_allclose(batch["actions"][row, :, :7], wanted, atol=1e-6)
            np.testing.assert_array_equal(batch["actions"][row, :, 7:], 0)
            np.testing.assert_allclose(
                batch["proprio"][row, :8], state.normalize(record["proprio"]), atol=1e-6
            )
            np.testing.assert_array_equal(batch["proprio"][row, 8:], 0)
    iterator.close()
