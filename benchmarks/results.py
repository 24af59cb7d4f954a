"""The JSON file of a benchmark: its numbers, and what they were measured on."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def write(path, name, numbers):
    """Prints {"benchmark": name, **numbers, ...} and writes it to `path`, if one is given.

    "device" and "versions" are those of this process, unless `numbers` bring their own.
    """
    result = {
        "benchmark": name,
        **numbers,
        "device": numbers.get("device") or device(),
        "versions": numbers.get("versions") or versions(),
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def device():
    """Returns {"kind", ...} of this process's devices and host."""
    first = jax.devices()[0]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "host_cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def versions():
    """Returns the versions of Python and of `PACKAGES`."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}
