"""Which evaluations are the same, which seeds are held out, and which episodes are shown."""

import json
import types

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import report, suites, tables, worker


def test_a_log_names_all_that_decides_how_an_episode_goes():
    decisive = {
        "suite",
        "env",
        "environment",
        "replan_steps",
        "max_steps",
        "batch",
        "device",
        "driver",
    }
    manifest = dict.fromkeys({*decisive, "packages", "seeds", "commit", "config"}, 1)
    log = report.log_manifest(manifest, "expert")
    assert log == {"policy": "expert"} | dict.fromkeys({*decisive, "packages"}, 1)


def demo_config(tmp_path, first_seed):
    """Demonstrations of five episodes from seed 30 on, of which ten were tried."""
    (tmp_path / "meta").mkdir()
    about = {"seeds": {"tabletop": [[30, 10]]}}
    (tmp_path / "meta" / "recording.json").write_text(json.dumps(about), encoding="utf-8")
    return types.SimpleNamespace(
        evaluation=types.SimpleNamespace(
            first_seed=first_seed, episodes=1, suite="demo", tasks=(), env={}
        ),
        data=types.SimpleNamespace(path=str(tmp_path)),
    )


@pytest.mark.parametrize("seed", [30, 34, 39])  # of failures, too: ten seeds for five episodes
def test_first_and_last_demonstrated_seed_are_refused(tmp_path, seed):
    with pytest.raises(ValueError, match="not held out"):
        suites.of_config(demo_config(tmp_path, seed), "demo")


@pytest.mark.parametrize("seed", [29, 40])
def test_the_seeds_beside_them_are_held_out(tmp_path, seed):
    assert suites.of_config(demo_config(tmp_path, seed), "demo").episodes[0].seed == seed


def test_of_few_videos_one_shows_a_failure():
    results = [
        worker.EpisodeResult(
            envs_base.EpisodeSpec("t", 0, i), i > 0, 1, "go", None, 0.0, 0, np.zeros((1, 1))
        )
        for i in range(4)
    ]
    assert [r.episode.seed for r in tables.choose(results, 2)] == [1, 0]
