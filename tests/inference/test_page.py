"""The live page: served, with the key, to its own origin; its viewers never hold up the policy."""

import base64
import contextlib
import dataclasses
import io
import json
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync import client as websockets_client

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.inference import attention, page, page_events
from tests.served import StandIn, config, observe, serving, wanted

KEY = "open sesame"
UPGRADE = (
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
FILES = {"/": "text/html", "/live.css": "text/css", "/live.js": "text/javascript"}


class Looking(StandIn):
    """Its two queries look at the left cell and, three times as important, at the right one."""

    def act(self, images, state, prompts, return_taps=False, rows=None):
        actions = super().act(images, state, prompts, rows=rows)
        taps = {
            "attention_1_adapted": np.tile(np.eye(2, dtype=np.float32), (len(state), 1, 1)),
            "query_importance_1_adapted": np.array([0.25, 0.75], np.float32),
        }
        return (actions, taps) if return_taps else actions


@contextlib.contextmanager
def shown(policy=None, **options):
    """A running server with its page."""
    with serving(policy, **options) as running:
        running.call(lambda: page.prepare(running.server))
        yield running


@pytest.fixture(scope="module")
def served():
    with shown(Looking(), taps=True) as running:
        yield running


def look(running, path="/live", **arguments):
    """A viewer's WebSocket."""
    return websockets_client.connect(running.url + path, close_timeout=1, **arguments)


def until(viewer, name, fits=lambda value: True):
    """The next message part of that name that fits."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        value = json.loads(viewer.recv(timeout=10)).get(name)
        if value is not None and fits(value):
            return value
    raise AssertionError(f"no such {name} within 10 s")


def get(running, path, **headers):
    request = urllib.request.Request(running.http + path, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers, response.read().decode()


@pytest.mark.parametrize("path", FILES)
def test_the_page_needs_no_other_host(served, path):
    headers, text = get(served, path)
    assert headers["Content-Type"] == f"{FILES[path]}; charset=utf-8" and len(text) > 1000
    addresses = text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in addresses and "https://" not in addresses


def test_a_policy_without_queries_has_no_attention_to_ask_for():
    own = config()
    flow = dataclasses.replace(own.model, action_head="flow_dit")
    policy = StandIn(dataclasses.replace(own, model=flow))
    with shown(policy, taps=True) as running, look(running) as viewer:
        about = until(viewer, "policy")
        assert not about["attends"] and not about["taps"] and not policy.warmed[2]
        with running.connect() as robot:
            running.ask(robot, observe(0))
        assert until(viewer, "plan")["attention"] == {}


def test_a_viewer_is_told_what_is_served_then_every_plan(served):
    with look(served) as viewer, served.connect() as robot:
        about = until(viewer, "policy")
        assert (about["config"], about["step"], about["canvas"]) == ("stand-in", 7, [16, 32])
        assert [camera["name"] for camera in about["cameras"]] == ["scene", "wrist"]
        assert about["cameras"][1]["left"] == about["cameras"][1]["width"] == 0.5
        assert len(about["dims"]) == 4 and about["horizon"] == 8
        assert about["taps"] and about["attends"]
        for seed in range(2):
            request = observe(seed, step=4 * seed)
            served.ask(robot, request)
            sent = wanted(request)
            fits = lambda plan, sent=sent: np.allclose(plan["actions"], sent, atol=1e-5)
            plan = until(viewer, "plan", fits)
        assert plan["prompt"] == request["prompt"] and plan["times"]["total_ms"] > 0
        kind, _, data = plan["picture"].partition(",")
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        images = request["images"]
        assert kind == "data:image/png;base64"
        np.testing.assert_array_equal(seen, np.concatenate([*images.values()], axis=1))
        assert plan["attention"] == {"1_adapted": {"size": [1, 2], "cells": [0.5, 1.5]}}
        np.testing.assert_allclose(plan["before"]["actions"], wanted(observe(0, step=0)), atol=1e-5)
        assert plan["before"]["shift"] == 4
        status = until(viewer, "status", lambda s: s["codes"].get("ok", 0) >= 2)
        assert status["health"] == "OK" and status["latency"]["p95_ms"] > 0
        (session,) = status["sessions"]
        assert (session["requests"], session["prompt"]) == (2, request["prompt"])


def test_the_plan_before_is_of_the_same_episode_and_session(served):
    with served.connect() as one, served.connect() as other:
        with look(served) as viewer:
            served.ask(one, observe(1, step=4))
            served.ask(other, observe(2, step=8))
            fits = lambda plan: plan["state"] == pytest.approx(observe(2)["state"], abs=1e-5)
            newest = until(viewer, "plan", fits)
            assert newest["before"] is None
            served.ask(other, observe(3))
            plan = until(viewer, "plan", lambda plan: plan["number"] == 2)
            assert plan["before"]["shift"] is None  # requests without a step
        served.ask(one, observe(4, step=0))
        served.ask(other, observe(5))
        with look(served, f"/live?session={newest['session'] - 1}") as viewer:
            plan = until(viewer, "plan")
            assert (plan["number"], plan["before"]) == (2, None)  # the steps began anew
            assert plan["session"] == newest["session"] - 1


def test_errors_warnings_and_the_guard_are_shown(served):
    with look(served) as viewer, served.connect() as robot:
        request = observe(5)
        served.ask(robot, {**request, "state": request["state"][:2]})
        served.ask(robot, {**request, "promt": "typo"})
        fits = lambda status: "promt" in str(status["notes"])
        newest, older, *_ = until(viewer, "status", fits)["notes"]
    assert newest["text"].startswith("the key 'promt' is ignored")
    assert older["text"].startswith("bad_state: ") and older["session"] == newest["session"]


def test_guard_counts_come_by_dimension(tmp_path):
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"low": [-0.01] * 4, "high": [0.01] * 4}), encoding="utf-8")
    with shown(limits=str(path)) as running, running.connect() as robot:
        reply = running.ask(robot, observe())
        guard = page_events.counts(running.service)["guard"]
    assert sum(guard["clamped"]) == reply["guard"]["clamped"] > 0
    assert len(guard["clamped"]) == 4 and sum(guard["snapped"]) == 0


def test_without_taps_the_rest_is_shown():
    with shown() as running, look(running) as viewer, running.connect() as robot:
        assert not until(viewer, "policy")["taps"]
        running.ask(robot, observe())
        plan = until(viewer, "plan")
        assert plan["attention"] == {} and len(plan["actions"]) == 8


def test_nothing_is_drawn_when_nobody_looks(monkeypatch):
    drawn = []
    original = page_events.plan
    note = lambda *given: drawn.append(1) or original(*given)
    monkeypatch.setattr(page_events, "plan", note)
    with shown() as running, running.connect() as robot:
        for seed in range(5):
            running.ask(robot, observe(seed))
        assert not drawn
        with look(running) as viewer:  # who comes late sees the last plan
            assert np.allclose(until(viewer, "plan")["actions"], wanted(observe(4)), atol=1e-5)
        time.sleep(0.2)
        seen = len(drawn)
        running.ask(robot, observe(6))
        time.sleep(0.2)
        assert seen == len(drawn) == 1


def test_many_plans_are_ten_messages_a_second(served):
    with served.connect() as robot, look(served) as viewer:
        stop = threading.Event()

        def ask():
            seed = 0
            while not stop.is_set():
                served.ask(robot, observe(seed := seed + 1))

        robots = threading.Thread(target=ask)
        robots.start()
        began, count = time.monotonic(), 0
        while time.monotonic() < began + 1:
            viewer.recv(timeout=5)
            count += 1
        seconds = time.monotonic() - began  # the last message may have come late
        stop.set()
        robots.join()
    assert 3 <= count <= 10 * seconds + 2  # one at once, and one that was waiting


def test_a_viewer_that_does_not_read_holds_up_nobody():
    policy = StandIn(config(canvas=(512, 1024)))
    with shown(policy, send_timeout_s=0.5) as running, running.connect() as robot:
        # A small buffer of the system, and a viewer that never reads.
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", running.server.port))
        raw.sendall(UPGRADE)
        looking = running.service.listeners[0].__self__._changed
        with look(running, max_size=None) as viewer:
            end, seed = time.monotonic() + 20, 0
            while len(looking) < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            while len(looking) == 2:  # until the one that sleeps is let go
                assert time.monotonic() < end
                seed += 1
                request = observe(seed, (512, 512))
                np.testing.assert_array_equal(
                    running.ask(robot, request)["actions"], wanted(request)
                )
                with contextlib.suppress(TimeoutError):
                    viewer.recv(timeout=0)
            until(viewer, "plan", lambda plan: plan["number"] == seed)  # another one is served
        raw.close()


def test_a_viewer_may_say_nothing(served):
    with look(served) as viewer:
        viewer.send("move")
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                viewer.recv(timeout=10)
    assert closed.value.rcvd.code == 1008


def test_so_many_viewers_and_no_more(served):
    with contextlib.ExitStack() as stack:
        for _ in range(page._MOST_VIEWERS):
            viewer = stack.enter_context(look(served))
            until(viewer, "status")
        extra = stack.enter_context(look(served))
        with pytest.raises(ConnectionClosed) as closed:
            extra.recv(timeout=10)
    assert closed.value.rcvd.code == 1013


def test_other_origins_are_refused(served):
    with pytest.raises(InvalidStatus) as refused, look(served, origin="http://elsewhere"):
        pass
    assert refused.value.response.status_code == 403
    with look(served, origin=served.http) as viewer:
        until(viewer, "status")


def test_the_key_is_needed_and_the_page_hands_a_ticket_to_its_stream():
    with shown(key=KEY) as running:
        for path in FILES:
            assert running.get(path)[0] == 401
        with pytest.raises(InvalidStatus) as refused, look(running):
            pass
        assert refused.value.response.status_code == 401
        with look(running, additional_headers={"Authorization": f"Api-Key {KEY}"}) as viewer:
            until(viewer, "status")
        basic = base64.b64encode(f"me:{KEY}".encode()).decode()
        headers, _ = get(running, "/", Authorization=f"Basic {basic}")
        ticket, *more = headers["Set-Cookie"].split("; ")
        assert more == ["HttpOnly", "SameSite=Strict"] and KEY not in ticket
        with look(running, additional_headers={"Cookie": f"a=b; {ticket}"}) as viewer:
            until(viewer, "status")
        for path in ("/", "/metrics"):  # it opens nothing else
            assert running.get(path, {"Cookie": ticket})[0] == 401
        with (
            pytest.raises(InvalidStatus),
            look(running, "/", additional_headers={"Cookie": ticket}),
        ):
            pass
        wrong = {"Cookie": ticket[:-1] + ("a" if ticket[-1] != "a" else "b")}
        with pytest.raises(InvalidStatus), look(running, additional_headers=wrong):
            pass


def test_no_page():
    with shown(no_page=True) as running:
        assert [running.get(path)[0] for path in FILES] == [404] * 3
        with pytest.raises(InvalidStatus) as refused, look(running):
            pass
        assert refused.value.response.status_code == 404
        assert not running.service.listeners


def test_before_it_is_ready_the_page_says_so():
    with serving(ready=False) as running:
        running.call(lambda: page.prepare(running.server))
        with look(running) as viewer:
            assert until(viewer, "status")["health"] == "warming up"


def test_large_canvases_are_jpeg():
    picture = page_events.picture(np.zeros((256, 256, 3), np.uint8))
    assert picture.startswith("data:image/jpeg;base64,")


def test_maps_weigh_queries_by_their_importance():
    weights = np.random.default_rng(0).dirichlet(np.ones(8), (3, 2)).astype(np.float32)
    taps = {"attention_8_a": weights, "query_importance_8_a": np.float32([0.25, 0.75])}
    data = config(canvas=(32, 64)).data
    maps = attention.maps(taps, data)["8_a"]
    assert maps.shape == (3, 2, 4)
    np.testing.assert_allclose(maps.reshape(3, 8), weights.transpose(0, 2, 1) @ [0.25, 0.75], 1e-6)
    assert attention.maps({}, data) == {}
    assert cameras_lib.regions(data, (2, 4))["wrist"].left == 2
