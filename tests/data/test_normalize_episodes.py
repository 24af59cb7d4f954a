"""Statistics of two tiny episodes, worked out by hand."""

import numpy as np
import pytest

from lightwam_jax.data import episodes, normalize


def episode(*values):
    column = np.float32(values)[:, None]
    return episodes.ArrayEpisode("e", 10.0, "go", column, column, {})


def test_every_number_of_the_table():
    table = normalize.fit_statistics([episode(0, 2, 4), episode(10, 10, 13)], 1)
    state = {name: np.squeeze(x) for name, x in table["state"]["default"].items()}
    # Means 2 and 11, unbiased variances 4 and 3; 4.5 lies between each mean and that of both.
    assert state["global_mean"] == pytest.approx(6.5)
    assert state["global_std"] == pytest.approx(np.sqrt((4 + 3) / 2 + 4.5**2))
    # Quantiles at 0.02 and 1.98 of the three sorted values.
    assert state["global_q01"] == pytest.approx(0.04, abs=1e-5)
    assert state["global_q99"] == pytest.approx(12.94, abs=1e-5)
    assert (state["global_min"], state["global_max"]) == (0, 13)
    for name in ("min", "max", "mean", "std", "q01", "q99"):  # of one step they are the same
        assert state[f"stepwise_{name}"] == pytest.approx(state[f"global_{name}"]), name
    assert table["num_episodes"] == 2 and table["num_transition"] == 6


def test_each_step_of_the_chunk_has_its_own_extremes():
    action = normalize.fit_statistics([episode(0, 1, 2), episode(5, 6, 9)], 2)["action"]["default"]
    # From every step on, the values now and one step later; the last one is repeated.
    assert np.ravel(action["stepwise_min"]).tolist() == [0, 1]
    assert np.ravel(action["stepwise_max"]).tolist() == [9, 9]
    np.testing.assert_allclose(np.ravel(action["stepwise_mean"]), [23 / 6, 29 / 6], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(action["stepwise_q01"]), [0.02, 1.02], atol=1e-5)
