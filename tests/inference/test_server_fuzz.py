"""2,000 damaged requests against a live server: answered or closed, and nobody else notices."""

import contextlib
import threading

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from lightwam_jax.inference import serving_metrics, wire
from tests import served as served_lib
from tests.mutations import FRAMES, mutations
from tests.served import StandIn, observe, serving, wanted


def good_robot(running, stop, plans):
    with running.connect() as socket:
        while not stop.is_set():
            request = observe(len(plans) % 7)
            reply = running.ask(socket, request)
            plans.append(np.array_equal(reply["actions"], wanted(request)))


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_requests_are_answered_or_closed(count):
    policy = StandIn(statistics=served_lib.STATISTICS)
    frames = [frame for frame in FRAMES if b"observation/image" in frame]
    frames += [wire.encode(observe(seed, age_ms=1.0)) for seed in range(len(frames))]
    stop, plans, outcomes = threading.Event(), [], {"plan": 0, "refused": 0, "closed": 0}
    with (
        serving(policy, most_errors=50, max_new_sizes=4) as running,
        contextlib.ExitStack() as kept,
    ):
        robot = threading.Thread(target=good_robot, args=(running, stop, plans), daemon=True)
        robot.start()
        kept.callback(stop.set)
        socket, rss = None, 0
        for number, frame in enumerate(mutations(count, count, frames)):
            if socket is None:
                socket = kept.enter_context(running.connect())
            try:
                reply = running.ask(socket, frame)
                outcomes["refused" if isinstance(reply, str) else "plan"] += 1
                if isinstance(reply, str):
                    code = wire.WireError.from_text(reply).code
                    assert code not in ("internal", "timeout") and "Traceback" not in reply, reply
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.code in (1008, 1009), closed
                outcomes["closed"] += 1
                socket = None
            if number % 100 == 99:
                with running.connect() as other:
                    request = observe(number)
                    reply = running.ask(other, request)
                    np.testing.assert_array_equal(reply["actions"], wanted(request))
            if number == 500:
                rss = serving_metrics.rss_bytes()
        grown = serving_metrics.rss_bytes() - rss
        stop.set()
        robot.join(10)
        assert running.get("/healthz") == (200, "OK\n")
    assert len(plans) > 50 and all(plans), "another connection got every plan, to the bit"
    assert outcomes["plan"] > 20 and outcomes["refused"] > 1000 and outcomes["closed"] > 3, outcomes
    assert grown < 2**26
