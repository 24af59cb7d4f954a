"""Cells of the ablations, their statistics, and one whole run of two of them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablations as ablations_lib
from configs import libero
from lightwam_jax.evaluation import ablations, ablations_table
from lightwam_jax.models import action
from tests import synthetic
from tests.test_end_to_end import SMALL, run


def plan(base, names):
    return ablations.plan(base, names, ablations_lib.cell)


def test_every_cell_is_one_change_of_any_config():
    for base, impossible in (
        (ablations_lib.get_config(), {"taps_3", "taps_5"}),
        (ablations_lib.get_config("deep"), set()),
        (libero.get_config("object"), set()),
    ):
        same = {
            "base": "base",
            f"pool_{base.loss.downsample}": "base",
            f"queries_{base.model.num_queries}": "base",
        }
        kept = []
        for name in ablations_lib.CELLS:
            if name in impossible:
                with pytest.raises(ValueError, match="not deep enough"):
                    plan(base, [name])
            elif ablations_lib.cell(base, name) != base:
                kept.append(name)
            else:
                assert name in same or name.startswith("taps_")
                if name != "base":
                    with pytest.raises(ValueError, match=f"{name} is what base is"):
                        plan(base, ["base", name])
        assert set(plan(base, kept)) == set(kept)
    assert ablations_lib.cell(base, "taps_3").model.adapter_layers == (8, 16, 24)
    assert ablations_lib.cell(base, "taps_5").model.adapter_layers[-1] == 24
    with pytest.raises(ValueError, match="no cell 'pool_3'"):
        plan(base, ["pool_3"])


def test_concatenation_averages_runs_of_neighbours():
    tokens = jnp.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(action.concatenate_groups(tokens, 6), tokens.reshape(1, 12))
    np.testing.assert_array_equal(action.concatenate_groups(tokens, 2), [[2, 3, 8, 9]])
    with pytest.raises(ValueError, match=r"6 tokens cannot be concatenated .*num_queries=4"):
        action.concatenate_groups(tokens, 4)


def test_interval_is_students_and_ends_where_values_end():
    mean = ablations_table.Mean((0.4, 0.5, 0.6))
    half = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees
    assert mean.value == pytest.approx(0.5)
    assert mean.ends == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)
    assert mean.percent("+") == "+50 (+25 to +75) %"
    shares = ablations_table.Mean((0.1, 0.9, 1.0), 0.0, 1.0)
    assert shares.ends == (0.0, 1.0) and shares.percent() == "67 (0 to 100) %"
    assert ablations_table.Mean((0.4,), 0.0, 1.0).ends == (0.0, 1.0)  # one seed says nothing


def result(successes, flops=10, seed=0, curve=(), latency=2.0):
    return {
        "success": {"successes": successes, "episodes": 10},
        "curve": [{"step": s, "successes": n, "episodes": 10} for s, n in curve],
        "action_l1": 0.25,
        "flops": flops,
        "latency_ms": latency,
        "seed": seed,
    }


def test_difference_is_taken_seed_by_seed():
    base = [result(4, seed=0), result(6, seed=1), result(9, seed=7)]
    cell = [result(8, seed=1), result(7, seed=0)]
    less = ablations_table.difference(cell, base)
    assert sorted(less.values) == pytest.approx([0.2, 0.3])
    assert ablations_table.difference([result(1, seed=3)], base) is None
    assert ablations_table.difference([result(1) | {"success": None}], base) is None
    apart = ablations_table.difference([result(0, seed=0), result(10, seed=1)], base)
    assert apart.ends == (-1.0, 1.0)


def test_solved_at_is_the_first_checkpoint_with_nine_of_ten():
    curve = [(500, 2), (1000, 9), (1500, 8), (2000, 10)]
    assert ablations_table.solved_at(result(10, curve=curve)) == 1000
    assert ablations_table.solved_at(result(8, curve=curve[:1])) == float("inf")


def test_table_has_every_cell_with_a_result(tmp_path):
    early, late, never = ([(500, n), (1000, m)] for n, m in ((9, 10), (3, 9), (1, 2)))
    runs = [("base", 0, 4, early), ("base", 10, 6, late), ("base", 2, 5, never)]
    for name, seed, successes, curve in (*runs, ("mean", 0, 1, never)):
        path = tmp_path / name / str(seed) / "result.json"
        path.parent.mkdir(parents=True)
        flops, latency = (10, 2.0) if name == "base" else (5, 3.0)
        found = result(successes, flops, seed, curve, latency)
        path.write_text(json.dumps(found), encoding="utf-8")
        rows = [{"group": "adapters", "total": 1000}, {"group": "total", "total": 1_230_000}]
        (path.parent / "params.json").write_text(json.dumps(rows), encoding="utf-8")
    table = ablations_table.write(tmp_path, ablations_lib.CELLS).splitlines()
    l1 = "0.2500 (0.2500 to 0.2500)"
    assert table[2] == (
        "| base | as configured | 50 (25 to 75) % | 40, 50, 60 |  | 1000 (500 to > 1000) | "
        f"{l1} | 1.00 | 1.00 | 1.23 M |"
    )
    assert table[3].endswith(
        f"| 10 (0 to 100) % | 10 | -30 (-100 to +100) % | > 1000 (> 1000 to > 1000) | {l1} | "
        "0.50 | 1.50 | 1.23 M |"
    )
    for chart in ("ablations.png", "ablations_curves.png"):
        assert (tmp_path / chart).read_bytes()[:4] == b"\x89PNG"

    del found["curve"]
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mean/0/result.json is of an older version"):
        ablations_table.collect(tmp_path, ablations_lib.CELLS)


def test_what_is_evaluated_does_not_depend_on_interruptions():
    config = lambda **train: synthetic.make_config(**{f"train.{k}": v for k, v in train.items()})
    all_kept = config(steps=1200, checkpoint_every=500, keep_last=0)
    assert ablations._steps(all_kept) == [500, 1000, 1200]
    assert ablations._steps(config(steps=1000, checkpoint_every=500, keep_last=0)) == [500, 1000]
    assert ablations._steps(config(steps=1200, checkpoint_every=500, keep_last=2)) == [1200]
    assert ablations._steps(config(steps=1200, checkpoint_every=0, keep_last=0)) == [1200]


@pytest.mark.slow
def test_two_cells_from_the_command_line_and_again(tmp_path):
    config = [
        "--config",
        "configs/ablations.py",
        f"--config.data.path={tmp_path / 'episodes'}",
        f"--config.data.cache={tmp_path / 'cache'}",
    ]
    small = SMALL | {"evaluation.max_steps": 4}
    config += [f"--config.{key}={value}" for key, value in small.items()]

    record = ["-m", "lightwam_jax.envs.record", "--suite", "demo", "--episodes", "6"]
    run(*record, "--images", "png", "--out", str(tmp_path / "episodes"))
    run("-m", "lightwam_jax.precompute", *config, "--what", "all")
    command = [
        "-m",
        "lightwam_jax.evaluation.ablations",
        *config,
        "--cells=video_off,concat",
        "--seeds=0,3",
        "--out",
        str(tmp_path / "out"),
    ]
    first = run(*command)
    assert "[4/4] concat, seed 3" in first
    results = json.loads((tmp_path / "out" / "ablations.json").read_text(encoding="utf-8"))
    assert list(results) == ["video_off", "concat"]
    assert [r["seed"] for r in results["concat"]] == [42, 45]
    assert all(r["success"]["episodes"] == 2 for cell in results.values() for r in cell)
    assert all(r["curve"][-1]["successes"] == r["success"]["successes"] for r in results["concat"])
    digests = {r["manifest"]["weights"] for cell in results.values() for r in cell}
    assert len(digests) == 4, "four different policies"
    again = run(*command)
    assert "Compiled" not in again and again.partition("| cell")[2] == first.partition("| cell")[2]
