"""What a hostile or unlucky client must not bring about: memory, waiting, mixed replies."""

import asyncio
import threading
import time

import numpy as np
import pytest

from lightwam_jax.data import device_canvas
from lightwam_jax.inference import (
    access,
    batching,
    keys,
    observations,
    recorder,
    safety,
    server,
    serving_options,
    wire,
)
from lightwam_jax.inference.client import Client
from tests import served
from tests.served import observe


def test_a_long_picture_makes_no_large_matrix(monkeypatch):
    made, filter_weights = [], device_canvas.filter_weights

    def watched(size, new, kernel):
        made.append((new, size))
        return filter_weights(size, new, kernel)

    monkeypatch.setattr(device_canvas, "filter_weights", watched)
    data = served.config().data
    device_canvas.plan({camera: (1, 5000) for camera in data.cameras}, data)
    assert made and max(new for new, _ in made) <= max(data.canvas)


def test_sides_are_limited_as_pixels_are():
    with served.serving() as running, Client(running.url) as client:
        images = {camera: np.zeros((1, 8193, 3), np.uint8) for camera in served.CAMERAS}
        with pytest.raises(wire.WireError, match="8192 along a side"):
            client.infer(observe() | {"images": images})
        assert observations.MAX_SIDE == 8192


@pytest.mark.parametrize("deep, fits", [(30, True), (40, False), (990, False)])
def test_nesting_is_limited(deep, fits):
    message = {"a": 1}
    for _ in range(deep):
        message = {"a": message}
    frame = wire.encode(message) if deep < 100 else b"\x81\xa1a" * deep + b"\x01"
    if fits:
        assert wire.decode(frame) == message
        return
    with pytest.raises(wire.WireError, match="bad_frame"):
        wire.decode(frame)


def test_many_keys_are_compared_with_few():
    names = [f"{i:03d}" + "x" * 197 for i in range(4000)]
    began = time.process_time()
    keys.typos(names, keys.native(served.CAMERAS))
    with pytest.raises(wire.WireError, match="bad_key"):
        tables = keys.choose("lightwam", served.CAMERAS, 5, ("", ""))
        keys.read(dict.fromkeys(names, 1), tables[0], served.CAMERAS)
    assert time.process_time() - began < 1, "the event loop has to go on"


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1])
def test_steps_are_numbers_that_a_page_can_show(step):
    with served.serving() as running, Client(running.url) as client:
        with pytest.raises(wire.WireError, match="bad_key: step is"):
            client.infer(observe() | {"step": step})
        assert client.infer(observe() | {"step": 3})["step"] == 3


def test_who_sends_no_key_does_not_lock_the_key_out(monkeypatch):
    monkeypatch.setattr(access, "_DELAY_S", 0)
    door = access.Access("secret")
    ask = lambda *sent: asyncio.run(door.refusal("10.0.0.1", list(sent)))
    assert {ask()[0] for _ in range(30)} == {401}
    assert ask("Api-Key secret") is None
    assert [ask("Api-Key wrong")[0] for _ in range(21)][-1] == 429


def test_an_address_that_is_none_is_said_at_once():
    began = time.monotonic()
    with pytest.raises(ValueError, match="no address such as ws://"):
        Client("http://localhost:80", connect_s=30)
    assert time.monotonic() - began < 5


def test_an_interrupted_request_is_not_answered_later():
    hold = threading.Event()
    policy = served.StandIn()
    with served.serving(policy) as running, Client(running.url) as client:
        policy.hook = lambda prompts: hold.wait(10)
        socket = client._socket
        interrupted = type("Interrupted", (BaseException,), {})

        class Interrupting:
            def __getattr__(self, name):
                return getattr(socket, name)

            def recv(self, timeout=None):
                raise interrupted

        client._socket = Interrupting()
        with pytest.raises(interrupted):
            client.infer(observe(1))
        assert client._socket is None
        hold.set()
        policy.hook = None
        again = client.infer(observe(2))["actions"]
    with served.serving() as running, Client(running.url) as client:
        np.testing.assert_array_equal(again, client.infer(observe(2))["actions"])


def test_the_guard_wants_a_finite_state():
    limits = safety.Limits.none(2)
    with pytest.raises(wire.WireError, match="the state has NaN"):
        safety.Guard(limits, 1).check(np.zeros((1, 2)), state=np.array([np.nan]))


def test_a_recorder_survives_a_full_disk(tmp_path, monkeypatch):
    kept, wrote = recorder.Recorder(tmp_path, 2**30), []

    def write(self, values):
        wrote.append(values)
        if len(wrote) == 1:
            raise OSError("no space left")

    monkeypatch.setattr(recorder.Recorder, "_write", write)
    with served.serving() as running, Client(running.url) as client:
        running.service.listeners.append(kept)
        for seed in range(3):
            client.infer(observe(seed))
    kept.close()
    assert len(wrote) == 3 and kept.left_out == 1


@pytest.mark.parametrize("problem", [FileNotFoundError("nothing there"), OverflowError("port")])
def test_a_start_that_fails_says_so_in_one_line(monkeypatch, capsys, problem):
    def fail(argv):
        raise problem

    monkeypatch.setattr(server, "_from_flags", fail)
    with pytest.raises(SystemExit) as ended:
        server.main([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: cannot serve: {problem}\n"


@pytest.mark.parametrize("option", [{"fps": -1}, {"request_timeout_s": 0}, {"max_age_ms": -5}])
def test_options_that_refuse_everybody_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is"):
        serving_options.Options(**option)


def test_a_ping_is_answered_while_the_policy_plans():
    """Else clients that ping, openpi's among them, give the connection up in a long call."""
    policy, planning, hold = served.StandIn(), threading.Event(), threading.Event()
    with served.serving(policy) as running, running.connect(ping_interval=0.05) as socket:
        policy.hook = lambda prompts: (planning.set(), hold.wait(30))
        socket.send(wire.encode(observe()))
        assert planning.wait(30)
        for _ in range(3):
            assert socket.ping().wait(20)
        assert not hold.is_set() and running.service.batcher.busy_s > 0
        hold.set()
        reply = wire.decode(socket.recv(timeout=20))
        np.testing.assert_array_equal(reply["actions"], served.wanted(observe()))


def test_who_left_does_not_keep_others_waiting():
    worker, ran, hold = batching.Worker(), [], threading.Event()

    async def both():
        first = asyncio.ensure_future(worker.run(hold.wait, 10))
        left = asyncio.ensure_future(worker.run(ran.append, "left"))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.sleep(0.05)
        hold.set()
        await first
        await worker.run(ran.append, "stayed")

    asyncio.run(both())
    worker.close()
    assert ran == ["stayed"]
