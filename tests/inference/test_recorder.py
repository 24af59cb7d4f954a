"""Recorded traffic: what came and what went, in a directory that does not grow without end."""

import threading

import numpy as np

from lightwam_jax.inference import recorder, wire
from tests.served import observe, serving, wanted


def test_requests_and_replies_are_kept_as_they_were(tmp_path):
    kept = recorder.Recorder(tmp_path / "traffic", 2**30)
    with serving() as running, running.connect() as socket:
        running.call(lambda: running.service.listeners.append(kept))
        for seed in range(3):
            running.ask(socket, observe(seed))
        running.ask(socket, "text")
        running.ask(socket, b"")
    kept.close()
    found = list(recorder.read(tmp_path / "traffic"))
    assert [each["code"] for each in found] == ["ok"] * 3 + ["bad_frame"] * 2
    for seed, each in enumerate(found[:3]):
        assert each["frame"] == wire.encode(observe(seed)) and each["times"]["total_ms"] > 0
        reply = wire.decode(each["reply"])
        np.testing.assert_array_equal(reply["actions"], wanted(observe(seed)))
    assert found[3]["frame"] == b"text" and found[3]["reply"].startswith("bad_frame: ")


class Asked:
    session, code, times = 1, "ok", {}

    def __init__(self, number, size=1000):
        self.frame, self.reply = bytes([number]) * size, b"reply"


def test_the_oldest_go_and_numbers_go_on(tmp_path):
    for start in (0, 10):
        kept = recorder.Recorder(tmp_path, 5000)
        [kept(Asked(start + number)) for number in range(10)]
        kept.close()
    found = list(recorder.read(tmp_path))
    assert [each["frame"][0] for each in found] == [16, 17, 18, 19]
    assert sum(path.stat().st_size for path in recorder.files(tmp_path)) <= 5000


def test_what_comes_faster_than_the_disk_is_left_out(tmp_path, monkeypatch):
    hold, monkey = threading.Event(), recorder.wire.encode
    monkeypatch.setattr(recorder.wire, "encode", lambda values: (hold.wait(10), monkey(values))[1])
    kept = recorder.Recorder(tmp_path, 2**30)
    [kept(Asked(1)) for _ in range(300)]
    hold.set()
    kept.close()
    assert 40 <= kept.left_out <= 44 and len(recorder.files(tmp_path)) == 300 - kept.left_out
