"""A policy that runs elsewhere, behind a policy server, as rollouts ask for it.

Each row of a batch is a request of its own, over as many connections as the server plans together;
the server makes batches of them again. With --exact, and as many rows as this process would use, a
plan has the bits that it would have here.
"""

import concurrent.futures
import contextlib
import time
import urllib.parse

import numpy as np

from lightwam_jax.inference import client as client_lib
from lightwam_jax.inference import latency

_KINDS = "clamped", "limited", "snapped"  # what a guard counts


class RemotePolicy:
    """Asks a server for plans.

    Attributes:
      metadata: of the server. guarded: {kind: values that its guard changed so far}.
      seconds: of each round of plans.
    """

    def __init__(self, url, checksum, batch, key="", timeout_s=300.0):
        """Connects.

        Args:
          url: ws://HOST:PORT. checksum: of the checkpoint that it must serve, as its metadata have
            it. batch: rows that are asked for at once. key: of the server.

        Raises:
          ValueError: it serves another checkpoint, or does not say which.
          ConnectionError, PermissionError: see `Client`.
        """
        self._url, self.guarded, self.seconds = url, dict.fromkeys(_KINDS, 0), []
        self._clients, self._pool = [], None
        open_ = lambda: client_lib.Client(url, key, timeout_s, connect_s=timeout_s)
        with contextlib.ExitStack() as undone:
            undone.callback(self.close)
            self._clients.append(open_())
            self.metadata = self._clients[0].metadata
            serves = self.metadata.get("weights_hash", "")
            if serves != checksum:
                raise ValueError(
                    f"the server at {_place(url)} serves the checkpoint "
                    f"{serves or '(it does not say)'}, --workdir holds {checksum}: start it with "
                    "that one, and with --metadata=full"
                )
            together = self.metadata.get("batching", {}).get("max", 1)
            for _ in range(min(batch, together) - 1):
                self._clients.append(open_())
            self._pool = concurrent.futures.ThreadPoolExecutor(len(self._clients), "remote")
            undone.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Hangs up, and ends the threads; those that still wait for a reply when they have it."""
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def act(self, images, state, prompts):
        """Returns f32 [B,T,A]; see `Policy.act`. Rows that repeat the first are asked for once.

        Raises:
          WireError: the server refuses. ConnectionError, TimeoutError: it is gone.
        """
        began = time.monotonic()
        rows = [
            {"images": {c: image[i] for c, image in images.items()}, "state": state[i], "prompt": p}
            for i, p in enumerate(prompts)
        ]
        asked = [i for i, row in enumerate(rows) if not i or not _same(row, rows[0])]
        shares = [asked[n :: len(self._clients)] for n in range(len(self._clients))]
        ask = lambda client, share: [client.infer(rows[i]) for i in share]
        plans = {}
        promised = self.metadata.get("weights_hash"), self.decisive()
        for share, replies in zip(shares, self._pool.map(ask, self._clients, shares)):
            for i, reply in zip(share, replies):
                plans[i] = reply["actions"]
                for kind in _KINDS:
                    self.guarded[kind] += reply.get("guard", {}).get(kind, 0)
        for client in self._clients:  # each may have connected anew, to a server started otherwise
            if (client.metadata.get("weights_hash"), _decisive(client.metadata)) != promised:
                raise ValueError(
                    f"the server at {_place(self._url)} was restarted with another checkpoint or "
                    "other options: its plans would be mixed with those of the first"
                )
        self.seconds.append(time.monotonic() - began)
        return np.stack([plans.get(i, plans[0]) for i in range(len(rows))])

    def decisive(self):
        """Returns what of the server decides the plans, beside the weights: plain values."""
        return _decisive(self.metadata)

    def describe(self):
        """Returns what the manifest says: where the policy ran, and how; plain values, no key."""
        return {"url": _place(self._url), **self.decisive()}

    def line(self):
        """Returns the time of a round of plans, in words."""
        found = latency.percentiles(self.seconds or [0.0])
        guarded = sum(self.guarded.values())
        changed = f"; its guard changed {guarded} values" if guarded else ""
        return (
            f"round trip  p50 {found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f} ms for a batch "
            f"over {len(self._clients)} connections to {_place(self._url)}{changed}"
        )


def _decisive(metadata):
    names = "batching", "dtype", "guard", "gripper", "gripper_closed_within", "limits"
    names += ("server_version",)
    return {name: metadata[name] for name in names if name in metadata}


def _same(row, first):
    return (
        row["prompt"] == first["prompt"]
        and np.array_equal(row["state"], first["state"])
        and all(np.array_equal(image, first["images"][c]) for c, image in row["images"].items())
    )


def _place(url):
    """The address without what a person may have put before the host."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
