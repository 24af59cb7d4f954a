"""What a policy server records can be read by Rerun's own tool."""

import subprocess
import sys
import types

import numpy as np
import pytest

from lightwam_jax.inference import rerun_log
from tests.inference.test_page import Looking
from tests.served import observe, serving

pytest.importorskip("rerun", reason="needs requirements-rerun.txt")


def rrd(command, path):
    """What the tool says; fails if it cannot read the file."""
    line = [sys.executable, "-m", "rerun", "rrd", command, str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_request_is_recorded(tmp_path):
    path = tmp_path / "served.rrd"
    with serving(Looking(), taps=True, rerun=str(path)) as running:
        recorder = rerun_log.prepare(running.server)
        with running.connect() as robot:
            for seed in range(3):
                running.ask(robot, observe(seed))
            running.ask(robot, {**observe(), "state": np.zeros(2)})
            number = running.server.sessions[0]
        running.call(recorder.close)
        assert not recorder.dropped and not running.service.listeners
    rrd("verify", path)
    found = rrd("print", path)
    names = ("canvas", "cameras/wrist", "plan", "first_action", "state", "attention/1_adapted",
             "times/total_ms", "prompt", "log")  # fmt: skip
    missing = [name for name in names if f"/session_{number}/{name}" not in found]
    assert not missing


def test_what_is_too_much_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(rerun_log.Recorder, "_work", lambda self: None)
    service = types.SimpleNamespace(listeners=[])
    recorder = rerun_log.Recorder(service, tmp_path / "full.rrd")
    event = types.SimpleNamespace(_replace=lambda **parts: None)
    for _ in range(rerun_log._WAITING + 3):
        service.listeners[0](event)
    assert recorder.dropped == 3
