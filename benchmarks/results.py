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
    """Prints {"benchmark": name, **numbers, ...} and writes it to `path`, if one is given."""
    device = jax.devices()[0]
    result = {
        "benchmark": name,
        **numbers,
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "host_cores": os.cpu_count(),
            "machine": platform.machine(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
