"""Counters of the policy server, in Prometheus' text format."""

import bisect
import collections
import os
import resource
import sys
import threading
import time

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_RECENT = 1000  # requests that `percentiles` looks at
# name -> (type, help)
KINDS = {
    "requests_total": ("counter", "Requests answered, by code; ok: with actions."),
    "request_seconds": ("histogram", "From a whole frame to its reply."),
    "queue_seconds": ("histogram", "In the queue."),
    "infer_seconds": ("histogram", "On the device, until the actions were on the host."),
    "decode_seconds": ("histogram", "From a frame to a checked observation."),
    "batch_size": ("histogram", "Observations that were planned together."),
    "sessions": ("gauge", "Open connections."),
    "queue_depth": ("gauge", "Requests that wait."),
    "compilations_total": (
        "counter",
        "Since ready: of the action pass, which must stay 0; and of what lays images out, one for "
        "each new image size, compiled beside the requests.",
    ),
    "prompts_encoded_total": ("counter", "New instructions."),
    "guard_total": ("counter", "Values changed on their way to the robot, by kind and dimension."),
    "stale_total": ("counter", "Requests that were too old."),
    "extra_keys_total": ("counter", "Keys of requests that were ignored."),
    "warnings_total": ("counter", "Warnings about what clients send."),
    "bytes_total": ("counter", "Bytes of frames, in and out."),
    "last_reply_age_seconds": ("gauge", "Since the last reply with actions; -1: none yet."),
    "ready": ("gauge", "1 while requests are answered."),
    "rss_bytes": ("gauge", "Resident memory of the process."),
    "info": ("gauge", "What is served."),
}


class Metrics:
    """Counts; any thread may."""

    def __init__(self):
        self._lock = threading.Lock()
        self._values = collections.defaultdict(float)  # (name, labels) -> value
        self._buckets = {}  # name -> [counts, sum]
        self._recent = collections.deque(maxlen=_RECENT)
        self._last_reply = None

    def count(self, name, amount=1, **labels):
        """Adds to a counter."""
        with self._lock:
            self._values[name, tuple(labels.items())] += amount

    def put(self, name, value, **labels):
        """Sets a gauge, or a counter that is kept elsewhere."""
        with self._lock:
            self._values[name, tuple(labels.items())] = value

    def observe(self, name, value):
        """Adds a value to a histogram."""
        edges = _SIZES if name == "batch_size" else _SECONDS
        with self._lock:
            counts, total = self._buckets.get(name, ([0] * (len(edges) + 1), 0.0))
            counts[bisect.bisect_left(edges, value)] += 1
            self._buckets[name] = counts, total + value
            if name == "request_seconds":
                self._recent.append(value)

    def replied(self):
        """Notes that actions were sent just now."""
        self._last_reply = time.monotonic()

    def value(self, name, **labels):
        """Returns a counter or gauge; 0 if it was never used."""
        return self._values.get((name, tuple(labels.items())), 0)

    def percentiles(self):
        """Returns {"p50_ms", "p95_ms"} of the last requests; {} before the first."""
        with self._lock:
            recent = sorted(self._recent)
        if not recent:
            return {}
        at = lambda share: 1000 * recent[min(int(share * len(recent)), len(recent) - 1)]
        return {"p50_ms": at(0.5), "p95_ms": at(0.95)}

    def text(self):
        """Returns everything in Prometheus' text format."""
        age = -1 if self._last_reply is None else time.monotonic() - self._last_reply
        self.put("last_reply_age_seconds", age)
        self.put("rss_bytes", rss_bytes())
        with self._lock:
            values, buckets = dict(self._values), dict(self._buckets)
        lines = []
        for name, (kind, meaning) in KINDS.items():
            full = f"lightwam_{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
            if kind == "histogram":
                lines += _histogram(full, name, *buckets.get(name, ([], 0.0)))
            for (other, labels), value in sorted(values.items()):
                if other == name:
                    lines.append(f"{full}{_labels(labels)} {value:g}")
        return "\n".join(lines) + "\n"


def _histogram(full, name, counts, total):
    edges, so_far = (_SIZES if name == "batch_size" else _SECONDS), 0
    for edge, count in zip((*edges, "+Inf"), counts or [0] * (len(edges) + 1)):
        so_far += count
        yield f'{full}_bucket{{le="{edge}"}} {so_far}'
    yield f"{full}_sum {total:g}"
    yield f"{full}_count {so_far}"


def _labels(labels):
    escape = lambda text: str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    inner = ",".join(f'{name}="{escape(value)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def rss_bytes():
    """Returns the resident memory of this process; where /proc is not, its largest so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
