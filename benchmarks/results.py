"""The JSON file of a benchmark: its numbers, and what they were measured on."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys

import jax

GIB = 2**30
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
        path.write_text(text + "\n", encoding="utf-8")


def made(directory):
    """Returns the directory of a flag --directory, which need not exist yet; None as it is."""
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
    return directory


def insert(path, name, text):
    """Writes `text` between the marks that benchmark `name` has in a Markdown file.

    Raises:
      ValueError: the file lacks them.
    """
    path = pathlib.Path(path)
    begin, end = (f"<!-- benchmarks.{name}: {place} -->\n" for place in ("begin", "end"))
    before, opens, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closes, after = rest.partition(end)
    if not opens or not closes:
        raise ValueError(f"{path} lacks the lines {begin}{end}between which the text goes")
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


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


def memory_gib():
    """Returns the most that was held so far: {"process": resident, "device": where it tells}."""
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB elsewhere
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB}
    seen = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in seen:
        found["device"] = seen["peak_bytes_in_use"] / GIB
    return found
