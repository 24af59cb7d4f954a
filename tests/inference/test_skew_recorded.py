"""Recorded traffic: written, read back, compared."""

import contextlib

import numpy as np
import pytest

from lightwam_jax.inference import recording, service, skew_check, skew_recorded, skew_windows, wire
from tests.inference.test_skew import MISTAKES, config, policy  # noqa: F401 (fixtures)


def answered(number, size=10):
    return service.Answered(
        number, "ok", "", None, None, {}, {"total_ms": 1.5}, bytes(size), b"reply"
    )


def test_records_come_back_and_a_cut_one_is_left_out(tmp_path):
    recorder = recording.Recorder(tmp_path, 2**20)
    recorder.describe(wire.encode({"config": "x"}))
    for number in range(3):
        recorder.add(answered(number))
    recorder.close()
    metadata, records = recording.read(tmp_path)
    records = list(records)
    assert metadata == {"config": "x"} and [r["session"] for r in records] == [0, 1, 2]
    assert records[0]["frame"] == bytes(10) and records[0]["times"] == {"total_ms": 1.5}
    (path,) = recording.files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert [r["session"] for r in recording.read(tmp_path)[1]] == [0, 1]
    with pytest.raises(FileNotFoundError, match="--record"):
        recording.read(tmp_path / "none")


def test_the_oldest_files_go_and_a_new_process_begins_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_FILE_BYTES", 1000)
    for first in (0, 10):
        recorder = recording.Recorder(tmp_path, 4000)
        for number in range(first, first + 10):
            recorder.add(answered(number, size=900))
        recorder.close()
        assert not recorder.dropped
    kept = [record["session"] for record in recording.read(tmp_path)[1]]
    assert kept == list(range(kept[0], 20)) and 2 <= len(kept) <= 8
    assert sum(path.stat().st_size for path in recording.files(tmp_path)) <= 6000


def recorded(policy, config, directory, change=None, replay=True):  # noqa: F811
    """What a server records while a robot replays windows, or shows moments of its own."""
    windows = skew_windows.draw(config, policy, 4)
    deployed = skew_windows.deployed_form(policy)
    options = {"limits": "none", "record": str(directory), "debug": False}
    with contextlib.closing(skew_check.InProcess(deployed, **options)) as server:
        for window in windows:
            moment = window.moment()
            state = moment.state if replay else moment.state + np.float32(0.05)
            request = {f"images.{camera}": image for camera, image in moment.images.items()}
            request |= {"state": state, "prompt": moment.prompt}
            server.infer(change(window, request) if change else request)
    return skew_recorded.check(policy, config, directory, 64)


def test_replayed_windows_are_compared_with_themselves(policy, config, tmp_path):  # noqa: F811
    result = recorded(policy, config, tmp_path / "right")
    assert result.verdict == "pass" and result.what == "replayed windows"
    assert len(result.stages[-1].rows) == 4
    result = recorded(policy, config, tmp_path / "wrong", MISTAKES["BGR"])
    assert (result.verdict, result.first) == ("fail", "raw frame")
    assert "BGR" in result.causes[0].name


def test_other_traffic_is_compared_by_its_replies_and_looks(policy, config, tmp_path):  # noqa: F811
    result = recorded(policy, config, tmp_path / "right", replay=False)
    assert result.verdict == "pass" and result.what == "recorded requests" and not result.causes
    result = recorded(policy, config, tmp_path / "wrong", MISTAKES["BGR"], replay=False)
    assert "red and blue swapped (BGR)" in result.causes[0].name


def test_stages_are_told_only_where_the_server_may(policy, config):  # noqa: F811
    (window,) = skew_windows.draw(config, policy, 1)
    moment = window.moment()
    request = {"images": moment.images, "state": moment.state, "prompt": moment.prompt}
    deployed = skew_windows.deployed_form(policy)
    with contextlib.closing(skew_check.InProcess(deployed, debug=False)) as server:
        assert "stages" not in server.infer({**request, "stages": True})
        with pytest.raises(wire.WireError, match="stages is 'yes'; send true or false"):
            server.infer({**request, "stages": "yes"})
