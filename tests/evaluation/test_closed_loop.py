"""A whole evaluation of a tiny policy that was never trained, on the demo's scenes."""

import dataclasses
import json
import types

import pytest

from lightwam_jax import envs
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import tabletop as demo
from lightwam_jax.evaluation import closed_loop
from tests.inference.test_policy import make_config, make_policy


@pytest.fixture(scope="module")
def policy():
    """A `Policy` for the demo with random parameters, and an evaluation of two short episodes."""
    c = make_config()
    evaluation = dataclasses.replace(
        c.evaluation,
        suite="demo",
        env={"image_size": 32},
        episodes=2,
        max_steps=6,
        batch=2,
        workers=1,
        videos=1,
    )
    return make_policy(dataclasses.replace(c, evaluation=evaluation))


def write_metrics(workdir):
    (workdir / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {"kind": "train", "step": step, "loss": 1.0, "loss_video": 1.0, "loss_action": 1.0}
            )
            + "\n"
            for step in (1, 2)
        ),
        encoding="utf-8",
    )


def test_evaluation_writes_numbers_report_and_logs_and_continues(policy, tmp_path):
    write_metrics(tmp_path)
    out = tmp_path / "results"
    rates = closed_loop.evaluate(policy, "demo", tmp_path, out, began=0.0)
    assert list(rates) == ["trained", "untrained", "expert"]
    assert [r["tabletop"].episodes for r in rates.values()] == [2, 2, 2]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    manifest = summary["manifest"]
    assert manifest["suite"] == "demo" and manifest["tasks"] == ["tabletop"]
    assert len(manifest["environment"]["reset_frame"]["sha256"]) == 16
    assert summary["tasks"]["tabletop"]["trained"]["episodes"] == 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:video/mp4;base64," in page and "tabletop/0/1000000" in page

    logs = {name: (out / "report" / f"{name}.jsonl").read_bytes() for name in rates}
    first = json.loads(logs["trained"].splitlines()[0])["manifest"]
    assert first["policy"] == manifest["weights"]
    closed_loop.evaluate(policy, "demo", tmp_path, out, began=0.0)
    for name, log in logs.items():
        assert (out / "report" / f"{name}.jsonl").read_bytes() == log, "nothing is run twice"

    other = make_policy(policy.config)
    other.params["proprio_encoder"] = {
        key: value + 1 for key, value in other.params["proprio_encoder"].items()
    }
    with pytest.raises(ValueError, match=r"policy: .* there, .* now"):
        closed_loop.evaluate(other, "demo", tmp_path, out, began=0.0)


@pytest.mark.parametrize("experts", [(), ("stack",)])
def test_tasks_without_an_expert_are_evaluated_and_the_report_says_so(
    policy, tmp_path, monkeypatch, experts
):
    """A suite of two tasks, the demo under other names, whose experts are missing or partly so."""
    suite = types.SimpleNamespace(
        __name__=demo.__name__,
        make=demo.make,
        TASKS=("stack", "juggle"),
        FPS=demo.FPS,
        has_expert=lambda task: task in experts,
        groups=lambda tasks: {"toys": ["stack", "juggle"], "balls": ["juggle"]},
        episodes=lambda tasks, count, first: [
            envs_base.EpisodeSpec(task, 0, first + i) for task in tasks for i in range(count)
        ],
    )
    monkeypatch.setattr(envs, "suite", lambda name: suite)
    write_metrics(tmp_path)
    rates = closed_loop.evaluate(policy, "demo", tmp_path, tmp_path, began=0.0)
    assert [rates[name]["all"].episodes for name in ("trained", "untrained")] == [4, 4]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert rates["trained"]["toys"].episodes == 4 and rates["untrained"]["balls"].episodes == 2
    assert summary["groups"]["balls"]["trained"]["episodes"] == 2 and "<td>toys</td>" in page
    assert summary["episodes"] == 4 and set(summary["tasks"]["juggle"]) == {"trained", "untrained"}
    assert "What it imagines" in page and (tmp_path / "report" / "psnr.png").exists()
    if experts:
        assert list(rates["expert"]) == ["stack", "toys", "all"]
        assert rates["expert"]["all"].episodes == 2
        assert summary["expert_episodes"] == 2 and "expert" in summary["tasks"]["stack"]
        assert "a scripted expert for 1 of the 2 tasks" in page and "no expert" in page
        assert "when the expert acted" in page
    else:
        assert list(rates) == ["trained", "untrained"]
        assert not [key for key in summary if key.startswith("expert")]
        assert not (tmp_path / "report" / "expert.jsonl").exists()
        assert "No task evaluated here has a scripted expert." in page
        assert "when the trained policy acted" in page and "scripted expert, " not in page
