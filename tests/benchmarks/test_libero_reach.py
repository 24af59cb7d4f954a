"""Whether a hand follows the thing: made-up episodes whose answer is known."""

import numpy as np
import pytest

from benchmarks import libero_reach


def episodes(follows, offset=0.0):
    """Two tasks whose things lie apart; the hand goes `follows` of the way with each of them."""
    rng, rows = np.random.default_rng(0), []
    for task, middle in (("a", [0.0, 0.2]), ("b", [0.3, -0.1])):
        for number in range(20):
            moved = rng.uniform(-0.01, 0.01, 2)
            reach = np.add(np.add(middle, follows * moved), [offset * (number % 2), 0])
            rows.append((task, number % 2 == 0, np.add(middle, moved), reach))
    return rows


@pytest.mark.parametrize("follows", [0.0, 0.5, 1.0])
def test_slope_is_that_within_a_task(follows):
    found = libero_reach.describe(episodes(follows))
    assert found["follows"] == pytest.approx(follows, abs=1e-3) and found["episodes"] == 40
    np.testing.assert_allclose(found["thing_spread_cm"], [0.58, 0.58], atol=0.1)


def test_offsets_are_of_solved_and_failed_apart():
    found = libero_reach.describe(episodes(1.0, offset=0.03))
    assert found["offset_cm"] == {"solved": 0.0, "failed": 3.0}
    solved = [row for row in episodes(1.0) if row[1]]
    assert libero_reach.describe(solved)["offset_cm"] == {"solved": 0.0}
