"""A policy for robots and simulators over WebSockets, in openpi's protocol.

    python -m lightwam_jax.inference.server --workdir runs/demo --port 8000

openpi's clients work unchanged. docs/serving.md has the keys of a request, every error and what to
do about it. It listens at this machine only, unless --host says otherwise and a key is given.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import urllib.parse

from absl import app, flags

from lightwam_jax import command_line
from lightwam_jax.inference import serving_options as options_lib

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Run directory of train.py, or a checkpoint.")
    flags.DEFINE_integer("step", None, "Checkpoint to serve; default: the newest.")
    flags.DEFINE_string("embodiment", "", "Whose cameras and units, where a mixture had several.")
    flags.DEFINE_string("text_weights", "", "Where the text encoder is, if elsewhere.")
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "In which it computes.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of them.")
    flags.DEFINE_integer("port", 8000, "Port; 0: any that is free.")
    flags.DEFINE_string("api_key_file", "", "File with the key that clients must send.")
    flags.DEFINE_bool("insecure", False, "Let other machines in without a key.")
    flags.DEFINE_string("certfile", "", "TLS certificate chain, PEM.")
    flags.DEFINE_string("keyfile", "", "Its private key, PEM, if not in --certfile.")
    flags.DEFINE_string("record", "", "Directory for all requests and replies; default: none kept.")
    size = "Of --record, on the disk; the oldest requests are deleted."
    flags.DEFINE_float("record_gib", 4.0, size, lower_bound=2**-20)
    options_lib.define_flags(flags)
    flags.mark_flag_as_required("workdir")
    command_line.check()

from websockets.asyncio import server as websockets_server

from lightwam_jax.inference import access as access_lib
from lightwam_jax.inference import page as page_lib
from lightwam_jax.inference import recorder, rerun_log
from lightwam_jax.inference import service as service_lib
from lightwam_jax.inference import session as session_lib

_STUCK_AFTER_S = 30.0  # beyond request_timeout_s: /healthz fails
_DEAD_AFTER_S = 120.0  # of one call: /livez fails
_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0


class Server:
    """Listens, and serves what `Service` answers.

    Attributes:
      service: `Service`. port: it listens at, after `listen`.
      pages: {path: function () -> (content type, text or bytes)}, for GET with the key.
      streams: {path: coroutine function (connection)}, WebSockets beside the policy's, for pages
        of this server.
    """

    def __init__(self, service, key="", tls=None):
        """Args:

        service: `Service`, not started. key: that clients must have; "": none.
        tls: `ssl.SSLContext` or None.
        """
        self.service, self._access, self._tls = service, access_lib.Access(key), tls
        self._ready, self._draining = asyncio.Event(), False
        self._connections, self._clients = set(), 0
        self.pages = {"/metrics": self._metrics, "/metadata": self._metadata}
        self.streams = {}
        service.on_warning = _log_warning

    @property
    def is_ready(self):
        """Whether requests are answered."""
        return self._ready.is_set() and not self._draining

    @property
    def sessions(self):
        """Numbers of the sessions that are open."""
        return sorted(connection.number for connection in self._connections)

    async def listen(self, host, port):
        """Begins to listen; clients wait for metadata until `ready`."""
        options = self.service.options
        self._access.listens_at(host)
        logging.getLogger("websockets").setLevel(logging.WARNING)  # else a line per connection
        self._server = await websockets_server.serve(
            self._handle,
            host,
            port,
            process_request=self._process,
            compression=None,
            max_size=options.max_frame,
            max_queue=2,
            open_timeout=_OPEN_TIMEOUT_S,
            close_timeout=_CLOSE_TIMEOUT_S,
            ping_interval=20,
            ping_timeout=None,  # a simulator that holds the interpreter's lock does not answer
            ssl=self._tls,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def ready(self):
        """Lets the clients in."""
        self._ready.set()

    async def drain(self):
        """Refuses what is new, answers what was accepted, closes; within drain_s."""
        self._draining = True
        try:
            async with asyncio.timeout(self.service.options.drain_s):
                while any(connection.pending for connection in self._connections):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            left = sum(connection.pending for connection in self._connections)
            session_lib.log("drain", unanswered=left)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S + 1):
                open_now = [
                    each.close(1001, "the server stops") for each in self._server.connections
                ]
                await asyncio.gather(*open_now)
                self._server.close()
                await self._server.wait_closed()
        self.service.close()

    async def _handle(self, connection):
        path = _path(connection.request)
        if path in self.streams:
            return await self.streams[path](connection)
        self._clients += 1
        try:
            gone = asyncio.ensure_future(connection.wait_closed())
            ready = asyncio.ensure_future(self._ready.wait())
            await asyncio.wait((gone, ready), return_when=asyncio.FIRST_COMPLETED)
            for waiting in (gone, ready):
                waiting.cancel()
            if self._ready.is_set():
                served = session_lib.Connection(connection, self.service, lambda: self._draining)
                self._connections.add(served)
                try:
                    await served.run()
                finally:
                    self._connections.discard(served)
        finally:
            self._clients -= 1

    # ---- HTTP ----------------------------------------------------------------------------------

    async def _process(self, connection, request):
        """Answers plain HTTP requests; returns None where a WebSocket may open."""
        path, headers = _path(request), request.headers
        if path in ("/healthz", "/livez"):
            return connection.respond(*(self.health() if path == "/healthz" else self._life()))
        if refusal := self._access.misdirected(headers.get_all("Host")):
            return connection.respond(*refusal)
        address = str((connection.remote_address or ("?",))[0])
        refusal = None
        if path not in self.streams or not self._access.has_ticket(headers.get_all("Cookie")):
            refusal = await self._access.refusal(address, headers.get_all("Authorization"))
        if refusal:
            response = connection.respond(*refusal)
            response.headers["WWW-Authenticate"] = 'Basic realm="policy server", charset="UTF-8"'
            return response
        upgrades = any("websocket" in value.lower() for value in headers.get_all("Upgrade"))
        if not upgrades:
            return self._page(connection, path)
        return self._refuse(connection, path, headers)

    def _refuse(self, connection, path, headers):
        """None, or why no WebSocket opens."""
        origins = headers.get_all("Origin")
        if path in self.streams:
            own = {f"{scheme}://{host}" for scheme in ("http", "https")
                   for host in headers.get_all("Host")}  # fmt: skip
            if not set(origins) <= own:
                return connection.respond(403, "pages of this server only\n")
            return None
        if path != "/":
            return connection.respond(404, "policies answer at /\n")
        if origins:
            return connection.respond(403, "no browsers here\n")
        if self._draining:
            return connection.respond(503, "draining\n")
        if self._clients >= self.service.options.max_clients:
            return connection.respond(503, f"{self._clients} clients already, the most allowed\n")
        return None

    def _page(self, connection, path):
        if path not in self.pages:
            return connection.respond(404, "not here; /healthz /livez /metrics /metadata are\n")
        if path == "/metadata" and not self._ready.is_set():
            return connection.respond(503, "warming up\n")
        kind, body = self.pages[path]()
        response = connection.respond(200, body if isinstance(body, str) else "")
        if isinstance(body, bytes):
            response.body = body
            del response.headers["Content-Length"]
            response.headers["Content-Length"] = str(len(body))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = kind
        response.headers["Cache-Control"] = "no-store"
        if path == "/" and (ticket := self._access.ticket):
            # Not every browser sends the key of a page with the WebSocket that the page opens.
            secure = "; Secure" if self._tls else ""
            cookie = f"{ticket}; HttpOnly; SameSite=Strict{secure}"
            response.headers["Set-Cookie"] = cookie
        return response

    def _metrics(self):
        sessions, ready = len(self._connections), self._ready.is_set()
        text = self.service.metrics_text(sessions, ready and not self._draining)
        return "text/plain; version=0.0.4; charset=utf-8", text

    def _metadata(self):
        return "application/json", json.dumps(self.service.described, indent=1) + "\n"

    def health(self):
        """Returns (HTTP status, text) of /healthz."""
        if self._draining:
            return 503, "draining\n"
        if not self._ready.is_set():
            return 503, "warming up\n"
        longest = self.service.options.request_timeout_s + _STUCK_AFTER_S
        if self.service.batcher.busy_s > longest:
            return 503, "stuck\n"
        return 200, "OK\n"

    def _life(self):
        busy = self.service.batcher.busy_s if self._ready.is_set() else 0
        return (503, "stuck\n") if busy > _DEAD_AFTER_S else (200, "OK\n")


def _path(request):
    """The path that is asked for, without its query; "" for one that is none, such as //[x."""
    try:
        return urllib.parse.urlsplit(request.path).path
    except ValueError:
        return ""


def _log_warning(session, text):
    session_lib.log("warning", session=session.number, warning=text)


# ---- the process -------------------------------------------------------------------------------


def serve(load, options, host="127.0.0.1", port=8000, key="", tls=None, prepare=None):
    """Serves until SIGTERM or SIGINT; a second one ends the process at once.

    Args:
      load: function () -> policy; called after the port is open, in another thread.
      options: `Options`. host, port: to listen at; port 0: any that is free.
      key, tls: see `Server`. prepare: function of the `Server`, before it is ready: for pages,
        streams and listeners.

    Returns:
      The exit status: 0 after a drain, 1 where the policy could not be loaded.
    """
    return asyncio.run(_serve(load, options, host, port, key, tls, prepare))


async def _serve(load, options, host, port, key, tls, prepare):
    service = service_lib.Service(options)
    server = Server(service, key, tls)
    await server.listen(host, port)
    stop, signals = asyncio.Event(), 0

    def on_signal():
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(1)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if prepare is not None:
        prepare(server)
    scheme = "wss" if tls else "ws"
    where = f"{scheme}://{host}:{server.port}"
    print(f"warming up at {where}", flush=True)
    stopping = asyncio.ensure_future(stop.wait())
    loading = _in_thread(lambda: service.start(load()))
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and loading.exception() is not None:
        print(f"cannot serve: {loading.exception()}", file=sys.stderr, flush=True)
        await server.drain()
        return 1
    if loading.done():
        server.ready()
        described = service.described
        name = options.name or described.get("config", "")
        print(f"keys: {described['keys']['name']} {described['keys']['images']}", flush=True)
        print(f"serving {name} step {service.policy.step} at {where}", flush=True)
        await stop.wait()
    await server.drain()
    return 0


def _in_thread(function):
    """A future of what a function returns, run in a thread that does not keep the process."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result, error):
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def run():
        try:
            result, error = function(), None
        except BaseException as raised:
            result, error = None, raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


def main(argv):
    """Serves the policy of a run until it is stopped."""
    try:
        _from_flags(argv)
    except (OSError, ValueError, OverflowError) as error:
        print(f"error: cannot serve: {error}", file=sys.stderr)
        sys.exit(1)


def _from_flags(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given = flags.FLAGS
    key, tls = _key(given.api_key_file), access_lib.tls(given.certfile, given.keyfile)
    if not access_lib.is_loopback(given.host) and not key and not given.insecure:
        raise app.UsageError(
            f"--host={given.host} lets others move the robot: give --api_key_file (or the "
            f"environment variable {access_lib.KEY_VARIABLE}), or --insecure"
        )
    try:
        options_lib.from_flags(given)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    from lightwam_jax.checkpoint import run, storage
    from lightwam_jax.inference.policy import Policy

    directory = given.workdir
    if given.step is not None:
        directory = os.path.join(directory, "checkpoints", str(given.step))
    checksum = storage.read_meta(run.find_checkpoint(directory))["checksum"]
    options = options_lib.from_flags(given, weights_hash=f"{checksum:08x}")

    def load():
        where = {"text_weights": given.text_weights, "embodiment": given.embodiment}
        return Policy.load(given.workdir, given.step, deploy=True, dtype=given.dtype, **where)

    closing = contextlib.ExitStack()

    def prepare(server):
        page_lib.prepare(server)
        shown = rerun_log.prepare(server)
        if shown is not None:
            closing.callback(shown.close)
        if given.record:
            kept = recorder.Recorder(given.record, int(given.record_gib * 2**30))
            kept.metadata = lambda: server.service.metadata
            server.service.listeners.append(kept)
            closing.callback(kept.close)

    with closing:
        status = serve(load, options, given.host, given.port, key, tls, prepare)
    if any(thread.name == "load" for thread in threading.enumerate()):
        os._exit(status)  # the interpreter's end would abort it in the middle of a compilation
    sys.exit(status)


def _key(path):
    """The key in a file, or in the environment; never of the command line, which others can see."""
    if path:
        with open(path, encoding="utf-8") as file:
            key = file.read().strip()
        if not key:
            raise app.UsageError(f"--api_key_file={path} is empty")
        return key
    return access_lib.key_of_environment()


if __name__ == "__main__":
    command_line.run(main, again="run the same command to serve again")
