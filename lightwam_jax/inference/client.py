"""Asks a policy server, from a robot's or a simulator's process; no jax.

    with Client("ws://gpu:8000") as policy:
        reply = policy.infer({"images": {...}, "state": state, "prompt": "put the red ..."})
        reply["actions"]  # f32 [T,A]

Unlike openpi's client it waits no longer than it is told, finds the server again after a restart,
and never takes the reply of one request for that of another.
"""

import contextlib
import itertools
import math
import socket
import ssl
import threading
import time

import numpy as np
from websockets.exceptions import (
    ConnectionClosed,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync import client as websockets_client

from lightwam_jax.inference import wire

_METADATA_LIMITS = wire.Limits(containers=4096, items=2**16)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 0.5  # between two tries to connect


class ServerGone(ConnectionError):
    """The connection was lost before the reply came, or none could be opened in time."""


class Client:
    """A connection to a policy server; not for several threads at once.

    Attributes:
      metadata: what the server says about itself; after a reconnection, the new server's.
      latency: (seconds of the last `infer`, of them in the server's hands), floats.
    """

    def __init__(self, url, key="", timeout_s=30.0, connect_s=300.0, retry_s=10.0, tls=None):
        """Connects, and waits until the server is ready.

        Args:
          url: "ws://HOST:PORT" or "wss://". key: of the server.
          timeout_s: longest wait for a reply. connect_s: longest wait for the server at the start.
          retry_s: longest wait for it in `infer`, after the connection was lost.
          tls: `ssl.SSLContext` for wss://; default: the system's certificates.

        Raises:
          ServerGone: nobody answers within connect_s.
          PermissionError: the key is wrong, or the certificate is not trusted.
        """
        self._url, self._key, self._tls = url, key, tls
        self._timeout, self._retry = timeout_s, retry_s
        self._ids, self._socket = itertools.count(1), None
        self._open, self._watch = contextlib.ExitStack(), _Watch()
        self.latency = 0.0, 0.0
        self._connect(connect_s)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Hangs up."""
        self._watch.close()
        self._hang_up()

    def _hang_up(self):
        self._socket = None
        self._open.close()

    def infer(self, observation, timeout_s=None):
        """Returns the reply to an observation: {"actions": f32 [T,A], "server_timing", ...}.

        Where the connection is lost, the observation is sent again to the server that comes back:
        within retry_s and `timeout_s`, and its age_ms says how old it is by then.

        Args:
          observation: dict as the server's key table says. `request_id` is set here.
          timeout_s: for sending it and for the reply together; default: of the client.

        Raises:
          WireError: the server refused; `code` says why, the connection goes on.
          TimeoutError: no reply in time. It is not taken later either: the next call connects anew.
          ServerGone: the connection was lost, and the server is not back in time.
        """
        began = time.monotonic()
        end = began + (self._timeout if timeout_s is None else timeout_s)
        number, give_up = next(self._ids), None
        while True:
            try:
                if self._socket is None:
                    give_up = give_up or min(end, time.monotonic() + self._retry)
                    self._connect(give_up - time.monotonic())
                reply = self._ask(_aged(observation, number, began), end)
                if not (isinstance(reply, str) and reply.startswith("draining:")):
                    break
                why = reply
            except ConnectionClosed as error:
                why = str(error)
            except TimeoutError:
                self._drop()  # with it whatever comes later
                raise TimeoutError(f"{self._url} gave no reply in {end - began:.1f} s") from None
            except BaseException:  # interrupted: the reply must not be the next request's
                self._drop()
                raise
            self._drop()
            give_up = give_up or min(end, time.monotonic() + self._retry)
            if time.monotonic() >= give_up:
                raise ServerGone(f"{self._url} closed the connection: {why}")
        reply = self._checked(reply, number)
        served = reply.get("server_timing", {})
        inside = sum(served.get(name, 0.0) for name in ("queue_ms", "infer_ms")) / 1e3
        self.latency = time.monotonic() - began, inside
        return reply

    def _ask(self, frame, end):
        try:
            with self._watch.until(end, self._socket.socket):
                self._socket.send(frame)
        except ConnectionClosed:
            if time.monotonic() >= end:
                raise TimeoutError from None
            raise
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return self._socket.recv(timeout=left)

    def _checked(self, reply, number):
        if isinstance(reply, str):
            error = wire.WireError.from_text(reply)
            if error.code == "internal":
                self._drop()  # the server closes it
            raise error
        reply = wire.decode(reply)
        # openpi's servers do not say whose reply it is; replies come in order.
        if reply.get("request_id", number) != number:
            self._drop()
            raise wire.WireError("bad_frame", "the reply of another request; connection dropped")
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise wire.WireError("bad_frame", "a reply without actions [T,A]")
        if not np.isfinite(actions).all():
            raise wire.WireError("not_finite", "the server sent actions that are not finite")
        return reply

    def _drop(self):
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.socket.shutdown(socket.SHUT_RDWR)  # nobody may be there to answer
            self._hang_up()

    def _connect(self, seconds):
        """Opens a connection and reads the metadata, which come when the server is ready."""
        end, wait, why = time.monotonic() + seconds, _FIRST_WAIT_S, "no time was left"
        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        while (left := end - time.monotonic()) > 0:
            try:
                connecting = websockets_client.connect(
                    self._url,
                    additional_headers=headers,
                    compression=None,
                    max_size=None,
                    open_timeout=min(left, 10.0),
                    close_timeout=1,
                    ping_timeout=None,
                    ssl=self._tls,
                    proxy=None,
                )
                self._socket = self._open.enter_context(connecting)
                _give_up_after(self._socket.socket, self._timeout)
                frame = self._socket.recv(timeout=max(end - time.monotonic(), 0.001))
                self.metadata = wire.decode(frame, _METADATA_LIMITS)
                return
            except InvalidStatus as error:
                status = error.response.status_code
                if status in (401, 403, 404):
                    said = (error.response.body or b"").decode("utf-8", "replace").strip()
                    raise PermissionError(
                        f"{self._url} refuses with HTTP {status}, check the key and the address: "
                        f"{said[:300]}"
                    ) from error
                why = f"HTTP {status}"
            except ssl.SSLCertVerificationError as error:
                raise PermissionError(f"{self._url}: its certificate is not trusted") from error
            except InvalidURI as error:
                raise ValueError(f"{self._url!r} is no address such as ws://gpu:8000") from error
            except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
                why = str(error) or type(error).__name__
                if self._socket is not None and isinstance(error, TimeoutError):
                    why = "it is there, but not ready: it says 'serving' when it has warmed up"
            self._drop()
            time.sleep(max(0.0, min(wait, end - time.monotonic())))
            wait = min(2 * wait, _LONGEST_WAIT_S)
        raise ServerGone(f"no policy server at {self._url} within {seconds:.1f} s: {why}")


class _Watch:
    """Ends connections that are not done with something in time.

    One thread, which is woken only for an end that comes before all it knows of: a thread for each
    request would cost more than the request's sending.
    """

    def __init__(self):
        self._changed, self._thread = threading.Condition(), None
        self._end, self._socket = math.inf, None  # of what is going on
        self._wakes = math.inf

    @contextlib.contextmanager
    def until(self, end, connection):
        """Shuts a socket down where what is done inside is not done at `end`."""
        with self._changed:
            self._end, self._socket = end, connection
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
                self._thread.start()
            elif end < self._wakes:
                self._wakes = end
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._end, self._socket = math.inf, None

    def close(self):
        """Lets the thread end."""
        with self._changed:
            self._thread = None
            self._changed.notify()

    def _work(self):
        with self._changed:
            while self._thread is threading.current_thread():
                now = time.monotonic()
                if self._end <= now:
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)
                    self._end = math.inf
                self._wakes = self._end
                self._changed.wait(min(self._wakes - now, threading.TIMEOUT_MAX))


def _aged(observation, number, began):
    """The frame of an observation that was taken, or given, at `began`."""
    age = observation.get("age_ms", 0.0) + 1e3 * (time.monotonic() - began)
    return wire.encode({**observation, "request_id": number, "age_ms": age})


def _give_up_after(connection, seconds):
    """Ends a connection whose other side takes nothing any more, where the system can."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * seconds))
