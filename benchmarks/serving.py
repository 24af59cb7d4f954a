"""What the policy server costs beside the policy, alone and under load.

    python -m benchmarks.serving --workdir runs/demo --requests 100000

Server and policy are in this process, the clients in another, on the same machine. Without a
workdir: a policy of the demo's size with random parameters. The parts, each a key of the result:

  one_client    a call of `Policy.act` and a round trip of one client, in turns
  clients       closed-loop clients, as many as max_batch, in turns with `Policy.act` of as many
                rows, and with a server that plans one observation at a time: that has 4 clients,
                which keep it busy; more would not fit into its queue and be refused
  compilations  what is compiled after the server is ready: images of several sizes, 20
                instructions, 1 to max_batch clients
  memory        resident memory of the server's process over many requests
  steady        only with --steady_minutes: one client at 30 Hz; replies that came after the next
                request was due, and resident memory

"targets" compares them with what the server is meant to keep to. Only numbers of one run are meant
to be compared, and only on a machine that does nothing else.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time

import jax
import numpy as np

from benchmarks import results, rollout
from configs import demo
from lightwam_jax import config as config_lib
from lightwam_jax import interrupts
from lightwam_jax.inference import latency
from lightwam_jax.inference import server as server_lib
from lightwam_jax.inference import service as service_lib
from lightwam_jax.inference.policy import Policy
from lightwam_jax.inference.serving_metrics import rss_bytes
from lightwam_jax.inference.serving_options import Options

MIXED_SIZES = (64, 96, 128, 224, 256, 480, 720, 1080)  # height; the width is 4/3 of it
_PROMPTS = 20
_FOREVER = 1e9
_LAG_EVERY_S = 0.005
_FIT_ONE = 4  # clients that a server of max_batch 1 refuses nothing
_STEADY_HZ = 30
_STEADY_PARTS = 10  # after each of which the memory is looked at
_SETTLED = 1000  # requests before the memory counts


class Running:
    """A policy server in a thread of this process.

    Attributes:
      service: `Service`. url: where it listens.
    """

    def __init__(self, policy, **options):
        self.service, self._loop = service_lib.Service(Options(**options)), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = server_lib.Server(self.service)
        self._do(self._server.listen("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._server.port}"
        self.service.start(policy)
        self._loop.call_soon_threadsafe(self._server.ready)

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self):
        """Drains, and ends the thread."""
        self._do(self._server.drain())
        self._loop.call_soon_threadsafe(self._loop.stop)

    @contextlib.contextmanager
    def lags(self):
        """Gives a list that gets, all the time, by how many seconds the event loop is late."""
        late = []

        async def sample():
            while True:
                began = time.monotonic()
                await asyncio.sleep(_LAG_EVERY_S)
                late.append(time.monotonic() - began - _LAG_EVERY_S)

        sampling = asyncio.run_coroutine_threadsafe(sample(), self._loop)
        try:
            yield late
        finally:
            sampling.cancel()


class Clients:
    """The process of `serving_clients.py`."""

    def __init__(self, policy, sizes):
        """Args: sizes: {camera: (height, width)} of the images that are sent by default."""
        command = [sys.executable, "-m", "benchmarks.serving_clients"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8")
        self._job = {
            "sizes": [sizes],
            "prompts": [next(iter(policy.known_prompts), latency.PROMPT)],
            "state": config_lib.state_width(policy.config),
        }

    def run(self, running, clients, requests=_FOREVER, seconds=_FOREVER, **others):
        """Returns `serving_clients.run` of a job."""
        job = self._job | {"url": running.url, "clients": clients, "requests": int(requests)}
        self._process.stdin.write(json.dumps(job | {"seconds": seconds} | others) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process ended; its own error output is above")
        return json.loads(line)

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def default_sizes(config):
    """Returns {camera: (height, width)}: of the images that a server is ready for."""
    return dict(zip(config.data.cameras, service_lib.latency_sizes(config)))


def observed(config, rows, sizes, prompt):
    """Returns (images, state, prompts) as `Policy.act` takes them: noise."""
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (rows, *size, 3), np.uint8) for c, size in sizes.items()}
    state = rng.uniform(-1, 1, (rows, config_lib.state_width(config))).astype(np.float32)
    return images, state, [prompt] * rows


# ---- the parts -----------------------------------------------------------------------------------


def one_client(policy, running, clients, batch, blocks=20, calls=25):
    """Returns the times of a call of the policy and of a round trip: `blocks` of each, in turns.

    Args:
      batch: `observed` of one row. calls: in each block.
    """
    first = clients.run(running, 1, 1)["clients"][0]["seconds"][0]
    act, trip = [], []
    for _ in range(blocks):
        act += latency.measure(policy, batch, calls)
        trip += clients.run(running, 1, calls)["clients"][0]["seconds"]
    act, trip = np.array(act), np.array(trip)
    middle, whole = np.median(act), np.median(trip)
    return {
        "act": latency.percentiles(act),
        "round_trip": latency.percentiles(trip),
        "overhead_ms": 1000 * float(whole - middle),
        "ratio": float(whole / middle),
        "first_request_of_median": float(first / whole),
        "calls": len(act),
    }


def many_clients(policy, batched, single, clients, batch, blocks=5, seconds=2.0):
    """Returns latency and throughput of as many clients as `batch` has rows.

    Args:
      batched, single: `Running`, of max_batch as many as that and of 1.
      batch: `observed`. seconds: of each block on each server.
    """
    count, act, trip = len(batch[2]), [], []
    runs = {"batched": (batched, count), "single": (single, min(count, _FIT_ONE))}
    served, walls = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
    with batched.lags() as late:
        for _ in range(blocks):
            act += latency.measure(policy, batch, calls=40, seconds=seconds / 2)
            for name, (running, asking) in runs.items():
                found = clients.run(running, asking, seconds=seconds)
                walls[name] += found["wall_s"]
                served[name] += np.array([_answered(each) for each in found["clients"]])
                if name == "batched":
                    trip += [taken for each in found["clients"] for taken in each["seconds"]]
        lag = 1000 * float(np.percentile(late, 99))
    rates = {name: float(served[name].sum() / walls[name]) for name in served}
    found = latency.percentiles(trip)
    return {
        "clients": count,
        "clients_max_batch_1": runs["single"][1],
        "act_of_as_many": latency.percentiles(act),
        "round_trip": found,
        "p95_of_act_p50": found["p95_ms"] / (1000 * statistics.median(act)),
        "requests_per_s": rates["batched"],
        "requests_per_s_max_batch_1": rates["single"],
        "throughput_ratio": rates["batched"] / rates["single"],
        "most_of_least_served": float(served["batched"].max() / served["batched"].min()),
        "loop_lag_p99_ms": lag,
    }


def compilations(policy, running, clients, most_clients, requests=1000, heights=MIXED_SIZES):
    """Returns what was compiled while requests of all kinds came."""
    prompts = list(policy.known_prompts)[:_PROMPTS]
    prompts += [f"do thing number {i}" for i in range(_PROMPTS - len(prompts))]
    cameras = policy.config.data.cameras
    sizes = [dict.fromkeys(cameras, (height, height * 4 // 3)) for height in heights]
    traces, compiled, codes = policy.traces, [], {}

    def heard(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        for count in range(1, most_clients + 1):
            each = max(1, requests // most_clients // count)
            found = clients.run(running, count, each, sizes=sizes, prompts=prompts)
            for client in found["clients"]:
                for code, number in client["codes"].items():
                    codes[code] = codes.get(code, 0) + number
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    metrics = running.service.metrics
    return {
        "requests": codes,
        "of_the_policy": policy.traces - traces,
        "of_image_sizes": int(metrics.value("compilations_total", what="image_size")),
        "programs_in_all": len(compiled),
        "prompts_encoded": int(metrics.value("prompts_encoded_total")),
    }


def memory(running, clients, count, requests):
    """Returns the resident memory after the first requests and up to the last."""
    begin = min(_SETTLED, requests // 10)
    marks = [begin, *(begin + (requests - begin) * part // 4 for part in (1, 2, 3, 4))]
    rows, done = [], 0
    for mark in marks:
        while done < mark:  # small jobs: the clients' results are kept until a job ends
            each = max(1, min(mark - done, 4000) // count)
            done += sum(map(_answered, clients.run(running, count, each)["clients"]))
        rows.append({"requests": done, "rss_mib": round(rss_bytes() / 2**20, 2)})
    return {"rows": rows, "last_of_first": rows[-1]["rss_mib"] / rows[0]["rss_mib"]}


def steady(running, clients, minutes, rate=_STEADY_HZ):
    """Returns latency, late replies and memory of one client that asks `rate` times a second."""
    taken, rss = [], []
    for _ in range(_STEADY_PARTS):
        part = clients.run(running, 1, seconds=60 * minutes / _STEADY_PARTS, rate=rate)
        _answered(part["clients"][0])
        taken += part["clients"][0]["seconds"]
        rss.append(round(rss_bytes() / 2**20, 2))
    late = [seconds for seconds in taken if seconds > 1 / rate]
    return {
        "minutes": minutes,
        "hz": rate,
        "requests": len(taken),
        "round_trip": latency.percentiles(np.array(taken)),
        "longest_ms": 1000 * max(taken),
        "late": len(late),
        "rss_mib": rss,
        "last_of_first": rss[-1] / rss[0],
    }


def _answered(client):
    if set(client["codes"]) != {"ok"}:
        raise RuntimeError(f"requests were refused: {client['codes']}")
    return client["codes"]["ok"]


def targets(found):
    """Returns {name: {"measured", "at_most" or "at_least", "met"}} of the parts of a result."""
    one, many = found["one_client"], found["clients"]
    fast = one["act"]["p50_ms"] < 10
    rows = [
        ("overhead_ratio", one["ratio"], "at_most", 2.0 if fast else 1.1),
        ("first_request_of_median", one["first_request_of_median"], "at_most", 3.0),
        ("p95_of_act_p50", many["p95_of_act_p50"], "at_most", 4.5),
        ("throughput_ratio", many["throughput_ratio"], "at_least", 1.4),
        ("most_of_least_served", many["most_of_least_served"], "at_most", 1.2),
        ("loop_lag_p99_ms", many["loop_lag_p99_ms"], "at_most", 20.0),
        ("compilations", found["compilations"]["of_the_policy"], "at_most", 0),
        ("memory", found["memory"]["last_of_first"], "at_most", 1.02),
    ]
    if "steady" in found:
        rows.append(("steady_late", found["steady"]["late"], "at_most", 0))
        rows.append(("steady_memory", found["steady"]["last_of_first"], "at_most", 1.02))
    if fast:
        rows.insert(0, ("overhead_ms", one["overhead_ms"], "at_most", 1.0))
    return {
        name: {
            "measured": value,
            side: limit,
            "met": bool(value <= limit if side == "at_most" else value >= limit),
        }
        for name, value, side, limit in rows
    }


def measure(
    policy, requests, max_batch=8, mixed=1000, seconds=2.0, blocks=5, calls=100, minutes=0, **more
):
    """Returns all parts, and "targets", of a deployed policy.

    Args:
      requests: for the memory. mixed: requests while compilations are counted.
      minutes: of one steady client; 0: none.
      seconds, blocks: of many clients. calls: of one client, in each block.
      more: heights of `compilations`.
    """
    sizes = default_sizes(policy.config)
    with contextlib.ExitStack() as open_:
        batched = Running(policy, max_batch=max_batch)
        open_.callback(batched.close)
        single = Running(policy, max_batch=1)
        open_.callback(single.close)
        clients = Clients(policy, sizes)
        open_.callback(clients.close)
        prompt = next(iter(policy.known_prompts), latency.PROMPT)
        one, many = (observed(policy.config, rows, sizes, prompt) for rows in (1, max_batch))
        found = {
            "image_sizes": sizes,
            "one_client": one_client(policy, batched, clients, one, blocks, calls),
            "clients": many_clients(policy, batched, single, clients, many, blocks, seconds),
            "compilations": compilations(policy, batched, clients, max_batch, mixed, **more),
            "memory": memory(batched, clients, max_batch, requests),
        }
        if minutes:
            found["steady"] = steady(batched, clients, minutes)
    return found | {"targets": targets(found)}


def main():
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="run directory of train.py; default: random parameters")
    parser.add_argument("--requests", type=int, default=20_000, help="while memory is watched")
    parser.add_argument("--mixed", type=int, default=1000, help="requests of all kinds")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block of load")
    parser.add_argument("--blocks", type=int, default=5, help="of each kind, in turns")
    minutes = "of one client at 30 Hz, after the rest; the target is for 10"
    parser.add_argument("--steady_minutes", type=float, default=0.0, help=minutes)
    parser.add_argument("--out", help="JSON file to write")
    given = parser.parse_args()
    if given.requests < 100:
        parser.error(f"--requests {given.requests}: expected at least 100")
    if given.workdir:
        policy = Policy.load(given.workdir, deploy=True)
    else:
        policy = rollout.make_policy(config_lib.from_config_dict(demo.get_config())).deployed()
    numbers = {"config": policy.config.name, "weights": given.workdir or "random"}
    times = dict(seconds=given.seconds, blocks=given.blocks, minutes=given.steady_minutes)
    numbers |= measure(policy, given.requests, mixed=given.mixed, **times)
    results.write(given.out, "serving", numbers)


if __name__ == "__main__":
    interrupts.guard(main)
