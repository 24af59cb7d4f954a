"""Open-loop errors of a stand-in policy against sums worked out by hand; their tables, images."""

import contextlib
import dataclasses
import json
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lightwam_jax import html_report
from lightwam_jax.data import normalize
from lightwam_jax.evaluation import open_loop
from tests.evaluation.test_report import Drawn
from tests.evaluation.test_stitched import episode
from tests.inference.test_policy import make_config


class Nothing:
    """A model of six actions that always plans zeros; keeps which latents it was given."""

    def __init__(self):
        self.latents = []

    def apply(self, variables, latents, context, proprio, horizon, mask, method):
        assert (horizon, mask, method) == (3, None, "act")
        self.latents.append(latents)
        return jnp.zeros((len(latents), horizon, 6)), {}


def stand_in(**codec):
    """A `Policy` for a robot of two actions in a model of six."""
    config = make_config({"action_dim": 2, "gripper_dims": (1,)}, action_dim=6, proprio_dim=9)
    loss = dataclasses.replace(config.loss, mask_text_padding=False)
    table = {"global_min": [-1.0, -1.0], "global_max": [1.0, 3.0]}
    assets = types.SimpleNamespace(
        statistics={"action": {"default": table}},
        # normalised = scale * physical + offset; the sign of a scale is none of an error
        action=normalize.Normalizer(np.float32([2.0, -0.5]), np.float32([0.0, 0.5])),
        codec=types.SimpleNamespace(**codec),
    )
    return types.SimpleNamespace(
        model=Nothing(),
        params={},
        config=dataclasses.replace(config, loss=loss),
        assets=assets,
    )


def batch(*rows, pad, valid, **more):
    """Two rows of recorded actions [3,2] each, padded to six dimensions."""
    actions = np.zeros((2, 3, 6), np.float32)
    actions[..., :2] = rows
    return {
        "latents": np.zeros((2, 1, 2, 4, 8), ml_dtypes.bfloat16),
        "context": np.zeros((2, 5, 32), np.float32),
        "context_mask": np.ones((2, 5), bool),
        "proprio": np.zeros((2, 9), np.float32),
        "actions": actions,
        "action_is_pad": np.array(pad),
        "index": np.arange(2),
        "valid": np.array(valid),
    } | more


WHOLE, SHORT = [False] * 3, [False, True, True]


def two_batches():
    first = [[1, -1], [2, -1], [3, 1]], [[-5, 0], [9, 9], [9, 9]]  # 9: past the end
    second = [[2, 0.5], [0, 0.5], [0, 0.5]], [[7, 7], [7, 7], [7, 7]]  # 7: fills the batch
    return [
        batch(*first, pad=[WHOLE, SHORT], valid=[True, True]),
        batch(*second, pad=[WHOLE, WHOLE], valid=[True, False]),
    ]


def test_errors_are_means_over_real_steps_of_the_robots_own_dimensions():
    got = open_loop.evaluate(stand_in(), two_batches())
    # Step 0: 1, -5, 2 and -1, 0, 0.5; step 1: 2, 0 and -1, 0.5; step 2: 3, 0 and 1, 0.5.
    by_step = [[8 / 3, 0.5], [1, 0.75], [1.5, 0.75]]
    np.testing.assert_allclose(got["l1_step_dim"], by_step, rtol=1e-6)
    np.testing.assert_allclose(got["l1_step"], [19 / 12, 0.875, 1.125], rtol=1e-6)
    np.testing.assert_allclose(got["l1"], [13 / 7, 4.5 / 7], rtol=1e-6)
    np.testing.assert_allclose(got["mse"], [43 / 7, 3.75 / 7], rtol=1e-6)
    np.testing.assert_allclose(got["l1_physical"], [6.5 / 7, 9 / 7], rtol=1e-6)
    assert (got["steps"], got["samples"]) == (7, 3)
    # The gripper's middle is 1, which is normalised 0: only the first row crosses it.
    assert got["grippers"] == {"1": {"changing": 1, "still": 1, "found": 0.0, "spurious": 0.0}}


def test_of_images_the_first_is_encoded_as_the_cache_would():
    encoded = []

    def encode(video):
        encoded.append(video)
        return np.full((2, 1, 2, 4, 8), 1 / 3, np.float32)

    policy, (one, _) = stand_in(encode=encode), two_batches()
    del one["latents"]
    one["video"] = np.arange(2 * 9, dtype=np.uint8).reshape(2, 9, 1, 1, 1) * np.ones(3, np.uint8)
    open_loop.evaluate(policy, [one])
    np.testing.assert_array_equal(encoded[0], one["video"][:, :1])
    assert policy.model.latents[0].shape == (2, 1, 2, 4, 8)


def test_nothing_to_evaluate_is_an_error():
    first, second = two_batches()
    second["valid"][:] = False
    padded = first | {"action_is_pad": np.ones((2, 3), bool)}
    for batches in ([], [second], [padded]):
        with pytest.raises(ValueError, match="validation split is empty"):
            open_loop.evaluate(stand_in(), batches)


def test_open_loop_tables_and_images(tmp_path):
    by_dim = np.array([[0.05, 0.15], [0.1, 0.2], [0.15, 0.25]])
    timing = {
        "changing": 4,
        "still": 2,
        "found": 0.75,
        "offset": -1.0,
        "offset_abs": 1.0,
        "spurious": 0.5,
    }
    errors = {
        "l1": np.array([0.1, 0.2]),
        "mse": np.array([0.01, 0.04]),
        "samples": 5,
        "l1_step": np.array([0.1, 0.15, 0.2]),
        "l1_physical": np.array([1.0, 4.0]),
        "l1_step_dim": by_dim,
        "gripper_offsets": np.array([[0, 3, 0, 0, 0]]),
        "grippers": {"1": timing},
    }
    dimensions, steps, grippers = open_loop.write(tmp_path, errors).split("\n\n")
    assert "0.1500" in dimensions.splitlines()[-1] and "4.0000" in dimensions
    assert steps.splitlines()[1].split() == ["L1", "0.1000", "0.1500", "0.2000"]
    assert grippers.splitlines()[1].split() == ["1", "4", "0.750", "-1.000", "1.000", "2", "0.500"]
    written = json.loads((tmp_path / "open_loop.json").read_text(encoding="utf-8"))
    assert written["l1_step"] == [0.1, 0.15, 0.2] and written["l1_step_dim"] == by_dim.tolist()
    assert written["grippers"] == {"1": timing}
    names = ("open_loop.png", "open_loop_dimensions.png", "open_loop_gripper.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_a_long_chunk_is_shown_in_eight_steps_with_both_ends():
    errors = {"l1_step": np.arange(32) / 100}
    head, row = open_loop._step_table(errors)
    # 31 / 7 apart: 0, 4.4, 8.9, 13.3, 17.7, 22.1, 26.6, 31
    assert head.split() == ["step", "0", "4", "9", "13", "18", "22", "27", "31"]
    assert row.split()[1:] == [f"{k / 100:.4f}" for k in (0, 4, 9, 13, 18, 22, 27, 31)]


def test_images_show_steps_from_left_to_right_and_offsets_around_zero(monkeypatch):
    axes = Drawn()
    monkeypatch.setattr(html_report, "chart", lambda *args, **kwargs: contextlib.nullcontext(axes))
    l1 = np.arange(6.0).reshape(3, 2)
    open_loop._heatmap("", l1, np.array([0.25, 0.5]))
    ((image,), keywords) = axes.of("imshow")[0]
    np.testing.assert_array_equal(image, [[0, 2, 4], [1, 3, 5]])
    assert keywords["vmin"] == 0
    assert axes.of("set_yticks")[0][0][1] == ["0   (mean 0.250)", "1   (mean 0.500)"]
    offsets, charts = np.array([[0, 3, 0, 0, 1], [1, 0, 0, 0, 0]]), np.array([Drawn(), Drawn()])
    monkeypatch.setattr(
        html_report, "chart", lambda *args, **kwargs: contextlib.nullcontext(charts)
    )
    open_loop._offsets("", offsets, {"3": {"changing": 6}, "7": {"changing": 1}})
    for one, counts, title in zip(
        charts, offsets, ("6 recorded changes, 2", "1 recorded changes, 0")
    ):
        ((steps, heights), _) = one.of("bar")[0]
        assert steps.tolist() == [-2, -1, 0, 1, 2]
        np.testing.assert_array_equal(heights, counts)
        assert title in one.of("set_title")[0][0][0]


def test_open_loop_without_grippers_says_so(tmp_path):
    errors = {
        "l1": np.ones(2),
        "mse": np.ones(2),
        "samples": 5,
        "l1_step": np.ones(3),
        "l1_physical": np.ones(2),
        "l1_step_dim": np.ones((3, 2)),
        "grippers": {},
    }
    assert "no action dimension is known to be a gripper" in open_loop.write(tmp_path, errors)
    assert not (tmp_path / "open_loop_gripper.png").exists()


@pytest.mark.parametrize("gone", [True, False])
def test_the_report_needs_the_cache_alone(gone, monkeypatch, tmp_path):
    policy, asked = stand_in(), []
    policy.step = 3

    def load(config):
        if gone:
            raise FileNotFoundError("data/x is not a directory of episodes")
        return [episode("a", [[0, 0]] * 4), episode("b", [[0, 1]] * 4)]

    def evaluate(policy, train, held_out, most):
        asked.append((len(train), len(held_out), most))
        return [], None

    data = dataclasses.replace(policy.config.data, source="hdf5", val_fraction=0.5)
    policy.config = dataclasses.replace(policy.config, data=data)
    monkeypatch.setattr(open_loop.episodes_lib, "load_episodes", load)
    monkeypatch.setattr(open_loop.stitched, "evaluate", evaluate)
    errors = open_loop.evaluate(policy, two_batches())
    said = open_loop.report(tmp_path, errors, policy)
    page = (tmp_path / "open_loop.html").read_text(encoding="utf-8")
    assert asked == ([] if gone else [(1, 1, 12)])
    assert ("data/x is not a directory" in said) == ("data/x is not a directory" in page) == gone
    assert (tmp_path / "open_loop.json").exists() and "L1, normalised units" in page
