"""Normalisers and statistics; the reference's numbers are checked by `test_golden.py`."""

import json
import pathlib
import types

import numpy as np
import pytest

from lightwam_jax import atomic
from lightwam_jax.data import episodes, normalize
from tests import synthetic

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "h_data"


def mode(name, low=-1.0, high=1.0):
    return types.SimpleNamespace(normalization=name, normalization_range=(low, high))


def test_modes_by_hand():
    table = {
        f"global_{key}": [value, 10 * value]
        for key, value in dict(min=-4.0, max=4.0, q01=-2.0, q99=2.0, mean=1.0, std=0.5).items()
    }
    statistics, x = {"state": {"default": table}}, np.float32([[2, 20]])
    for name, wanted in dict(
        min_max=0.5, quantile=1, z_score=2, z_score_reference=2, constants=0.2, none=2
    ).items():
        made = normalize.from_statistics(statistics, "state", mode(name, -10, 10))
        y = made.normalize(x)
        assert y.dtype == np.float32 and made.inverse(y).dtype == np.float32
        np.testing.assert_allclose(y[0, 0], wanted, rtol=1e-6)
        if name not in ("constants", "none"):
            np.testing.assert_allclose(y[0, 1], wanted, rtol=1e-6)
        np.testing.assert_allclose(made.inverse(y), x, rtol=1e-6)
    assert set(normalize.MODES) == {
        "min_max",
        "quantile",
        "z_score",
        "z_score_reference",
        "constants",
        "none",
    }
    with pytest.raises(ValueError, match="normalization is 'minmax'; expected one of min_max"):
        normalize.from_statistics(statistics, "state", mode("minmax"))
    with pytest.raises(ValueError, match=r"normalization_range is \(1.0, 1.0\); expected \(low"):
        normalize.from_statistics(statistics, "state", mode("constants", 1.0))


def test_normalize_clips_and_the_inverse_does_not():
    normalizer = normalize.min_max([-1, -1], [1, 1])
    np.testing.assert_array_equal(normalizer.normalize(np.float32([[9, -9]])), [[5, -5]])
    np.testing.assert_array_equal(normalizer.inverse(np.float32([[9, -9]])), [[9, -9]])
    untouched = normalize.from_statistics(
        normalize.fit_statistics(synthetic.make_episodes(2), 4), "action", mode("none")
    )
    far = np.full((1, 7), 90, np.float32)  # joint angles in degrees
    np.testing.assert_array_equal(untouched.normalize(far), far)


def still(length):
    """An episode whose second state and action never move."""
    ones = np.ones((length, 2), np.float32)
    ones[:, 0] = np.arange(length)
    return episodes.ArrayEpisode("still", 10.0, "task", 7 * ones, ones, {})


@pytest.mark.parametrize("length", [1, 6])
def test_every_mode_but_the_references_is_safe_for_constant_dimensions(length):
    statistics = normalize.fit_statistics([still(length)], horizon=4)
    moving = [] if length == 1 else [0]
    table = normalize.table_of(statistics, "state")
    constant = np.subtract(table["global_max"], table["global_min"]) < 1e-4
    assert np.flatnonzero(constant).tolist() == sorted({0, 1} - set(moving))
    assert normalize.describe(statistics).count("constant") == 2 * (2 - len(moving))
    for name in normalize.MODES:
        made = normalize.from_statistics(statistics, "state", mode(name, -10, 10))
        a_little = np.float32([[7, 7.01]])
        y = made.normalize(a_little)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(
            made.inverse(y)[0, 1], 7 if name == "z_score_reference" else 7.01, atol=1e-5
        )
        if name == "z_score_reference":
            assert y[0, 1] == 5
            assert normalize.unsafe_dimensions(statistics, "state", name) == sorted(
                {0, 1} - set(moving)
            )
        else:
            assert abs(y[0, 1]) <= (8 if name == "none" else 1)
            assert not normalize.unsafe_dimensions(statistics, "state", name)


def test_statistics_do_not_depend_on_the_shape_of_the_table():
    """A file of the release with a table per data key, joined in the order of the file."""
    whole = json.loads((GOLDEN / "dataset_stats.json").read_text(encoding="utf-8"))
    parts = {"zeta": {}, "alpha": {}}
    for key, values in whole["action"]["default"].items():
        values = np.asarray(values)
        parts["zeta"][key], parts["alpha"][key] = values[..., :5].tolist(), values[..., 5:].tolist()
    split = {**whole, "action": parts}
    assert normalize.table_of(split, "action") == whole["action"]["default"]
    a, b = (normalize.from_statistics(s, "action", mode("min_max")) for s in (split, whole))
    np.testing.assert_array_equal(a.scale, b.scale)
    del parts["alpha"]["global_max"]
    with pytest.raises(ValueError, match=r"tables \(zeta, alpha\) of different entries"):
        normalize.table_of(split, "action")


def test_statistics_survive_the_file_and_are_checked(tmp_path):
    statistics = normalize.fit_statistics(synthetic.make_episodes(), horizon=4)
    path = str(tmp_path / "dataset_stats.json")
    with pytest.raises(FileNotFoundError, match=r"make it with: .*--what stats"):
        normalize.read_statistics(path, 8, 7)
    atomic.write_json(path, statistics)
    assert normalize.read_statistics(path, 8, 7) == statistics
    with pytest.raises(ValueError, match=r"has 7 dimensions, config.model.action_dim is 14"):
        normalize.read_statistics(path, 8, 14)
    statistics["action"]["default"]["global_std"][3] = float("nan")
    atomic.write_json(path, statistics)
    with pytest.raises(ValueError, match="action global_std is not finite in dimension 3"):
        normalize.read_statistics(path, 8, 7)
    atomic.write_json(path, {"state": statistics["state"]})
    with pytest.raises(ValueError, match="no 'action' entry"):
        normalize.read_statistics(path, 8, 7)


def test_windows_share_the_memory_of_their_episode():
    """What keeps the statistics of a large dataset within memory, and their time within seconds:
    no window is a copy."""
    values = np.arange(300 * 7, dtype=np.float32).reshape(300, 7)
    windows = normalize._windows(values, 32)
    assert windows.shape == (7, 32, 300)
    repeated = np.concatenate([values, np.repeat(values[-1:], 31, axis=0)])
    for step in (0, 5, 31):
        np.testing.assert_array_equal(windows[:, step], repeated[step : step + 300].T)
    assert np.shares_memory(windows[:, 0], windows[:, 31])
    assert {abs(stride) for stride in windows.strides} == {4, 4 * 7}


def test_statistics_weigh_episodes_alike_and_repeat_their_last_action():
    """Two episodes of 2 and 4 steps, horizon 2, worked out by hand."""
    made = [
        episodes.ArrayEpisode(
            str(k), 10.0, "", np.float32(state)[:, None], np.float32(action)[:, None], {}
        )
        for k, (state, action) in enumerate((([1, 3], [0, 2]), ([5, 5, 5, 9], [4, 4, 4, 8])))
    ]
    got = normalize.fit_statistics(made, 2)
    assert (got["num_episodes"], got["num_transition"]) == (2, 6)
    state, action = got["state"]["default"], got["action"]["default"]
    # Means 2 and 6, unbiased variances 2 and 4; their own mean is 4, 2 away from each.
    assert (state["global_mean"], state["global_min"], state["global_max"]) == ([4], [1], [9])
    np.testing.assert_allclose(state["global_std"], [np.sqrt(3 + 4)])
    # Windows (0,2), (2,2) and (4,4), (4,4), (4,8), (8,8).
    assert action["stepwise_mean"] == [[(1 + 5) / 2], [(2 + 6) / 2]]
    assert action["stepwise_min"] == [[0], [2]] and action["stepwise_max"] == [[8], [8]]
    np.testing.assert_allclose(action["stepwise_std"][1], [np.sqrt((0 + 16 / 3) / 2 + 4)])
    assert (action["global_min"], action["global_mean"]) == ([0], [3.5])
    np.testing.assert_allclose(state["global_q01"], [1.02], rtol=1e-5)
    np.testing.assert_allclose(state["global_q99"], [8.88], rtol=1e-5)


def test_equal_quantiles_of_a_dimension_that_moves_fall_back_to_its_extremes():
    """A gripper that is 100 in half a percent of the steps; one that never moves; and others."""
    values = np.zeros((800, 4), np.float32)
    values[400:404, 0] = 100
    values[:, 2] = np.linspace(-1, 1, 800)
    values[400:404, 3] = -7
    one = episodes.ArrayEpisode("a", 10.0, "task", values, values, {})
    statistics = normalize.fit_statistics([one], 1)
    made = normalize.from_statistics(statistics, "action", mode("quantile"))
    x = np.float32([[100, 0, 0.5, -7], [0, 0, -0.5, 0]])
    np.testing.assert_allclose(made.normalize(x)[:, [0, 1, 3]], [[1, 0, -1], [-1, 0, 1]])
    np.testing.assert_allclose(made.inverse(made.normalize(x)), x, rtol=1e-6)
    table = statistics["action"]["default"]
    plain = normalize.min_max(table["global_q01"], table["global_q99"])
    np.testing.assert_array_equal(made.scale[1:3], plain.scale[1:3])
    np.testing.assert_array_equal(made.offset[1:3], plain.offset[1:3])
    alike = normalize.without_quantiles(statistics, "action", "quantile")
    assert alike == {0: (0.0, 0.0, 100.0), 3: (0.0, -7.0, 0.0)}
    assert normalize.without_quantiles(statistics, "action", "min_max") == {}
