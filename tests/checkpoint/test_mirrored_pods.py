"""Two processes that share nothing but a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pod

pytest.importorskip("fsspec")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


def together(tmp_path, machine, what):
    """What both say; both must end well."""
    port = pod._free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.mirrored_pod", str(port), str(index),
             str(tmp_path / machine), what],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=800)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return said


def committed(tmp_path):
    return {p.parent.name for p in tmp_path.glob("bucket/run/checkpoints/*/committed.json")}


def test_process_0_writes_and_all_read_and_agree_on_damage(tmp_path):
    together(tmp_path, "first", "save")
    assert committed(tmp_path) == {"2", "3"}
    newest = tmp_path / "bucket" / "run" / "checkpoints" / "3"
    file = max((newest / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    file.write_bytes(bytes(file.stat().st_size))
    for said in together(tmp_path, "second", "damaged"):
        assert "Checkpoint 3 is damaged: process 0: local://bucket/run/checkpoints/3" in said
    assert committed(tmp_path) == {"3", "4"}
    assert {p.name for p in (tmp_path / "second").iterdir()} == {"train", "train1"}
