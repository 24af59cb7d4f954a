"""One connection of the policy server: metadata first, then a reply for each request, in order."""

import asyncio
import collections
import json
import socket
import sys
import time

from websockets.exceptions import ConnectionClosed

from lightwam_jax.inference import service as service_lib

_IN_FLIGHT = 2  # requests of a connection that are answered: one asked, one that waits
_REFUSED = 20  # further ones that wait for their refusal; then the connection is not read
_LOG_EVERY = 100  # requests


def log(event, **values):
    """Writes one line of JSON to stderr."""
    line = {"time": round(time.time(), 3), "event": event, **values}
    print(json.dumps(line), file=sys.stderr, flush=True)


class Connection:
    """The server's side of a client, from handshake to close.

    Attributes:
      pending: requests that were accepted and have no reply yet.
    """

    def __init__(self, socket_, service, is_draining):
        """Args:

        socket_: `websockets.asyncio.server.ServerConnection`. service: `Service`, started.
        is_draining: function () -> bool; what comes then is refused.
        """
        self._socket, self._service, self._is_draining = socket_, service, is_draining
        self._session = service_lib.Session(service.rules)
        self._queue, self._changed = collections.deque(), asyncio.Condition()
        self._errors = self.pending = 0

    async def run(self):
        """Serves until either side closes."""
        peer = str((self._socket.remote_address or ("?",))[0])
        log("open", session=self._session.number, address=peer)
        _keep_alive(self._socket)
        tasks = []
        try:
            if await self._send(self._service.metadata):
                tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._reply())]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except ConnectionClosed:
            pass  # while it got the metadata
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, ConnectionClosed):
                    log("error", session=self._session.number, error=repr(result))
                    await self._close(1011, "internal error")
            self.pending = 0
            codes = dict(self._session.codes)
            reason = f"{self._socket.close_code} {self._socket.close_reason or ''}".strip()
            log("close", session=self._session.number, reason=reason, requests=codes)

    async def _receive(self):
        """Reads frames; those beyond what is answered keep their place in the order."""
        while True:
            try:
                async with asyncio.timeout(self._service.options.idle_s):
                    frame = await self._socket.recv()
            except TimeoutError:
                if self.pending:
                    continue
                await self._close(1001, "idle")
                return
            refusal = None
            if self._is_draining():
                refusal = "draining: the server stops; ask another, or again in a while"
            elif self.pending >= _IN_FLIGHT:
                refusal = f"overloaded: {self.pending} requests of this connection have no reply "
                refusal += "yet; wait for them; retry_ms=50"
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._queue) < _REFUSED)
                self._queue.append((None, refusal) if refusal else (frame, None))
                self.pending += refusal is None
                self._changed.notify_all()

    async def _reply(self):
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._queue)
                frame, refusal = self._queue.popleft()
                self._changed.notify_all()
            if refusal is None:
                reply, fault = await self._service.answer(frame, self._session)
            else:
                reply, fault = refusal, False
                code = refusal.partition(":")[0]
                self._session.codes[code] += 1
                self._service.metrics.count("requests_total", code=code)
            sent = await self._send(reply)
            self.pending -= refusal is None
            if not sent:
                return
            if fault:
                return await self._close(1011, "internal error")
            self._errors = self._errors + 1 if isinstance(reply, str) else 0
            if self._errors >= self._service.options.most_errors:
                return await self._close(1008, f"{self._errors} errors in a row")
            total = self._session.codes.total()
            if total % _LOG_EVERY == 0:
                codes = dict(self._session.codes)
                log("requests", session=self._session.number, requests=codes)

    async def _send(self, message):
        """Returns whether it was sent in time; a client that does not read is let go."""
        try:
            async with asyncio.timeout(self._service.options.send_timeout_s):
                await self._socket.send(message)
            return True
        except TimeoutError:
            await self._close(1008, "the client does not read its replies")
            self._socket.transport.abort()
            return False

    async def _close(self, code, reason):
        try:
            async with asyncio.timeout(1):
                await self._socket.close(code, reason)
        except TimeoutError:
            self._socket.transport.abort()


def _keep_alive(connection):
    """Finds out, in the kernel, about clients that vanished without a word."""
    raw = connection.transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
