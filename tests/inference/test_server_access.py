"""Who gets in: keys, browsers, the number of clients, and what is no HTTP at all."""

import contextlib
import socket as sockets
import ssl
import subprocess

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync import client as websockets_client

from lightwam_jax.inference import access as access_lib
from lightwam_jax.inference import page as page_lib
from lightwam_jax.inference.client import Client
from tests.served import observe, serving, wanted


def test_handshakes_that_are_refused():
    with serving(key="secret", max_clients=1) as running:
        key = {"additional_headers": {"Authorization": "Api-Key secret"}}
        cases = [
            ({}, 401),
            ({"additional_headers": {"Authorization": "Api-Key wrong"}}, 401),
            ({**key, "origin": "http://example.com"}, 403),
        ]
        with running.connect(**key):
            for arguments, status in [*cases, (key, 503)]:
                with pytest.raises(InvalidStatus, match=str(status)), running.connect(**arguments):
                    pass
            assert running.get("/metrics")[0] == 401 and running.get("/metadata")[0] == 401
            assert running.get("/healthz")[0] == 200 and running.get("/livez")[0] == 200
            near = ("Api-Key secre", "Api-Key secrets", "Api-Key ", "secret", "Basic c2VjcmV0Og==")
            for header in near:
                assert running.get("/metrics", {"Authorization": header}.items())[0] == 401
            for header in ("Api-Key secret", "Bearer secret", "Basic OnNlY3JldA=="):
                assert running.get("/metrics", {"Authorization": header}.items())[0] == 200
        running.server._draining = True
        with pytest.raises(InvalidStatus, match="503"), running.connect(**key):
            pass
        assert running.get("/healthz") == (503, "draining\n")


def test_an_address_may_try_twenty_wrong_keys(monkeypatch):
    monkeypatch.setattr(access_lib, "_DELAY_S", 0.0)
    with serving(key="secret") as running:
        for _ in range(20):
            assert running.get("/metrics", {"Authorization": "Api-Key w"}.items())[0] == 401
        assert running.get("/metrics", {"Authorization": "Api-Key secret"}.items())[0] == 429
        assert running.get("/healthz")[0] == 200


def test_a_name_that_was_made_to_point_here_is_refused():
    """DNS rebinding: to the browser, the attacker's page and the server are of one origin."""
    other, own = "attacker.example", "localhost"
    with serving() as running:
        page_lib.prepare(running.server)
        port = running.server.port
        for path in ("/", "/metadata", "/metrics", "/live.js"):
            status, text = running.get(path, {"Host": f"{other}:{port}"}.items())
            assert status == 403 and f"'{other}:{port}'" in text and "localhost" in text
            assert running.get(path, {"Host": f"{own}:{port}"}.items())[0] == 200
        for host in (
            "",
            "127.0.0.1.example",
            "localhost.example",
            "[",
            "localhost@other",
            "10.0.0.1",
        ):
            assert running.get("/", {"Host": host}.items())[0] == 403, host
        for host in ("localhost", "LOCALHOST:1", "127.0.0.2:8000", "[::1]:8000", "[::1]"):
            assert running.get("/", {"Host": host}.items())[0] == 200, host
        with sockets.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 403")
        for path in ("", "/live"):
            given = {"sock": sockets.create_connection(("127.0.0.1", port))}
            given["origin"] = f"http://{other}:{port}" if path else None
            with pytest.raises(InvalidStatus, match="403"):
                websockets_client.connect(f"ws://{other}:{port}{path}", **given)
        with running.connect() as socket:
            np.testing.assert_array_equal(
                running.ask(socket, observe())["actions"], wanted(observe())
            )
        assert running.get("/healthz", {"Host": other}.items())[0] == 200


def test_with_a_key_or_for_other_machines_every_name_will_do():
    access = access_lib.Access("secret")
    access.listens_at("127.0.0.1")
    assert access.misdirected(["robot.example"]) is None
    access = access_lib.Access()
    access.listens_at("0.0.0.0")
    assert access.misdirected(["policy:8000"]) is None
    access.listens_at("LocalHost")
    assert access.misdirected(["policy:8000"])[0] == 403


def test_paths_that_are_none():
    with serving() as running, running.connect() as policy:
        for path in ("//[x", "//[", "//x]:y/"):
            with sockets.create_connection(("127.0.0.1", running.server.port)) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
                assert raw.recv(1000).split(b" ")[1] in (b"400", b"404"), path
            upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            upgrade += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            with sockets.create_connection(("127.0.0.1", running.server.port)) as raw:
                asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n"
                raw.sendall(asked.encode("latin-1"))
                assert raw.recv(1000).split(b" ")[1] in (b"400", b"404"), path
        assert not isinstance(running.ask(policy, observe()), str)


def test_http_that_is_none():
    with serving() as served:
        check_garbage(served)


def check_garbage(served):
    for garbage in (b"\x00" * 200, b"GET", b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n" * 50):
        with sockets.create_connection(("127.0.0.1", served.server.port)) as raw:
            raw.sendall(garbage)
    half_open = [sockets.create_connection(("127.0.0.1", served.server.port)) for _ in range(200)]
    assert served.get("/healthz") == (200, "OK\n")
    with served.connect() as socket:
        np.testing.assert_array_equal(served.ask(socket, observe())["actions"], wanted(observe()))
    [raw.close() for raw in half_open]
    with pytest.raises(InvalidStatus, match="404"):
        contextlib.ExitStack().enter_context(websockets_client.connect(f"{served.url}/elsewhere"))


def test_tls(tmp_path):
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        cwd=tmp_path,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("openssl is not here")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    trusting = ssl.create_default_context(cafile=cert)
    with serving(tls=access_lib.tls(cert, key)) as running:
        url = running.url.replace("ws://", "wss://")
        with Client(url, tls=trusting, connect_s=60) as client:
            np.testing.assert_array_equal(client.infer(observe())["actions"], wanted(observe()))
        with pytest.raises(PermissionError, match="certificate is not trusted"):
            Client(url, connect_s=30)
