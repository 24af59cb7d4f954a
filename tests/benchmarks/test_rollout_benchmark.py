"""How the benchmark of the rollout engine splits time."""

import numpy as np
import pytest

from benchmarks import rollout


def test_every_moment_is_one_of_three():
    one = np.array([(0.0, 2.0), (3.0, 5.0), (6.0, 7.0)])  # begins before the clock does
    two = np.array([(4.0, 6.0)])
    plans = np.array([(1.5, 2.5), (7.5, 8.0)])  # the first overlaps a simulation by 0.5
    found = rollout.split([one, two], plans, 1.0, 9.0)
    assert found["wall"] == 8.0
    assert found["simulating"] == pytest.approx(1 + 4)  # 1..2 and 3..7
    assert found["policy"] == pytest.approx(0.5 + 0.5)
    assert found["overhead"] == pytest.approx(0.5 + 0.5 + 1.0)  # 2.5..3, 7..7.5, 8..9
    assert found["simulating"] + found["policy"] + found["overhead"] == pytest.approx(8.0)
    assert found["balance"] == pytest.approx((4 + 2) / (2 * 5))


def test_processor_time_between_calls_is_the_engine_s():
    calls = np.array([(0, 0, 1.0, 2.0), (0, 0, 2.5, 4.0), (0, 0, 4.25, 5.0)])
    assert rollout.between(calls) == pytest.approx(0.75)
