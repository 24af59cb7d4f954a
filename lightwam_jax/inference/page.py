"""The live page of a policy server: what the policy sees, where it looks, what it plans.

GET / is the page, live/ its files, /live the WebSocket that feeds it. Nobody can send anything:
what a viewer says closes its stream. Pictures are made in a thread of their own, only while
somebody looks, and a viewer that is slow misses plans: it is sent the newest one, when it has taken
the one before.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import pathlib
import time
import typing
import urllib.parse

from websockets.exceptions import ConnectionClosed

from lightwam_jax.inference import page_events

STREAM = "/live"
_FILES = pathlib.Path(__file__).with_name("live")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_MOST_VIEWERS = 8
_TICK_S = 0.1  # between two messages to a viewer, at least
_STATUS_S = 1.0  # between two of them, at most
_NOTES = 20  # warnings and errors that are kept


class Seen(typing.NamedTuple):
    """A request that was answered.

    Attributes:
      event: `service.Answered` with an observation. before: that of the plan before it, of the same
        session, or None. number: of the session's requests. at: `time.monotonic()`.
    """

    event: typing.Any
    before: typing.Any
    number: int
    at: float


class Page:
    """What viewers of a `Server` are shown."""

    def __init__(self, server):
        """Args: server: `Server`, whose pages, streams and listeners this joins."""
        self._server, self._service = server, server.service
        self._seen = {}  # session -> `Seen`, the latest
        self._notes = collections.deque(maxlen=_NOTES)  # (time, session, text)
        self._changed = set()  # an event of each viewer
        self._drawn = {}  # session -> (`Seen`, future of its JSON, when it was begun)
        self._painter = concurrent.futures.ThreadPoolExecutor(1, "page")
        for file in sorted(_FILES.iterdir()):
            path = "/" if file.name == "live.html" else f"/{file.name}"
            answer = f"{_KINDS[file.suffix]}; charset=utf-8", file.read_text(encoding="utf-8")
            server.pages[path] = lambda answer=answer: answer
        server.streams[STREAM] = self._show
        self._service.listeners.append(self._hear)
        log = self._service.on_warning

        def on_warning(session, text):
            log(session, text)
            self._note(session.number, text.strip().rpartition("\n")[2])

        self._service.on_warning = on_warning

    # ---- in the event loop, at each request ----------------------------------------------------

    def _hear(self, event):
        if event.code != "ok":
            self._note(event.session, f"{event.code}: {event.message}")
        if event.observation is None:
            return
        last = self._seen.pop(event.session, None)
        before = None
        if last is not None:
            before = last.event if last.event.actions is not None else last.before
            before = before._replace(observation=None, frame=b"", taps={}) if before else None
        number = 1 if last is None else last.number + 1
        self._seen[event.session] = Seen(event, before, number, time.monotonic())
        if len(self._seen) > len(self._server.sessions):
            self._forget()
        for changed in self._changed:
            changed.set()

    def _forget(self):
        """Drops the sessions that are over, but for the last one: it can still be looked at."""
        kept = {*self._server.sessions, next(reversed(self._seen))}
        self._seen = {number: seen for number, seen in self._seen.items() if number in kept}
        self._drawn = {number: drawn for number, drawn in self._drawn.items() if number in kept}

    def _note(self, session, text):
        self._notes.append((time.time(), session, text[:300]))

    # ---- a viewer ------------------------------------------------------------------------------

    async def _show(self, connection):
        """Feeds a viewer until it leaves; `?session=N` shows one session, else the latest plan."""
        if len(self._changed) >= _MOST_VIEWERS:
            return await connection.close(1013, f"{_MOST_VIEWERS} browsers look already")
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(connection.request.path).query)
        wanted = query.get("session", [""])[0]
        wanted = int(wanted) if wanted.isdecimal() and len(wanted) < 18 else None
        changed = asyncio.Event()
        self._changed.add(changed)
        feeding = asyncio.create_task(self._feed(connection, changed, wanted))
        listening = asyncio.create_task(self._refuse_words(connection))
        try:
            await asyncio.wait((feeding, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._changed.discard(changed)
            for task in (feeding, listening):
                task.cancel()
            for result in await asyncio.gather(feeding, listening, return_exceptions=True):
                ended = isinstance(result, (asyncio.CancelledError, ConnectionClosed))
                if isinstance(result, BaseException) and not ended:
                    raise result  # the library logs it and closes with 1011

    async def _refuse_words(self, connection):
        with contextlib.suppress(ConnectionClosed):
            await connection.recv()
            await connection.close(1008, "this stream is to be looked at only")

    async def _feed(self, connection, changed, wanted):
        shown, is_told = None, False
        while True:
            changed.clear()
            began, parts = time.monotonic(), {}
            if not is_told and self._service.metadata is not None:
                parts["policy"], is_told = json.dumps(page_events.about(self._service)), True
            newest = self._pick(wanted)
            if newest is not None and newest is not shown:
                shown, parts["plan"] = await self._draw(newest)
            parts["status"] = json.dumps(self._status())
            message = "{" + ",".join(f'"{name}":{text}' for name, text in parts.items()) + "}"
            if not await self._send(connection, message):
                return
            await asyncio.sleep(max(0.0, began + _TICK_S - time.monotonic()))
            if self._pick(wanted) is shown:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STATUS_S):
                        await changed.wait()

    def _pick(self, wanted):
        if wanted is not None:
            return self._seen.get(wanted)
        return self._seen[next(reversed(self._seen))] if self._seen else None

    async def _draw(self, seen):
        """(The `Seen` that is shown, its JSON): what was drawn a moment ago serves all viewers."""
        session, now = seen.event.session, time.monotonic()
        drawn, future, began = self._drawn.get(session, (None, None, 0.0))
        if drawn is not seen and (drawn is None or now - began >= _TICK_S):
            loop = asyncio.get_running_loop()
            drawn, future = seen, loop.run_in_executor(self._painter, self._paint, seen)
            self._drawn[session] = drawn, future, now
        return drawn, await asyncio.shield(future)

    def _paint(self, seen):
        return json.dumps(page_events.plan(seen, self._service.policy))

    async def _send(self, connection, message):
        """Returns whether it was taken in time; a browser that sleeps is let go."""
        try:
            async with asyncio.timeout(self._service.options.send_timeout_s):
                await connection.send(message)
            return True
        except TimeoutError:
            connection.transport.abort()
            return False

    def _status(self):
        server, now = self._server, time.time()
        sessions = []
        for number in server.sessions:
            seen = self._seen.get(number)
            about = {"number": number, "requests": seen.number if seen else 0}
            if seen:
                about |= {"prompt": seen.event.observation.prompt}
                about |= {"age_s": round(time.monotonic() - seen.at, 1)}
            sessions.append(about)
        notes = [
            {"age_s": round(now - at, 1), "session": session, "text": text}
            for at, session, text in reversed(self._notes)
        ]
        told = {"health": server.health()[1].strip(), "sessions": sessions, "notes": notes}
        return told | page_events.counts(self._service)


def prepare(server):
    """Gives a `Server` its live page, unless its options say no_page."""
    if not server.service.options.no_page:
        Page(server)
