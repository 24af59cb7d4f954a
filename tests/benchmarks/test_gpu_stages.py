"""The run that takes all figures of one GPU: its stages, its script, its file of results."""

import json
import math
import os
import pathlib
import subprocess
import sys
import typing

import jax
import pytest

from benchmarks import gpu_stages
from lightwam_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
KEYS = {
    "policy": {"rows", "compile_s", "device_ms", "with_transfers_ms", "vae_ms", "context_ms",
               "blocks_ms", "memory_gib", "finite"},
    "train": {"batch", "remat", "attention", "compile_s", "step_ms", "samples_per_s",
              "tflop_per_s", "loss", "memory_gib", "finite"},
    "latency": {"rows", "memory_gib"},
}  # fmt: skip


def known(stage):
    """Whether this version has what a stage asks for, on a machine without a GPU."""
    kinds = typing.get_type_hints(config_lib.ModelConfig)
    asked = {key.removeprefix("model."): x for key, x in stage.options.items() if "." in key}
    there = all(value in typing.get_args(kinds[name]) for name, value in asked.items())
    return there and asked.get("attention") != "cudnn" and stage.kind != "reference"


def numbers(value):
    """All numbers in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_stages_are_named_once_and_ordered_by_importance():
    names = [stage.name for stage in gpu_stages.STAGES]
    assert len(set(names)) == len(names)
    assert names[:5] == ["policy_b1", "reference", "policy_b8", "policy_b64", "train_b16_linears"]
    # a first look at everything that was promised fits into the nine minutes
    assert sum(stage.seconds for stage in gpu_stages.STAGES[:6]) < 530


def test_what_is_unknown_fails_alone(monkeypatch):
    monkeypatch.setattr(gpu_stages, "TINY", True)
    stage = gpu_stages.Stage("odd", "train", 10, {"batch": 2, "model.remat": "some"})
    line = gpu_stages.run(stage)
    assert line["stage"] == "odd" and "config.model.remat is 'some'" in line["failed"]
    monkeypatch.delenv("REF", raising=False)
    (reference,) = [stage for stage in gpu_stages.STAGES if stage.kind == "reference"]
    assert "REF is not set" in gpu_stages.run(reference)["skipped"]


def test_lines_become_a_file_of_results(tmp_path, capsys):
    device = {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 1}
    lines = [
        {"stage": "policy_b1", "device": device, "versions": {"jax": "0.11.2"}, "launches": 700},
        {"stage": "reference", "device": device, "versions": {"torch": "2.11.0"}},
        {"stage": "profile", "skipped": "no time"},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    gpu_stages.collect(path, tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["device"] == device
    assert found["versions"] == {"jax": "0.11.2", "torch": "2.11.0"}
    assert found["stages"] == [
        {"stage": "policy_b1", "launches": 700},
        {"stage": "reference"},
        {"stage": "profile", "skipped": "no time"},
    ]


def run_script(out, **environment):
    environment = os.environ | {"TINY": "1", "OUT": str(out), "PYTHON": sys.executable, "REF": "",
                                **environment}  # fmt: skip
    script = ["bash", "benchmarks/gpu.sh"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_does_not_fit_into_the_time_is_skipped(tmp_path):
    lines = run_script(tmp_path, LIMIT="1")
    assert [line["stage"] for line in lines] == [stage.name for stage in gpu_stages.STAGES]
    assert all("of 1, it needs" in line["skipped"] for line in lines)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every stage, with the smallest model, on this machine."""
    lines = run_script(tmp_path, LIMIT="800")
    assert [line["stage"] for line in lines] == [stage.name for stage in gpu_stages.STAGES]
    for line, stage in zip(lines, gpu_stages.STAGES):
        if not known(stage):
            assert "failed" in line or "skipped" in line, line
            continue
        assert set(line) >= KEYS[stage.kind], line
        assert line.get("finite", True) and line["tiny"]
        assert line["model"]["variant"] == "tiny" and line["device"]["platform"] == "cpu"
        assert all(math.isfinite(x) for x in numbers(line))
        assert line.get("remat", "") == stage.options.get("model.remat", "")
        if stage.options.get("trace"):
            assert line["kernels"][0]["kernel"] == "all"
            name = "train" if stage.kind == "train" else stage.name
            profile = jax.profiler.ProfileData.from_file(str(tmp_path / f"{name}.xplane.pb"))
            assert [plane.name for plane in profile.planes]
