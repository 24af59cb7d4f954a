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


def on_disk(directory):
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def test_the_oldest_go_and_numbers_go_on(tmp_path):
    block = recorder._blocks(tmp_path, 1)
    most = 4 * recorder._blocks(tmp_path, 1000) + block - 1  # no fifth file
    for start in (0, 10):
        kept = recorder.Recorder(tmp_path, most)
        for number in range(10):
            kept(Asked(start + number))
        kept.close()
    found = list(recorder.read(tmp_path))
    assert [each["frame"][0] for each in found] == [16, 17, 18, 19]


def test_what_counts_is_what_the_disk_holds(tmp_path):
    """Files of some bytes take whole blocks, and the metadata count too."""
    most = 20 * recorder._blocks(tmp_path, 1)
    kept = recorder.Recorder(tmp_path, most)
    kept.metadata = lambda: b"metadata"
    for _ in range(100):
        kept(Asked(1, size=10))
    kept.close()
    assert not kept.left_out and len(recorder.files(tmp_path)) == 19
    assert on_disk(tmp_path) <= most


def test_a_request_beyond_the_bound_is_left_out_and_deletes_nothing(tmp_path):
    kept = recorder.Recorder(tmp_path, 2**20)
    for size in (1000, 2**21, 1000):
        kept(Asked(1, size))
    kept.close()
    assert kept.left_out == 1 and len(recorder.files(tmp_path)) == 2


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("a.msgpack", "12.msgpack", "zzz.msgpack", "000000000001.msgpack.bak"):
        (tmp_path / name).write_bytes(b"mine" * 1000)
    kept = recorder.Recorder(tmp_path, 3 * recorder._blocks(tmp_path, 1000))
    for number in range(5):
        kept(Asked(number))
    kept.close()
    assert [each["frame"][0] for each in recorder.read(tmp_path)] == [2, 3, 4]
    assert {path.name for path in recorder.files(tmp_path)} == {
        f"{n:012d}.msgpack" for n in (2, 3, 4)
    }
    assert (tmp_path / "a.msgpack").read_bytes() == b"mine" * 1000
    assert len(list(tmp_path.iterdir())) == 7


def test_what_comes_faster_than_the_disk_is_left_out(tmp_path, monkeypatch):
    """By bytes: large requests fill the memory long before they are many."""
    hold, begun, encode = threading.Event(), threading.Event(), recorder.wire.encode
    slow = lambda values: (begun.set(), hold.wait(10), encode(values))[2]
    monkeypatch.setattr(recorder.wire, "encode", slow)
    monkeypatch.setattr(recorder, "_WAITING", 2**20)
    kept = recorder.Recorder(tmp_path, 2**30)
    kept(Asked(1, 2**22))  # one alone may be larger
    assert begun.wait(10)
    kept(Asked(2, 1))
    assert kept.left_out == 1, "what is being written counts"
    hold.set()
    kept.close()
    hold.clear()
    kept = recorder.Recorder(tmp_path, 2**30)
    for number in range(20):
        kept(Asked(number, 2**17))
    hold.set()
    kept.close()
    assert kept.left_out == 13 and len(recorder.files(tmp_path)) == 1 + 7
