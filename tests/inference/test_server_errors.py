"""What each bad input gets: the code, words that help, and whether the connection stays."""

import contextlib
import io
import os
import socket as sockets
import threading
import time

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from lightwam_jax.inference import wire
from tests import served as served_lib
from tests.served import PROMPTS, StandIn, observe, serving, wanted

IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def served():
    with serving(known_prompts_only()) as running:
        yield running


def known_prompts_only():
    return StandIn(statistics=served_lib.STATISTICS)


def changed(**more):
    return wire.encode(observe() | more)


def with_image(image, camera="wrist"):
    request = observe()
    return wire.encode(request | {"images": request["images"] | {camera: image}})


NAN = [0.0, 0.0, float("nan"), 0.0, float("inf")]
# name -> (frame, what the refusal says)
STAY = {
    "not msgpack": (b"\xc1\xff", "bad_frame: not a msgpack message"),
    "trailing bytes": (wire.encode(observe()) + b"\x00", "bad_frame: .*extra data"),
    "truncated": (wire.encode(observe())[:-3], "bad_frame: .*incomplete"),
    "ext": (b"\x81\xa1a\xd4\x05\x00", "bad_frame: .*ext"),
    "many containers": (b"\x81\xa1a\xdc\x03\xff" + b"\x80" * 1023, "bad_frame: more than 1000"),
    "key of no string": (b"\x81\x01\x02", "bad_frame: .*key"),
    "key of bytes": (b"\x81\xc4\x01a\x02", "bad_frame: a map has the key b'a'"),
    "list": (b"\x91\x01", "bad_frame: the message is list; expected a map"),
    "empty": (b"", "bad_frame: .*incomplete"),
    "text frame": ("hello", "bad_frame: a text message"),
    "missing camera": (
        changed(images={"scene": IMAGE}),
        r"bad_key: no camera 'wrist': key 'images.wrist' .*got 'images.scene', 'state', 'prompt'",
    ),
    "typo": (
        changed(images={"scene": IMAGE, "wrsit": IMAGE}),
        "bad_key: no camera 'wrist'.*the nearest is 'images.wrsit'",
    ),
    "no state": (wire.encode({"images": observe()["images"]}), r"bad_key: no state\[0\]"),
    "float image": (with_image(IMAGE / 255), "bad_image: camera 'wrist' gives float64 .*float_ima"),
    "two layouts": (with_image(np.zeros((3, 16, 3), np.uint8)), "bad_image: .*first or last"),
    "alpha": (with_image(np.zeros((16, 16, 4), np.uint8)), "bad_image: .*four channels"),
    "grey": (with_image(IMAGE[..., 0]), "bad_image: .*grey; send RGB"),
    "batch axis": (with_image(IMAGE[None]), "bad_image: .*without a batch axis"),
    "no rows": (with_image(IMAGE[:0]), r"bad_image: .*\[0, 16, 3\]: no pixel"),
    "five channels": (with_image(np.zeros((16, 16, 5), np.uint8)), r"bad_image: .*\[h,w,3\]"),
    "text for an image": (with_image("picture"), "bad_image: camera 'wrist' is str"),
    "no JPEG": (with_image(b"\x89PNG"), "bad_image: .*no JPEG"),
    "JPEG, not asked for": (with_image(b"\xff\xd8\xff"), "bad_image: .*--jpeg"),
    "state of another width": (
        changed(state=np.zeros(7)),
        r"bad_state: the state has 7 numbers \(state \[7\]\); expected 5",
    ),
    "NaN": (changed(state=NAN), r"bad_state: the state is not finite in dimensions \[2, 4\]"),
    "overflow": (changed(state=np.full(5, 1e300)), "bad_state: the state is not finite"),
    "state of text": (changed(state="home"), "bad_state: state is str; send an array"),
    "state of texts": (changed(state=["a"] * 5), "bad_state: state is list"),
    "state of bools": (changed(state=np.zeros(5, bool)), "bad_state: state is an array of bool"),
    "state with a batch axis": (changed(state=np.zeros((1, 5))), r"bad_state: .*\[1, 5\]"),
    "prompt missing": (wire.encode(observe() | {"prompt": None}), "bad_prompt: no prompt"),
    "prompt empty": (changed(prompt=""), "bad_prompt: no prompt; .*--default_prompt"),
    "prompt of spaces": (changed(prompt=" \n "), "bad_prompt: the prompt is empty"),
    "prompt of bytes": (changed(prompt=b"go"), "bad_prompt: the prompt is bytes; send text"),
    "prompt list": (changed(prompt=["go"]), "bad_prompt: the prompt is list"),
    "prompt too long": (changed(prompt="a" * 2001), "bad_prompt: .*2001 characters.*2000"),
    "prompt without an encoder": (
        changed(prompt="unknown red cube in the tray"),
        f"bad_prompt: prompt 'unknown red.*not here; the nearest known ones: '{PROMPTS[0]}'",
    ),
    "deadline": (changed(deadline_ms=0), "stale: the observation is older"),
    "age of text": (changed(age_ms="old"), "bad_key: age_ms is 'old'; send a number"),
    "age below zero": (changed(age_ms=-1.0), "bad_key: age_ms is -1.0"),
    "id of another kind": (changed(request_id=[1]), r"bad_key: request_id is \[1\]"),
}


@pytest.mark.parametrize("name", STAY)
def test_a_bad_request_is_refused_in_words_and_the_connection_stays(served, name):
    frame, message = STAY[name]
    with served.connect() as socket:
        for _ in range(2):
            reply = served.ask(socket, frame)
            assert isinstance(reply, str)
            with pytest.raises(wire.WireError, match=f"(?s){message}") as caught:
                raise wire.WireError.from_text(reply)
            assert caught.value.code != "internal" and "Traceback" not in reply
        good = served.ask(socket, observe(5))
        np.testing.assert_array_equal(good["actions"], wanted(observe(5)))


def test_extra_keys_are_ignored_counted_and_named_once(served, capfd):
    with served.connect() as socket:
        before = served.service.metrics.value("extra_keys_total")
        for _ in range(3):
            reply = served.ask(socket, observe(1, promt="x", other={"a": 1}, age_ms=1.0))
            np.testing.assert_array_equal(reply["actions"], wanted(observe(1)))
        assert served.service.metrics.value("extra_keys_total") == before + 6
    assert capfd.readouterr().err.count("'promt' is ignored; is it meant to be 'prompt'?") == 1


def test_units_are_warned_about(served, capfd):
    with served.connect() as socket:
        request = observe(2) | {"state": np.array([900.0, 800.0, -700.0, 0.1, 0.2])}
        np.testing.assert_array_equal(served.ask(socket, request)["actions"], wanted(request))
    err = capfd.readouterr().err
    assert "outside the training range in dimensions [0, 1, 2]" in err
    assert "by a factor of about 800: millimetres for metres?" in err


def test_a_change_of_layout_within_a_connection_is_refused(served):
    request = observe(1, size=(16, 24))
    turned = request | {"images": {k: v.transpose(2, 0, 1) for k, v in request["images"].items()}}
    with served.connect() as socket:
        np.testing.assert_array_equal(served.ask(socket, request)["actions"], wanted(request))
        assert served.ask(socket, turned).startswith("bad_image: camera 'scene' came as HWC before")
    with served.connect() as socket:
        np.testing.assert_array_equal(served.ask(socket, turned)["actions"], wanted(request))


def test_images_of_floats_where_they_are_allowed():
    request = observe(4)
    request["images"] = {k: v.clip(1) for k, v in request["images"].items()}
    floats = {k: (v - np.float32(0.4)) / 255 for k, v in request["images"].items()}  # rounded
    with serving(float_images=True) as running, running.connect() as socket:
        reply = running.ask(socket, request | {"images": floats})
        np.testing.assert_array_equal(reply["actions"], wanted(request))
        for wrong in (floats["wrist"] * 255, -floats["wrist"], floats["wrist"] * np.nan):
            bad = request | {"images": floats | {"wrist": wrong}}
            assert "outside 0..1" in running.ask(socket, bad)


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_jpeg_where_it_is_allowed():
    request = observe(4)
    files = {camera: jpeg(image) for camera, image in request["images"].items()}
    seen = {k: np.asarray(Image.open(io.BytesIO(file))) for k, file in files.items()}
    with serving(jpeg=True) as running, running.connect() as socket:
        reply = running.ask(socket, request | {"images": files})
        np.testing.assert_array_equal(reply["actions"], wanted(request | {"images": seen}))
        broken = request | {"images": files | {"wrist": files["wrist"][:100]}}
        assert "JPEG that cannot be decoded" in running.ask(socket, broken)
        huge = bytearray(files["wrist"])
        at = huge.index(b"\xff\xc0")
        huge[at + 5 : at + 9] = b"\x20\x00\x20\x00"  # 8192 x 8192, in the header alone
        bomb = request | {"images": files | {"wrist": bytes(huge)}}
        assert "at most 16 megapixels" in running.ask(socket, bomb)


def test_an_image_of_more_than_16_megapixels():
    pixels = np.zeros((4001, 4000, 3), np.uint8)
    with serving(max_frame=2**26) as running, running.connect() as socket:
        reply = running.ask(socket, with_image(pixels))
        assert reply.startswith("bad_image: ") and "16 megapixels" in reply


def test_a_frame_beyond_the_limit_closes_with_the_limit_as_the_reason():
    with serving(max_frame=2**16) as running, running.connect() as socket:
        with pytest.raises(ConnectionClosed) as caught:
            running.ask(socket, b"\xc0" * (2**16 + 1))
        assert caught.value.rcvd.code == 1009 and "65536" in caught.value.rcvd.reason


def test_prompts_have_a_default_and_new_ones_can_be_refused():
    with serving(default_prompt=PROMPTS[1], new_prompts="refuse") as running:
        with running.connect() as socket:
            request = observe(3, prompt=PROMPTS[1])
            sent = {key: value for key, value in request.items() if key != "prompt"}
            np.testing.assert_array_equal(running.ask(socket, sent)["actions"], wanted(request))
            spaced = request | {"prompt": f"  {PROMPTS[1].replace(' ', '   ')}\n"}
            np.testing.assert_array_equal(running.ask(socket, spaced)["actions"], wanted(request))
            reply = running.ask(socket, observe(prompt="put the red cube in the tra"))
        assert reply.startswith("bad_prompt: ") and "new prompts are refused" in reply
        assert f"the nearest known ones: '{PROMPTS[0]}', '{PROMPTS[1]}'" in reply
        assert running.policy.encoded == []


def test_old_observations_are_refused_before_and_after_the_device():
    policy = StandIn(
        statistics={"fps": 20.0, **served_lib.STATISTICS}
    )  # as the training data were recorded
    with serving(policy, limits="none") as running, running.connect() as socket:
        assert running.metadata["fps"] == 20
        # two plans of 8 steps at 20 Hz are 800 ms
        reply = running.ask(socket, observe(1, age_ms=700.0))
        np.testing.assert_array_equal(reply["actions"], wanted(observe(1)))
        calls = len(policy.calls)
        assert running.ask(socket, observe(2, age_ms=801.0)).startswith("stale: ")
        assert len(policy.calls) == calls, "not asked"
        policy.seconds = 0.15
        assert running.ask(socket, observe(3, age_ms=700.0)).startswith("stale: ")
        assert running.ask(socket, observe(4, deadline_ms=100.0)).startswith("stale: ")
        assert len(policy.calls) == calls + 2, "asked, but too late"
        assert running.service.metrics.value("stale_total") == 3
        with running.connect() as other:  # in the queue behind another
            policy.seconds = 0.3
            socket.send(wire.encode(observe(5)))
            time.sleep(0.05)
            assert running.ask(other, observe(6, deadline_ms=100.0)).startswith("stale: ")
            assert len(policy.calls) == calls + 3


def test_a_policy_that_gives_nan_and_one_that_fails():
    policy = StandIn()
    with serving(policy) as running, running.connect() as other:
        with running.connect() as socket:
            good = policy.act
            policy.act = lambda *a, **k: good(*a, **k) * np.float32("nan")
            reply = running.ask(socket, observe())
            assert reply.startswith(
                "not_finite: the plan has NaN or infinite actions in dimensions [0, 1, 2, 3]"
            )
            policy.act = good
            np.testing.assert_array_equal(
                running.ask(socket, observe())["actions"], wanted(observe())
            )
            policy.hook = lambda prompts: {}["deep inside"]
            reply = running.ask(socket, observe())
            assert reply.startswith("internal: KeyError") and "deep inside" not in reply
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=5)
            assert caught.value.rcvd.code == 1011
        policy.hook = None
        np.testing.assert_array_equal(running.ask(other, observe(1))["actions"], wanted(observe(1)))


def test_limits_change_a_plan_or_refuse_it():
    narrow = {
        "state": served_lib.STATISTICS["state"],
        "action": {"default": {"global_min": [-0.1] * 4, "global_max": [0.1] * 4}},
    }
    with serving(StandIn(statistics=narrow)) as running, running.connect() as socket:
        reply = running.ask(socket, observe())
        clipped = wanted(observe()).clip(np.float32(-0.12), np.float32(0.12))
        np.testing.assert_array_equal(reply["actions"], clipped)
        changed_values = int((clipped != wanted(observe())).sum())
        assert reply["guard"] == {"snapped": 0, "clamped": changed_values, "limited": 0}
        assert running.service.metrics.value("guard_total", kind="clamped", dim=0) > 0
    refusing = serving(StandIn(statistics=narrow), guard="refuse")
    with refusing as running, running.connect() as socket:
        assert running.ask(socket, observe()).startswith("limits: the plan breaks its limits")


def test_a_frozen_camera_is_noticed(capfd):
    for mode in ("warn", "refuse"):
        with serving(frozen=mode) as running, running.connect() as socket:
            for turn in range(31):
                request = observe() | {"state": np.full(5, turn / 100)}
                reply = running.ask(socket, request)
        assert isinstance(reply, str) == (mode == "refuse")
    assert "gave the same picture 30 times" in reply
    assert "gave the same picture 30 times" in capfd.readouterr().err
    with serving(frozen="refuse") as running, running.connect() as socket:
        for turn in range(40):  # a robot that stands still sees the same
            assert not isinstance(running.ask(socket, observe()), str), turn


def test_twenty_errors_in_a_row_end_a_connection():
    with serving() as running, running.connect() as socket:
        for _ in range(19):
            assert running.ask(socket, {}).startswith("bad_key")
        running.ask(socket, observe())  # begins the count anew
        for _ in range(20):
            assert running.ask(socket, {}).startswith("bad_key")
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=5)
        assert caught.value.rcvd.code == 1008


def test_a_client_that_vanishes_in_mid_request_costs_nobody_else_anything():
    policy = StandIn()
    hold = threading.Event()
    with serving(policy) as running, running.connect() as other:
        policy.hook = lambda prompts: hold.wait(5)
        with running.connect() as socket:
            socket.send(wire.encode(observe(1)))
            time.sleep(0.1)
            socket.socket.shutdown(sockets.SHUT_RDWR)
        other.send(wire.encode(observe(2)))
        hold.set()
        reply = wire.decode(other.recv(timeout=5))
        np.testing.assert_array_equal(reply["actions"], wanted(observe(2)))
        deadline = time.monotonic() + 5
        while len(running.server._connections) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(running.server._connections) == 1


def test_a_client_that_does_not_read_is_let_go():
    with serving(send_timeout_s=0.3) as running:
        running.call(lambda: setattr(running.service, "metadata", os.urandom(2**25)))
        raw = sockets.create_connection(("127.0.0.1", running.server.port))
        with raw:
            raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            handshake = (
                "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            raw.sendall(handshake.encode())
            deadline = time.monotonic() + 10
            seen = False
            while time.monotonic() < deadline:
                seen = seen or bool(running.server._connections)
                if seen and not running.server._connections:
                    break
                time.sleep(0.02)
            assert seen and not running.server._connections


def test_an_idle_connection_is_closed():
    with serving(idle_s=0.2) as running, running.connect() as socket:
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=5)
        assert caught.value.rcvd.code == 1001 and caught.value.rcvd.reason == "idle"


def test_new_image_sizes_are_compiled_beside_the_requests_and_bounded():
    policy = StandIn()
    hold = threading.Event()
    compiled = []
    slow = lambda sizes, batch_sizes: (policy.sizes.append(sizes), compiled.append(hold.wait(5)))
    with serving(policy, max_new_sizes=2) as running, contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(running.connect()) for _ in range(2))
        policy.warm_up_images = slow
        large = observe(1, size=(48, 64))
        one.send(wire.encode(large))
        np.testing.assert_array_equal(running.ask(two, observe(2))["actions"], wanted(observe(2)))
        assert not compiled, "nobody waits for another's compilation"
        hold.set()
        np.testing.assert_array_equal(wire.decode(one.recv(timeout=5))["actions"], wanted(large))
        assert policy.sizes == [{"scene": (48, 64), "wrist": (48, 64)}]
        running.ask(one, large)
        running.ask(one, observe(size=(20, 20)))
        assert len(policy.sizes) == 2
        reply = running.ask(one, observe(size=(21, 20)))
        assert reply.startswith("bad_image: ") and "2 new sizes came before" in reply


def test_an_image_size_that_fails_uses_up_nothing():
    policy, fail = StandIn(), [True]

    def compile_(sizes, batch_sizes):
        if fail[0]:
            raise MemoryError("no room for it")

    with serving(policy, max_new_sizes=1) as running:
        policy.warm_up_images = compile_
        for side in (20, 21, 22):
            with running.connect() as socket:
                reply = running.ask(socket, observe(size=(side, 20)))
                assert reply.startswith("internal: MemoryError")
        fail[0] = False
        with running.connect() as socket:
            asked = observe(size=(23, 20))
            np.testing.assert_array_equal(running.ask(socket, asked)["actions"], wanted(asked))
            assert "1 new sizes came before" in running.ask(socket, observe(size=(24, 20)))
