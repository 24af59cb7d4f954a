"""The user's commands, one after the other, on a demo cut down to almost nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "data.val_fraction": 0.2,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.eval_batches": 1,
    "train.checkpoint_every": 2,
    "optimizer.warmup_steps": 1,
    "model.dim": 32,
    "model.head_dim": 8,
    "model.ffn_dim": 32,
    "model.per_layer_dim": 16,
    "model.trunk_dim": 16,
    "model.flow_dim": 16,
    "model.flow_ffn_dim": 16,
    "model.flow_steps": 2,
    "model.num_layers": 2,
    "model.adapter_layers": "(0,1)",
    "evaluation.episodes": 2,
    "evaluation.videos": 1,
    "evaluation.max_steps": 16,
}


def run(*command, **environment):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("head", ["state_fusion", "flow_dit"])
def test_demo_pipeline(tmp_path, head):
    config = [
        "--config",
        f"configs/demo.py:{head}",
        f"--config.data.path={tmp_path / 'episodes'}",
        f"--config.data.cache={tmp_path / 'cache'}",
    ]
    config += [f"--config.{key}={value}" for key, value in SMALL.items()]
    workdir = tmp_path / "run"
    record = ["-m", "lightwam_jax.envs.record", "--suite", "demo", "--episodes", "6"]
    record += ["--starts", "4", "--noise", "0.5", "--images", "png"]
    run(*record, "--out", str(tmp_path / "episodes"))
    run("-m", "lightwam_jax.precompute", *config, "--what", "all")
    run("train.py", *config, "--workdir", str(workdir))
    out = run("evaluate.py", "--workdir", str(workdir), "--mode", "demo")
    assert "expert" in out
    skew = ("-m", "lightwam_jax.inference.skew", "--samples", "4", "--brief")
    assert "4 windows in process" in run(*skew, "--workdir", str(workdir))
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert {
        "success_rate",
        "interval",
        "untrained_success_rate",
        "expert_success_rate",
        "episodes",
        "seconds",
    } <= set(summary)
    assert summary["episodes"] == 2 and summary["errors"] == 0
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "data:video/mp4;base64," in page and "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")

    rows = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    logged = [row for row in rows if row["kind"] == "eval"][-1]
    printed = run("evaluate.py", "--workdir", str(workdir), "--mode", "open_loop")
    assert "open_loop" in printed and "gripper" in printed
    alone = json.loads((workdir / "open_loop" / "open_loop.json").read_text(encoding="utf-8"))
    timing = {name: logged[f"gripper/3/{name}"] for name in alone["grippers"]["3"]}
    assert alone["grippers"] == {"3": timing} and timing["changing"] + timing["still"] > 0
    assert alone["l1_step"] == pytest.approx(logged["l1_step"], rel=1e-4)
    out = tmp_path / "exported.safetensors"
    run("-m", "converters", "export", "--in", str(workdir), "--out", str(out))
    assert out.stat().st_size > 10_000
