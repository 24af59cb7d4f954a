"""The benchmark of the policy server: what it counts, and what it makes of that."""

import copy

import pytest

from benchmarks import serving
from tests import served

GOOD = {
    "one_client": {
        "act": {"p50_ms": 2.0},
        "overhead_ms": 0.9,
        "ratio": 1.45,
        "first_request_of_median": 2.0,
    },
    "clients": {
        "p95_of_act_p50": 4.0,
        "throughput_ratio": 1.5,
        "most_of_least_served": 1.1,
        "loop_lag_p99_ms": 12.0,
    },
    "compilations": {"of_the_policy": 0},
    "memory": {"last_of_first": 1.001},
}


class Compiling(served.StandIn):
    """Counts a compilation for each batch with a new prompt in it, as no policy should."""

    def act(self, images, state, prompts, **options):
        self.traces += any(prompt in self.encoded for prompt in prompts)
        return super().act(images, state, prompts, **options)


def test_a_run_counts_requests_and_compilations():
    policy = Compiling(seconds=0.002)
    quick = dict(requests=100, max_batch=2, mixed=40, seconds=0.2, blocks=1, calls=5, minutes=0.01)
    found = serving.measure(policy, **quick, heights=(16, 24))
    one, many, compiled = found["one_client"], found["clients"], found["compilations"]
    assert one["calls"] == 5 and one["act"]["p50_ms"] >= 2
    assert one["overhead_ms"] == pytest.approx(one["round_trip"]["p50_ms"] - one["act"]["p50_ms"])
    assert many["clients"] == 2 and many["requests_per_s"] > 0
    assert many["throughput_ratio"] == pytest.approx(
        many["requests_per_s"] / many["requests_per_s_max_batch_1"]
    )
    assert many["most_of_least_served"] >= 1
    assert compiled["requests"] == {"ok": 40}  # 20 of one client, 10 of each of two
    assert compiled["prompts_encoded"] == len(policy.encoded) == 18  # of 20, two are known
    assert compiled["of_the_policy"] == policy.traces > 0
    assert compiled["of_image_sizes"] == 2  # (16, 21) and (24, 32)
    rows = found["memory"]["rows"]
    # quarters of what is left after 10, rounded up to whole jobs of two clients
    assert [row["requests"] for row in rows] == [10, 32, 56, 78, 100]
    assert not found["targets"]["compilations"]["met"]
    steady = found["steady"]
    # 0.6 s in ten parts, in each of which at 30 Hz no more than three requests begin
    assert 10 <= steady["requests"] <= 30 and 0 <= steady["late"] <= steady["requests"]
    assert len(steady["rss_mib"]) == 10 and "steady_late" in found["targets"]


def test_targets_are_met_or_not():
    found = serving.targets(GOOD)
    assert len(found) == 9 and all(target["met"] for target in found.values())
    for part, key, value, name in (
        ("one_client", "overhead_ms", 1.1, "overhead_ms"),
        ("one_client", "ratio", 2.1, "overhead_ratio"),
        ("one_client", "first_request_of_median", 3.1, "first_request_of_median"),
        ("clients", "p95_of_act_p50", 4.6, "p95_of_act_p50"),
        ("clients", "throughput_ratio", 1.3, "throughput_ratio"),
        ("clients", "most_of_least_served", 1.3, "most_of_least_served"),
        ("clients", "loop_lag_p99_ms", 21.0, "loop_lag_p99_ms"),
        ("compilations", "of_the_policy", 1, "compilations"),
        ("memory", "last_of_first", 1.03, "memory"),
    ):
        bad = copy.deepcopy(GOOD)
        bad[part][key] = value
        assert [n for n, target in serving.targets(bad).items() if not target["met"]] == [name]


def test_a_slow_policy_is_held_to_a_ratio_alone():
    slow = copy.deepcopy(GOOD)
    slow["one_client"] |= {"act": {"p50_ms": 10.0}, "overhead_ms": 1.5, "ratio": 1.15}
    found = serving.targets(slow)
    assert "overhead_ms" not in found
    assert found["overhead_ratio"] == {"measured": 1.15, "at_most": 1.1, "met": False}


def test_refused_requests_are_no_measure():
    assert serving._answered({"codes": {"ok": 3}}) == 3
    with pytest.raises(RuntimeError, match="refused"):
        serving._answered({"codes": {"ok": 3, "stale": 1}})
