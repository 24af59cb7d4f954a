"""Gripper timing: what counts as a change, and which dimensions are grippers."""

import dataclasses

import jax
import numpy as np
import pytest

from lightwam_jax import envs
from lightwam_jax.data import normalize
from lightwam_jax.training import gripper_timing, losses
from tests import synthetic

ONE = gripper_timing.Gripper("1", 1, 0.0)


def chunks(*rows):
    """ "--++" -> f32 [B,T,2]: the gripper, dimension 1, below and above the middle."""
    states = np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows], np.float32)
    return np.stack([np.zeros_like(states), states], axis=-1)


def timing(predicted, recorded, valid=None, gripper=ONE, **kwargs):
    """Totals and summary of windows written as signs."""
    valid = np.ones((len(recorded), len(recorded[0])), bool) if valid is None else valid
    count = jax.jit(lambda *args: gripper_timing.timing(*args, [gripper], **kwargs))
    totals = jax.device_get(count(chunks(*predicted), chunks(*recorded), valid))
    return totals, gripper_timing.summary(totals, [gripper])[gripper.name]


def test_offset_is_predicted_minus_recorded_step():
    totals, numbers = timing(["----++", "-+++++", "---+++"], ["---+++"] * 3)
    assert totals["gripper_offsets"].shape == (1, 11)
    assert totals["gripper_offsets"][0, 5 + 1] == totals["gripper_offsets"][0, 5 - 2] == 1
    assert numbers == {
        "changing": 3,
        "still": 0,
        "found": 1.0,
        "offset": pytest.approx(-1 / 3),
        "offset_abs": pytest.approx(1.0),
    }


def test_only_a_change_of_the_same_kind_is_found_and_the_nearest_one():
    totals, numbers = timing(["+++---", "------", "-+-+-+"], ["---+++"] * 3)
    assert numbers["found"] == pytest.approx(1 / 3) and totals["gripper_offsets"][0, 5] == 1
    assert numbers["offset"] == numbers["offset_abs"] == 0
    assert timing(["++++--"], ["++----"])[1]["offset"] == 2, "closing counts as opening does"


def test_changes_out_of_nothing_are_spurious():
    _, numbers = timing(["--+---", "------", "++++++"], ["------", "------", "++++++"])
    assert numbers == {"changing": 0, "still": 3, "spurious": pytest.approx(1 / 3)}


def test_padded_steps_and_repeated_rows_count_for_nothing():
    valid = np.ones((3, 6), bool)
    valid[0, 3:] = False  # the change at 3 is padding
    valid[1] = False  # a row that fills up the batch
    totals, numbers = timing(["--+---", "---+++", "---+++"], ["---+++"] * 3, valid)
    assert numbers["changing"] == numbers["still"] == 1 and numbers["spurious"] == 1.0
    assert totals["gripper_offsets"].sum() == totals["gripper_offsets"][0, 5] == 1


def test_of_a_mixture_only_the_windows_of_its_data_set_count():
    dataset = np.array([0, 1, 1])
    gripper = gripper_timing.Gripper("b/1", 1, 0.0, dataset=1)
    _, numbers = timing(
        ["---+++"] * 3, ["---+++", "--++++", "---+++"], None, gripper, dataset=dataset
    )
    assert numbers["changing"] == 2 and numbers["offset"] == 0.5


def test_grippers_are_named_by_the_config_or_the_suite():
    for name, dims in gripper_timing.OF_SUITE.items():
        action = envs.suite(name).ACTION
        assert dims == tuple(i for i, each in enumerate(action) if each == "gripper"), name
    assert gripper_timing.dims(synthetic.make_config(**{"evaluation.suite": "demo"})) == (3,)
    assert gripper_timing.dims(synthetic.make_config()) == ()
    assert gripper_timing.dims(synthetic.make_config(**{"data.gripper_dims": (6,)})) == (6,)


@pytest.mark.parametrize("mode", ["min_max", "z_score", "none"])
def test_middle_is_that_of_the_range_whatever_the_normalisation(mode):
    config = synthetic.make_config(**{"data.normalization": mode, "data.gripper_dims": (2, 0)})
    episode = synthetic.make_episodes(1)[0]
    action = episode.action.copy()
    action[:, 2] = np.arange(len(action)) == 0  # 0 and 1, mostly 0
    action[:, 0] = 0.5
    episode = dataclasses.replace(episode, action=action)
    statistics = normalize.fit_statistics([episode], 8)
    normalizer = normalize.from_statistics(statistics, "action", config.data)
    found = gripper_timing.of_data(config, statistics, normalizer)
    assert [g.dim for g in found] == [2], "one that never moves is no gripper"
    below, above = normalizer.normalize(np.array([[0.49] * 7, [0.51] * 7]))[:, 2]
    assert below < found[0].middle < above


def test_a_suite_s_gripper_that_the_data_lack_is_an_error():
    config = synthetic.make_config(**{"evaluation.suite": "demo"})
    statistics = {"action": {"default": {"global_min": [0.0, 0.0], "global_max": [1.0, 1.0]}}}
    with pytest.raises(ValueError, match=r"action 3 should be a gripper .* actions 0 to 1"):
        gripper_timing.of_data(config, statistics, normalize.min_max([0.0, 0.0], [1.0, 1.0]))


def test_the_training_log_has_numbers_per_gripper():
    totals, numbers = timing(["----++"], ["---+++"])
    means = {
        "l1": np.array([1.0, 3.0]),
        "mse": np.ones(2),
        "l1_step": np.ones(6),
        "steps": 6,
        "l1_step_dim": np.ones((6, 2)),
        **totals,
    }
    row = losses.validation_row(means, [ONE])
    assert row["gripper/1/offset"] == numbers["offset"] == 1 and row["gripper/1/changing"] == 1
    assert "gripper/1/spurious" not in row, "a share of nothing"
    assert row["l1_mean"] == 2 and set(row) >= {"l1", "mse", "l1_step", "steps", "mse_mean"}
