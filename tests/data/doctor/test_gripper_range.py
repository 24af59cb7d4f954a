"""The declared gripper against the data, and what normalisation does to rare values."""

import types

import numpy as np
import pytest

from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes, normalize
from lightwam_jax.data.doctor import columns, examine, gripper_range


def recorded(*grippers):
    """An episode per column of gripper values; the first action dimension moves."""
    out = []
    for number, values in enumerate(grippers):
        action = np.stack([np.arange(len(values)), values], 1).astype(np.float32)
        out.append(episodes.ArrayEpisode(f"e{number}", 10.0, "task", action, action, {}))
    return out


def problems(made, closed_open, dims=(1,)):
    data = types.SimpleNamespace(gripper_dims=dims, gripper_closed_open=closed_open)
    return gripper_range.examine(made, data, "there")


HALF = np.arange(40) % 20 < 10


@pytest.mark.parametrize(
    "values, closed_open, words",
    [
        (np.where(HALF, 0, 100), (0.0, 1.0), ["outside", "100", "e0, frame 10", "open is never"]),
        (np.where(HALF, 0, 1), (1.0, -1.0), ["0 in 50.0%", "1 in 50.0%", "open is never reached"]),
        (np.where(HALF, -1, 1), (0.0, 1.0), ["-1 in 50.0%", "closed is never", "lie outside"]),
        (np.where(HALF, 0.4, 0.6), (0.0, 1.0), ["closed and open are never reached"]),
        (np.linspace(0, 0.8, 40), (0.0, 1.0), ["0 to 0.8", "open is never reached"]),
        (np.full(40, 0.0), (0.0, 1.0), ["open is never reached"]),
    ],
)
def test_values_that_do_not_fit_the_declared_range_are_named(values, closed_open, words):
    (found,) = problems(recorded(values), closed_open)
    assert found.severity == "warning" and found.kind in examine.ADVICE
    assert all(word in found.message for word in ["action[1]", "gripper_closed_open", *words])


def test_one_value_outside_names_its_episode():
    ends = np.where(HALF, -1, 1)
    odd = np.where(np.arange(40) // 5 == 3, 2, ends)
    (found,) = problems(recorded(ends, odd), (1.0, -1.0))
    assert (found.episode, found.frame) == ("e1", 15) and "5 of 80 steps" in found.message


@pytest.mark.parametrize(
    "values, closed_open",
    [
        (np.where(HALF, -1, 1), (1.0, -1.0)),
        (np.where(HALF, 0, 1), (0.0, 1.0)),
        (np.linspace(0.02, 1.03, 40), (0.0, 1.0)),
    ],
)
def test_grippers_as_declared_give_no_warning(values, closed_open):
    assert problems(recorded(values), closed_open) == []
    assert problems(recorded(values), (5.0, 6.0), dims=()) == problems([], (5.0, 6.0)) == []


def test_the_released_recipe_declares_its_gripper_and_changes_no_action():
    from configs import libero
    from lightwam_jax.data import actions

    config = config_lib.from_config_dict(libero.get_config("spatial"))
    made = actions.from_config(config)
    assert made.gripper_dims == (6,) and made.closed_open == (0.0, 1.0) and made.is_identity


def test_clipped_values_are_a_warning_and_equal_quantiles_name_the_dimension():
    column = columns.Column("action", 6, 0, 100, 0.5, 7, 0, 1, 0.005, 0.01, "", 0.005)
    data = types.SimpleNamespace(normalization="quantile", path="there")
    (found,) = columns.clipped([column], data)
    assert "clips 0.50% of action[6]" in found.message and found.kind in examine.ADVICE
    assert "Normalise by" not in examine.ADVICE["near-constant dimension"]
    made = recorded(np.where(np.arange(400) // 2 == 100, 100, 0))
    statistics = normalize.fit_statistics(made, 1)
    warned = " ".join(normalize.warnings(statistics, "quantile"))
    assert "state[1] is 0 at its" in warned and "action[1]" in warned and "0 to 100" in warned
