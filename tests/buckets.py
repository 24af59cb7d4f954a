"""Emulators of object storage on the loopback interface, each a process of its own.

requirements-test-bucket.txt installs them: moto for S3, gcp-storage-emulator for Google's.
"""

import contextlib
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from lightwam_jax import bucket

# scheme: (package to reach it, emulator, its command)
EMULATORS = {
    "s3": ("s3fs", "moto", ("-m", "moto.server", "-H", "127.0.0.1", "-p")),
    "gs": (
        "gcsfs",
        "gcp_storage_emulator",
        ("-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", "--in-memory", "--port"),
    ),
}
BUCKET = "bucket"
_UNUSED = itertools.count()


def missing(scheme):
    """Which package keeps this emulator from running, or None."""
    return next((p for p in EMULATORS[scheme][:2] if importlib.util.find_spec(p) is None), None)


@contextlib.contextmanager
def emulated(scheme):
    """Starts an emulator with an empty bucket; gives the environment variables to reach it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        variables = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "emulated",
            "AWS_SECRET_ACCESS_KEY": "emulated",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    else:
        variables = {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GS_TOKEN": "anon",
            # Otherwise gcsfs asks for the kind of the bucket in a protocol the emulator lacks.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    server = subprocess.Popen(
        [sys.executable, *EMULATORS[scheme][2], str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        _make_bucket(scheme, url, server)
        yield variables
    finally:
        server.kill()
        server.wait()


def _make_bucket(scheme, url, server):
    """Asks again until the emulator is there."""
    if scheme == "s3":
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
    else:
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            data=b'{"name": "%s"}' % BUCKET.encode(),
            headers={"Content-Type": "application/json"},
        )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(request, timeout=60).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def in_memory(monkeypatch):
    """Makes memory:// an address like the others; returns one that is empty."""
    pytest.importorskip("fsspec")
    monkeypatch.setitem(bucket.SCHEMES, "memory", "fsspec")
    return f"memory://{BUCKET}/{next(_UNUSED)}/run"
