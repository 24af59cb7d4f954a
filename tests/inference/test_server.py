"""A policy server answers what openpi's clients and ours send, in order, one row like another."""

import asyncio
import contextlib
import json
import pathlib
import threading
import time

import numpy as np
import pytest

from lightwam_jax.inference import wire
from tests import served as served_lib
from tests.served import PROMPTS, StandIn, observe, serving, wanted

FRAMES = pathlib.Path(__file__).parents[1] / "serving"


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running


def test_metadata_come_first_and_say_what_a_client_needs(served):
    with served.connect() as socket:
        assert served.ask(socket, observe())["actions"].shape == (8, 4)
    found = served.metadata
    assert found["cameras"] == ["scene", "wrist"] and found["state_dim"] == 5
    assert found["protocol"] == "openpi" and found["action_horizon"] == 8
    assert found["config"] == "stand-in" and found["step"] == 7
    assert found["keys"]["images"]["wrist"] == ["images.wrist", "auto", ""]
    assert found["prompts"] == list(PROMPTS) and found["batching"] == {"max": 8, "exact": False}
    assert found["trained_steps"] == 8 and found["latency"]["p50_ms"] > 0
    assert json.loads(served.get("/metadata")[1]) == found
    assert not any(isinstance(value, np.ndarray) for value in found.values())


def test_short_metadata_are_the_same_for_every_checkpoint():
    with serving(metadata="short") as one, one.connect():
        pass
    other = StandIn()
    other.step = 8
    with serving(other, metadata="short") as two, two.connect():
        pass
    assert one.metadata == two.metadata and not {"step", "config", "latency"} & set(one.metadata)


def test_a_reply_is_the_plan_to_the_bit_and_echoes(served):
    with served.connect() as socket:
        for seed in range(5):
            request = observe(seed, step=seed, request_id=f"r{seed}")
            reply = served.ask(socket, request)
            np.testing.assert_array_equal(reply["actions"], wanted(request))
            assert reply["actions"].dtype == np.float32
            assert (reply["step"], reply["request_id"]) == (seed, f"r{seed}")
            timing = reply["server_timing"]
            assert timing["batch"] == 1 and timing["infer_ms"] >= 0 and timing["queue_ms"] >= 0
            assert (timing["prev_total_ms"] > 0) == (seed > 0)
            assert reply["guard"] == {"snapped": 0, "clamped": 0, "limited": 0}
        # a broker of openpi slices every array of a reply
        assert [k for k, v in reply.items() if isinstance(v, np.ndarray)] == ["actions"]


FRAME_POLICIES = {
    "request_libero": (("image", "wrist_image"), 8, "openpi_libero"),
    "request_numpy_scalars": (("image", "wrist_image"), 8, "openpi_libero"),
    "request_big_endian_noncontiguous": (("image", "wrist_image"), 8, "openpi_libero"),
    "request_unicode_prompt": (("image", "wrist_image"), 8, "openpi_libero"),
    "request_no_prompt": (("image", "wrist_image"), 8, "openpi_libero"),
    "request_droid": (("exterior_image_1_left", "wrist_image_left"), 8, "openpi_droid"),
    "request_aloha_chw_float64_state": (
        ("cam_high", "cam_left_wrist", "cam_right_wrist"),
        14,
        "openpi_aloha",
    ),
}


@pytest.mark.parametrize("name", FRAME_POLICIES)
def test_every_frame_of_openpis_client_gets_its_plan(name):
    cameras, width, table = FRAME_POLICIES[name]
    frame = (FRAMES / f"{name}.bin").read_bytes()
    sent = wire.decode(frame)
    policy = StandIn(served_lib.config(cameras, state=width))
    with serving(policy, default_prompt="do something") as running, running.connect() as socket:
        assert running.metadata["keys"]["name"] == table
        reply = running.ask(socket, frame)
    if table == "openpi_aloha":
        images = {camera: sent["images"][camera].transpose(1, 2, 0) for camera in cameras}
        state = sent["state"]
    elif table == "openpi_libero":
        images = {camera: sent[f"observation/{camera}"] for camera in cameras}
        state = sent["observation/state"]
    else:
        images = {camera: sent[f"observation/{camera}"] for camera in cameras}
        parts = sent["observation/joint_position"], sent["observation/gripper_position"]
        state = np.concatenate(parts)
    prompt = sent.get("prompt", "do something")
    np.testing.assert_array_equal(reply["actions"], served_lib.plan(images, state, prompt))
    assert reply.get("step") == sent.get("step")
    assert prompt in policy.encoded or prompt in PROMPTS


def test_clients_share_batches_and_each_gets_its_own_plan():
    policy = StandIn(seconds=0.02)
    plans, errors = {}, []

    def robot(running, number):
        try:
            with running.connect() as socket:
                for turn in range(6):
                    request = observe(100 * number + turn)
                    reply = running.ask(socket, request)
                    np.testing.assert_array_equal(reply["actions"], wanted(request))
                    plans[number, turn] = reply["server_timing"]["batch"]
        except BaseException as error:
            errors.append(error)

    with serving(policy) as running:
        robots = [threading.Thread(target=robot, args=(running, n), daemon=True) for n in range(8)]
        [thread.start() for thread in robots]
        [thread.join() for thread in robots]
    assert not errors and len(plans) == 48
    assert max(plans.values()) >= 4, "requests that wait together go together"
    assert all(rows is None for _, rows in policy.calls)


def test_exact_pads_every_batch_to_the_largest():
    policy = StandIn()
    with serving(policy, exact=True, max_batch=4) as running, running.connect() as socket:
        assert running.metadata["batching"] == {"max": 4, "exact": True}
        assert policy.warmed[0] == (4,)
        running.ask(socket, observe())
    assert {rows for _, rows in policy.calls} == {4}


def test_replies_come_in_order_and_a_third_request_is_refused():
    policy = StandIn()
    with serving(policy) as running, running.connect() as socket:
        policy.seconds = 0.15
        for number in range(4):
            socket.send(wire.encode(observe(number, request_id=number)))
        replies = [socket.recv(timeout=10) for _ in range(4)]
        assert [wire.decode(reply)["request_id"] for reply in replies[:2]] == [0, 1]
        for reply in replies[2:]:
            assert reply.startswith("overloaded: 2 requests") and "retry_ms=" in reply
        assert running.ask(socket, observe(9, request_id=9))["request_id"] == 9


def test_a_full_queue_refuses():
    policy = StandIn()
    hold = threading.Event()
    with serving(policy, max_batch=1) as running, contextlib.ExitStack() as stack:
        policy.hook = lambda prompts: hold.wait(10)
        sockets = [stack.enter_context(running.connect()) for _ in range(8)]
        for number, socket in enumerate(sockets):
            socket.send(wire.encode(observe(number)))
            time.sleep(0.02)
        refused = [sockets[-1].recv(timeout=10), sockets[-2].recv(timeout=10)]
        assert all(text.startswith("overloaded: 4 requests wait already") for text in refused)
        hold.set()
        for number, socket in enumerate(sockets[:5]):
            actions = wire.decode(socket.recv(timeout=10))["actions"]
            np.testing.assert_array_equal(actions, wanted(observe(number)))


def test_the_health_of_a_server_over_its_life():
    policy = StandIn()
    hold = threading.Event()
    short = {"request_timeout_s": 0.3, "ready": False}
    with serving(policy, **short) as running, contextlib.ExitStack() as stack:
        assert running.get("/healthz") == (503, "warming up\n")
        assert running.get("/livez") == (200, "OK\n")
        assert running.get("/metadata")[0] == 503
        waiting = stack.enter_context(served_lib.websockets_client.connect(running.url))
        with pytest.raises(TimeoutError):
            waiting.recv(timeout=0.2)
        running.call(running.server.ready)
        assert wire.decode(waiting.recv(timeout=5))["protocol"] == "openpi"
        assert running.get("/healthz") == (200, "OK\n")
        assert running.get("/nothing")[0] == 404 and running.get("/")[0] == 404
        policy.hook = lambda prompts: hold.wait(20)
        assert running.ask(waiting, observe()).startswith("timeout: no plan within 0.3 s")
        running.service.batcher._busy_since -= 31
        assert running.get("/healthz") == (503, "stuck\n")
        assert running.get("/livez") == (200, "OK\n")
        running.service.batcher._busy_since -= 120
        assert running.get("/livez") == (503, "stuck\n")
        hold.set()
        policy.hook = None
        reply = running.ask(waiting, observe(1))
        np.testing.assert_array_equal(reply["actions"], wanted(observe(1)))
        assert running.get("/healthz") == (200, "OK\n")


def test_metrics_count_what_happened():
    with serving(StandIn(statistics=served_lib.STATISTICS)) as running:
        with running.connect() as socket:
            for seed in range(3):
                running.ask(socket, observe(seed))
            running.ask(socket, observe(prompt="fold the towel"))
            running.ask(socket, observe(size=(24, 32)))
            running.ask(socket, {})
            running.policy.traces += 1
            status, text = running.get("/metrics")
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert status == 200
    assert lines['lightwam_requests_total{code="ok"}'] == "5"
    assert lines['lightwam_requests_total{code="bad_key"}'] == "1"
    assert lines["lightwam_prompts_encoded_total"] == "1"
    assert lines['lightwam_compilations_total{what="image_size"}'] == "1"
    assert lines['lightwam_compilations_total{what="action"}'] == "1"
    assert lines["lightwam_batch_size_count"] == "5"
    assert lines['lightwam_batch_size_bucket{le="1"}'] == "5"
    assert lines["lightwam_request_seconds_count"] == "5" and lines["lightwam_sessions"] == "1"
    assert lines['lightwam_info{config="stand-in",step="7",weights_hash=""}'] == "1"
    assert float(lines["lightwam_rss_bytes"]) > 1e7 and lines["lightwam_ready"] == "1"
    assert 0 <= float(lines["lightwam_last_reply_age_seconds"]) < 60


def test_listeners_hear_of_every_request():
    heard = []
    with serving(taps=True) as running, running.connect() as socket:
        running.call(lambda: running.service.listeners.append(heard.append))
        request = observe(3)
        running.ask(socket, request)
        running.ask(socket, {"state": 1})
    good, bad = heard
    assert good.code == "ok" and good.observation.prompt == PROMPTS[0]
    np.testing.assert_array_equal(good.actions, wanted(request))
    np.testing.assert_array_equal(good.observation.images["scene"], request["images"]["scene"])
    assert good.taps["attention_1_adapted"].shape == (4, 8)
    assert set(good.times) == {"decode_ms", "queue_ms", "infer_ms", "total_ms"}
    np.testing.assert_array_equal(wire.decode(good.reply)["actions"], good.actions)
    assert wire.decode(good.frame)["prompt"] == PROMPTS[0]
    assert bad.code == "bad_key" and bad.observation is None and bad.actions is None


def test_pages_and_streams_can_be_added():
    async def stream(connection):
        await connection.send("hello")

    with serving() as running:
        running.server.pages["/"] = lambda: ("text/html; charset=utf-8", b"<p>here</p>")
        running.server.streams["/live"] = stream
        assert running.get("/") == (200, "<p>here</p>")
        connect = served_lib.websockets_client.connect
        with connect(f"{running.url}/live", origin=running.http) as page:
            assert page.recv(timeout=5) == "hello"
        with pytest.raises(Exception, match="403"):
            connect(f"{running.url}/live", origin="http://elsewhere")


def test_the_loop_stays_awake_while_the_policy_works():
    policy = StandIn()
    with serving(policy) as running, running.connect() as socket:
        policy.seconds = 0.5
        socket.send(wire.encode(observe()))
        lags = []
        for _ in range(20):
            before = time.perf_counter()
            future = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), running.loop)
            future.result(5)
            lags.append(time.perf_counter() - before)
            time.sleep(0.01)
        assert socket.ping().wait(5)
        assert np.median(lags) < 0.25, "the loop waits for the policy"
        socket.recv(timeout=5)
