"""The latency benchmark: what it times, and how it tells."""

import math
import re
import types

import numpy as np
import pytest

from benchmarks import action_pass, latency, random_policy
from configs import libero
from lightwam_jax.inference import latency as latency_lib
from tests import synthetic


def stub(config):
    """A policy that plans nothing, and the observations that it was given."""
    seen = []
    return types.SimpleNamespace(config=config, act=lambda *observed: seen.append(observed)), seen


def test_a_policy_is_timed_on_what_it_expects():
    config = synthetic.make_config()
    policy, seen = stub(config)
    observed = latency_lib.observation(config, 3, (40, 60))
    assert len(latency_lib.measure(policy, observed, calls=4)) == len(seen) == 4
    images, state, prompts = seen[0]
    assert set(images) == set(config.data.cameras) and len(prompts) == 3
    assert {(x.shape, x.dtype) for x in images.values()} == {((3, 40, 60, 3), np.dtype(np.uint8))}
    assert state.shape == (3, config.model.proprio_dim)
    assert len(latency_lib.measure(policy, observed, calls=4, seconds=0)) == 1  # at least one


def test_one_line_says_it_all():
    policy, _ = stub(synthetic.make_config())
    said = latency_lib.line(policy, 2)
    assert re.fullmatch(r"latency p50 \d+\.\d ms, p95 \d+\.\d ms at batch 2 on \S+", said)
    assert latency_lib.percentiles([0.001] * 9 + [0.101]) == {
        "p50_ms": pytest.approx(1.0),
        "p95_ms": pytest.approx(1.0 + 0.55 * 100),
    }


def test_the_table_has_a_line_per_row():
    parts = dict.fromkeys(latency.PARTS, 1.25)
    row = {"batch": 8, "size": "480x640", "cold_s": 3.0, "p50_ms": 2.0, "p95_ms": 4.5}
    lines = latency.table([row | {"parts_ms": parts}, row | {"cold_s": None, "parts_ms": parts}])
    head, first, second = (line.split() for line in lines.splitlines())
    assert head[-len(parts) :] == list(latency.PARTS)
    assert first == ["8", "480x640", "3.0", "2.00", "4.50", *["1.25"] * len(parts)]
    assert second == first[:2] + first[3:]


@pytest.mark.slow
def test_a_policy_with_random_weights_acts_and_its_parts_are_timed():
    config = action_pass.config_of(libero.get_config("spatial"), tiny=True)
    policy = random_policy.make(config)
    rows = latency.measure(policy, [2], [(32, 32), (48, 40)], calls=2)
    assert [(row["batch"], row["size"]) for row in rows] == [(2, "32x32"), (2, "48x40")]
    assert rows[0]["cold_s"] > rows[0]["p50_ms"] / 1000 and rows[1]["cold_s"] is None
    for row in rows:
        assert set(row["parts_ms"]) == set(latency.PARTS)
        numbers = (row["p50_ms"], row["p95_ms"], *row["parts_ms"].values())
        assert all(math.isfinite(x) and x > 0 for x in numbers)
    actions = policy.act(*latency_lib.observation(policy.config, 2))
    assert actions.shape == (2, 32, 7) and np.isfinite(actions).all() and actions.std() > 0
