"""Our client: waits no longer than told, comes back after a restart, mixes no replies up."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.server import ServerProtocol
from websockets.sync import client as websockets_client
from websockets.sync import server as websockets_server

from lightwam_jax.inference import wire
from lightwam_jax.inference.client import Client, ServerGone
from tests.served import StandIn, observe, serving, wanted

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def process(port=0, seconds=0.0, load_s=0.0):
    """(process, port) of a server of its own, ready unless it takes time to load."""
    command = [sys.executable, "-m", "tests.served", str(port), str(seconds), str(load_s)]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        line = running.stdout.readline()
        assert line.startswith("warming up at"), line
        if not load_s:
            while not (last := running.stdout.readline()).startswith("serving"):
                assert last, "the server ended"
        yield running, int(line.rsplit(":", 1)[1])
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


@contextlib.contextmanager
def served_socket(port):
    """A raw connection, its metadata read."""
    url = f"ws://127.0.0.1:{port}"
    with websockets_client.connect(url, compression=None, close_timeout=1) as connection:
        connection.recv(timeout=10)
        yield connection


def fake(answer):
    """A server whose replies are `answer(request)`: bytes, text, or None for silence."""

    def handle(connection):
        connection.send(wire.encode({"protocol": "openpi"}))
        for frame in connection:
            reply = answer(wire.decode(frame))
            if reply is not None:
                connection.send(reply)

    server = websockets_server.serve(handle, "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


def test_robots_need_no_jax():
    absent = "('jax', 'flax', 'PIL', 'ml_dtypes', 'absl', 'orbax')"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"
        "from lightwam_jax.inference import chunking, client, keys, safety, wire;"
        "print(client.Client.infer and safety.Guard and chunking.ChunkQueue and 'fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_plans_arrive_with_their_latency():
    with serving() as running, Client(running.url) as client:
        assert client.metadata["cameras"] == ["scene", "wrist"]
        for seed in range(3):
            reply = client.infer(observe(seed))
            np.testing.assert_array_equal(reply["actions"], wanted(observe(seed)))
            assert 0 < client.latency[1] <= client.latency[0] < 5


def test_a_refusal_has_a_code_and_the_connection_goes_on():
    with serving() as running, Client(running.url) as client:
        with pytest.raises(wire.WireError, match="the state has 3 numbers") as caught:
            client.infer(observe() | {"state": np.zeros(3)})
        assert caught.value.code == "bad_state"
        np.testing.assert_array_equal(client.infer(observe())["actions"], wanted(observe()))


def test_a_fault_of_the_server_is_told_and_survived():
    policy = StandIn()
    with serving(policy) as running, Client(running.url, retry_s=2) as client:
        policy.hook = lambda prompts: 1 / 0
        with pytest.raises(wire.WireError, match="internal: ZeroDivisionError"):
            client.infer(observe())
        policy.hook = None
        np.testing.assert_array_equal(client.infer(observe())["actions"], wanted(observe()))


def test_a_late_reply_is_never_taken_for_the_next():
    policy = StandIn()
    with serving(policy) as running, Client(running.url) as client:
        policy.hook = lambda prompts: time.sleep(0.4)
        with pytest.raises(TimeoutError, match=r"no reply in 0\.2 s"):
            client.infer(observe(1), timeout_s=0.2)
        policy.hook = None
        np.testing.assert_array_equal(client.infer(observe(2))["actions"], wanted(observe(2)))


def test_replies_of_other_requests_and_bad_ones_are_refused():
    actions = np.zeros((8, 4), np.float32)
    cases = {
        "the reply of another request": lambda r: {"actions": actions, "request_id": 77},
        "not finite": lambda r: {"actions": actions * np.nan},
        r"without actions \[T,A\]": lambda r: {"actions": actions[0]},
        "without actions": lambda r: {},
        "bad_frame": lambda r: b"\xc1",
        "internal: it went wrong": lambda r: "it went wrong",
    }
    for message, answer in cases.items():
        reply = lambda r, a=answer: x if isinstance(x := a(r), (bytes, str)) else wire.encode(x)
        server, url = fake(reply)
        with Client(url) as client, pytest.raises(wire.WireError, match=message):
            client.infer(observe())
        server.shutdown()


def test_openpis_servers_answer_too():
    server, url = fake(lambda request: wire.encode({"actions": request["state"][None]}))
    with Client(url) as client:
        state = observe()["state"]
        np.testing.assert_array_equal(client.infer(observe())["actions"], state[None])
    server.shutdown()


def deaf():
    """The address of a server that shakes hands, sends metadata, and then reads nothing."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                protocol = ServerProtocol()
                protocol.receive_data(connection.recv(4096))
                protocol.send_response(protocol.accept(protocol.events_received()[0]))
                protocol.send_binary(wire.encode({"protocol": "openpi"}))
                for part in protocol.data_to_send():
                    connection.sendall(part)
                kept.append(connection)

    kept = [listening]
    threading.Thread(target=serve, daemon=True).start()
    return kept, f"ws://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_does_not_read_is_not_waited_for():
    """Sending ends in time too, and the client can go on: with the next connection."""
    kept, url = deaf()
    large = {"images": {"scene": np.zeros((4000, 4000, 3), np.uint8)}}
    with Client(url) as client:
        for timeout_s in (0.3, 0.2):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=rf"no reply in {timeout_s} s"):
                client.infer(large, timeout_s=timeout_s)
            assert time.monotonic() - began < 5
        watching = client._watch._thread
        assert watching.is_alive()
    watching.join(5)
    assert not watching.is_alive()
    [each.close() for each in kept]


def test_silence_ends_in_time():
    server, url = fake(lambda request: None)
    with Client(url, timeout_s=0.3) as client:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            client.infer(observe())
        assert time.monotonic() - began < 2
    server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts and says nothing
        began = time.monotonic()
        with pytest.raises(ServerGone, match=r"no policy server at .* within 0\.5 s"):
            Client(f"ws://127.0.0.1:{deaf.getsockname()[1]}", connect_s=0.5)
        assert time.monotonic() - began < 3


def test_a_server_that_warms_up_is_told_from_none():
    warming = threading.Event()
    server = websockets_server.serve(lambda _: warming.wait(5), "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(ServerGone, match=r"within 0\.5 s: it is there, but not ready"):
        Client(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", connect_s=0.5)
    warming.set()
    server.shutdown()


def test_a_wrong_key_is_said_at_once():
    with serving(key="secret") as running:
        with pytest.raises(PermissionError, match=r"HTTP 401.*: this server needs a key"):
            Client(running.url, key="wrong")
        with Client(running.url, key="secret") as client:
            np.testing.assert_array_equal(client.infer(observe())["actions"], wanted(observe()))


def test_started_before_the_server_it_waits():
    with process(load_s=1.0) as (_, port), Client(f"ws://127.0.0.1:{port}", connect_s=30) as client:
        np.testing.assert_array_equal(client.infer(observe())["actions"], wanted(observe()))


def test_killed_and_restarted_in_mid_episode():
    """Back within 2 s of listening, and no reply of before is used."""
    with process(seconds=0.3) as (first, port):
        client = Client(f"ws://127.0.0.1:{port}", retry_s=30)
        np.testing.assert_array_equal(client.infer(observe(0))["actions"], wanted(observe(0)))
        answers = []

        def ask():
            answers.append((client.infer(observe(1)), time.monotonic()))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(0.1)  # the request is being planned
        first.send_signal(signal.SIGKILL)
        first.wait()
        with process(port=port) as _:
            listening = time.monotonic()
            asking.join(20)
            reply, at = answers[0]
            assert at - listening < 2
            np.testing.assert_array_equal(reply["actions"], wanted(observe(1)))
            for seed in (2, 3):
                np.testing.assert_array_equal(
                    client.infer(observe(seed))["actions"], wanted(observe(seed))
                )
    client.close()


def test_stopped_under_load_no_accepted_request_is_lost():
    """SIGTERM: what was planned arrives, the rest is refused, and the exit status is 0."""
    outcomes, received, stop = [], [], threading.Event()

    def robot(number, port):
        with served_socket(port) as connection:
            turn = 0
            while not stop.is_set():
                request = observe(1000 * number + turn)
                try:
                    connection.send(wire.encode(request))
                    reply = connection.recv(timeout=10)
                except ConnectionClosed as error:
                    return outcomes.append(error)
                if isinstance(reply, str):
                    return outcomes.append(reply)
                np.testing.assert_array_equal(wire.decode(reply)["actions"], wanted(request))
                received.append(request)
                turn += 1

    with process(seconds=0.05) as (running, port):
        robots = [threading.Thread(target=robot, args=(n, port), daemon=True) for n in range(6)]
        [thread.start() for thread in robots]
        time.sleep(0.6)
        running.send_signal(signal.SIGTERM)
        [thread.join(15) for thread in robots]
        stop.set()
        assert running.wait(10) == 0
        assert running.stdout.read() == f"planned {len(received)}\n"
    assert len(outcomes) == 6 and len(received) > 20
    for outcome in outcomes:  # 1001: closed before the request was read
        assert str(outcome).startswith("draining: ") or "1001" in str(outcome), outcome


def test_a_second_signal_ends_at_once():
    with process(seconds=4.0) as (running, port), served_socket(port) as connection:
        connection.send(wire.encode(observe()))
        time.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.poll() is None, "it answers what it accepted"
        running.send_signal(signal.SIGTERM)
        assert running.wait(3) == 1


def test_a_server_that_cannot_start_says_so_before_any_metadata():
    with process(load_s=-1.5) as (running, port):
        url = f"ws://127.0.0.1:{port}"
        connecting = websockets_client.connect(url, compression=None)
        with connecting as connection, pytest.raises(ConnectionClosed):
            connection.recv(timeout=10)
        assert running.wait(10) == 1


def test_stopped_while_it_loads_it_does_not_wait_for_that():
    with process(load_s=60.0) as (running, _):
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
