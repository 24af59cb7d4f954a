"""Closed-loop clients of a policy server, in a process of their own, for benchmarks/serving.py.

    python -m benchmarks.serving_clients

Each line on stdin is a job, each line on stdout its result, both JSON. A client asks, waits for the
reply, and asks at once again. Images are noise.
"""

import collections
import concurrent.futures
import json
import sys
import threading
import time

import numpy as np

from lightwam_jax.inference import client as client_lib
from lightwam_jax.inference import wire

_FEWEST = 4  # pictures that a client takes turns with; equal ones would be a frozen camera


def run(job, connected):
    """Does a job.

    Args:
      job: {"url": "ws://...", "clients": n, "requests": of each client, "seconds": after which it
        asks no more, "rate": requests per second, or absent: at once, "sizes": [{camera: [height,
        width]}] and "prompts": [str], both taken in turn, "state": width}.
      connected: {(url, number): `Client`} of the jobs before; grows.

    Returns:
      {"clients": [{"seconds": [of each reply], "codes": {code: requests}}], "wall_s": seconds}. At
      a rate, a request that is due before the reply to the one before is made when that comes.
    """
    for number in range(job["clients"]):
        key = job["url"], number
        connected[key] = connected.get(key) or client_lib.Client(job["url"])
    ready = threading.Barrier(job["clients"])

    def loop(number):
        made = _observations(job, number)
        ready.wait()
        began = time.monotonic()
        taken, codes = _ask(connected[job["url"], number], made, number, job)
        return taken, codes, began, time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(job["clients"]) as pool:
        found = list(pool.map(loop, range(job["clients"])))
    wall = max(ended for *_, ended in found) - min(began for *_, began, _ in found)
    each = [{"seconds": taken, "codes": dict(codes)} for taken, codes, *_ in found]
    return {"clients": each, "wall_s": wall}


def _observations(job, number):
    rng = np.random.default_rng(number)
    sizes = job["sizes"] * (-(-_FEWEST // len(job["sizes"])))
    made = []
    for size in sizes:
        images = {c: rng.integers(0, 256, (*shape, 3), np.uint8) for c, shape in size.items()}
        made.append({"images": images, "state": rng.uniform(-1, 1, job["state"])})
    return made


def _ask(client, made, number, job):
    """Returns ([seconds of each reply], counter of codes)."""
    taken, codes, prompts = [], collections.Counter(), job["prompts"]
    due, pause = time.monotonic(), 1 / job["rate"] if job.get("rate") else 0
    end = due + job["seconds"]
    for turn in range(number, number + job["requests"]):
        observation = made[turn % len(made)] | {"prompt": prompts[turn % len(prompts)]}
        if pause:
            due = max(due + pause, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        began = time.perf_counter()
        try:
            client.infer(observation)
            codes["ok"] += 1
            taken.append(time.perf_counter() - began)
        except wire.WireError as error:
            codes[error.code] += 1
        if time.monotonic() > end:
            break
    return taken, codes


def main():
    """The process: jobs until stdin ends."""
    connected = {}
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), connected)), flush=True)
    for client in connected.values():
        client.close()


if __name__ == "__main__":
    main()
