"""A policy server in a thread, with a policy that plans at once; nothing is compiled.

Run as a program it serves until it is stopped, for tests that send signals:
python -m tests.served PORT [SECONDS PER PLAN] [SECONDS TO LOAD; below 0: then it fails]
"""

import asyncio
import contextlib
import dataclasses
import sys
import threading
import time
import types
import urllib.error
import urllib.request
import zlib

import numpy as np
from websockets.sync import client as websockets_client

from lightwam_jax import config as config_lib
from lightwam_jax.inference import server as server_lib
from lightwam_jax.inference import service as service_lib
from lightwam_jax.inference import wire
from lightwam_jax.inference.serving_options import Options

CAMERAS, STATE, HORIZON, ACTION = ("scene", "wrist"), 5, 8, 4
PROMPTS = ("put the red cube in the tray", "put the green cube in the tray")
STATISTICS = {
    name: {"default": {"global_min": [-1.0] * width, "global_max": [1.0] * width}}
    for name, width in (("state", STATE), ("action", ACTION))
}


def config(cameras=CAMERAS, state=STATE, action=ACTION, **data):
    """A `Config` of the sizes above."""
    base = config_lib.Config(
        model=config_lib.model_variant("tiny", action_dim=action, proprio_dim=state)
    )
    given = {"cameras": cameras, "canvas": (16, 16 * len(cameras)), "action_horizon": HORIZON}
    data = dataclasses.replace(base.data, **given | data)
    return dataclasses.replace(base, data=data, name="stand-in")


class StandIn:
    """Plans from every value of an observation; a row depends on itself alone.

    Attributes:
      calls: [(prompts, rows)] of `act`. encoded: new prompts. sizes: of `warm_up_images`.
      hook: called with the prompts before each plan; may wait or raise.
    """

    def __init__(self, config_=None, seconds=0.0, statistics=None, known=PROMPTS):
        self.config, self.step, self.traces = config_ or config(), 7, 0
        self.assets = types.SimpleNamespace(statistics=statistics or {})
        self.known_prompts, self.seconds = tuple(known), seconds
        self.calls, self.encoded, self.sizes, self.hook = [], [], [], None

    def warm_up(self, batch_sizes, prompt, taps):
        self.warmed = tuple(batch_sizes), prompt, taps

    def warm_up_images(self, sizes, batch_sizes):
        self.sizes.append(sizes)

    def known_prompt(self, task):
        return task in self.known_prompts or task in self.encoded

    def add_prompt(self, task):
        if task.startswith("unknown"):
            raise FileNotFoundError("the encoder is not here")
        self.encoded.append(task)

    def canvas(self, images):
        return np.concatenate([images[camera] for camera in self.config.data.cameras], axis=-2)

    def act(self, images, state, prompts, return_taps=False, rows=None):
        if state.any():  # not measured at the start
            self.calls.append((list(prompts), rows))
        if self.hook is not None:
            self.hook(prompts)
        time.sleep(self.seconds)
        actions = np.stack(
            [
                plan({camera: image[row] for camera, image in images.items()}, state[row], prompt)
                for row, prompt in enumerate(prompts)
            ]
        )
        if not return_taps:
            return actions
        return actions, {"attention_1_adapted": np.zeros((len(state), 4, 8), np.float32)}


def plan(images, state, prompt):
    """f32 [HORIZON, ACTION] within -1 and 1: what `StandIn` plans for one observation."""
    seed = zlib.crc32(prompt.encode())
    for name, image in sorted(images.items()):
        seed = zlib.crc32(np.ascontiguousarray(image).tobytes(), zlib.crc32(name.encode(), seed))
    seed = zlib.crc32(np.float32(state).tobytes(), seed)
    return np.random.default_rng(seed).uniform(-1, 1, (HORIZON, ACTION)).astype(np.float32)


def observe(seed=0, size=(16, 16), prompt=PROMPTS[0], **more):
    """A request in the keys of the table "lightwam"."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera in CAMERAS}
    return {"images": images, "state": rng.uniform(-1, 1, STATE), "prompt": prompt, **more}


def wanted(request):
    """What the reply to a request of `observe` must hold, to the bit."""
    return plan(request["images"], np.float32(request["state"]), request["prompt"])


class Served:
    """Attributes: url, http (addresses); server, service; policy."""

    @contextlib.contextmanager
    def connect(self, **arguments):
        """A raw connection, its metadata read."""
        given = {"compression": None, "max_size": None, "close_timeout": 1, **arguments}
        with websockets_client.connect(self.url, **given) as socket:
            self.metadata = wire.decode(socket.recv(timeout=10), wire.Limits(items=2**16))
            yield socket

    def ask(self, socket, request):
        """Sends a request, a frame or a dict; returns the reply decoded, or an error's text."""
        socket.send(request if isinstance(request, (bytes, str)) else wire.encode(request))
        reply = socket.recv(timeout=20)
        return reply if isinstance(reply, str) else wire.decode(reply)

    def get(self, path, headers=()):
        """(status, text) of GET."""
        request = urllib.request.Request(self.http + path, headers=dict(headers))
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def call(self, function):
        """Runs a function in the server's loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(10)


@contextlib.contextmanager
def serving(policy=None, key="", ready=True, tls=None, **options):
    """A running `Served`; drained at the end."""
    out, started, stop = Served(), threading.Event(), asyncio.Event()
    out.policy = policy or StandIn()

    async def run():
        out.loop = asyncio.get_running_loop()
        out.service = service_lib.Service(Options(**options))
        out.server = server_lib.Server(out.service, key, tls)
        await out.server.listen("127.0.0.1", 0)
        out.http = f"http://127.0.0.1:{out.server.port}"
        out.url = out.http.replace("http", "ws")
        out.service.start(out.policy)
        if ready:
            out.server.ready()
        started.set()
        await stop.wait()
        await out.server.drain()

    failed = []

    def thread():
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    running = threading.Thread(target=thread, daemon=True)
    running.start()
    started.wait(30)
    if failed:
        raise failed[0]
    try:
        yield out
    finally:
        out.loop.call_soon_threadsafe(stop.set)
        running.join(30)
    assert not failed, failed


if __name__ == "__main__":
    port, seconds, load_s = (float(text) for text in [*sys.argv[1:], "0", "0", "0"][:3])

    policy = StandIn(seconds=seconds)

    def load():
        time.sleep(abs(load_s))
        if load_s < 0:
            raise FileNotFoundError("no checkpoint there")
        return policy

    status = server_lib.serve(load, Options(drain_s=5.0), port=int(port))
    print(f"planned {sum(len(prompts) for prompts, _ in policy.calls)}", flush=True)
    sys.exit(status)
