"""Seconds and peak memory of converting the two large published models.

    python -m benchmarks.convert [--kinds dit,t5] [--directory DIR] [--out FILE.json]

The files are synthetic, of the published sizes, names and formats (the transformer in float32
safetensors, 5.7 GB; umT5 as a bfloat16 .pth, 11.4 GB), written tensor by tensor with random values.
Conversion runs as a user runs it, in a process of its own, whose peak resident memory (mapped
files included) the kernel tells. Needs Linux, PyTorch, 40 GB of disk and, to make the .pth, 16 GB
of memory.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tqdm

from benchmarks import results
from converters import layouts
from lightwam_jax import interrupts
from lightwam_jax.models import t5, variants

LIMITS_GB = {"dit": 2.0, "t5": 4.0}


def shapes(kind):
    """{key: shape} of the published file."""
    if kind == "t5":
        fields = {
            name: field.default
            for name, field in t5.UMT5Encoder.__dataclass_fields__.items()
            if isinstance(field.default, int)
        }
        del fields["max_distance"]
        config = {"text_encoder": fields}
    else:
        table = variants.VARIANTS["wan21_1_3b"]
        config = {
            "model": dict(
                {name: table[name] for name in layouts.BACKBONE_SIZES},
                lora_rank=0,
                lora_targets=(),
                lora_layers=(),
                adapter_layers=(),
                adapter_dim=0,
            )
        }
    return layouts.expected_shapes(layouts.find(kind, "", "official"), config)


def write_safetensors(path, shapes, dtype, name):
    """Writes random values as a safetensors file, a tensor at a time."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for number, shape in enumerate(tqdm.tqdm(shapes.values(), desc=path.name)):
            _write_values(file, number, shape, dtype)


def write_pth(path, shapes, dtype):
    """The same as a PyTorch file, by way of a mapped file: torch.save wants tensors."""
    import torch

    raw = path.with_suffix(".raw")
    with open(raw, "wb") as file:
        for number, shape in enumerate(tqdm.tqdm(shapes.values(), desc=path.name)):
            _write_values(file, number, shape, dtype)
    total = sum(map(math.prod, shapes.values()))
    flat = torch.from_file(str(raw), shared=True, size=total, dtype=torch.bfloat16)
    tensors, start = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape)
        tensors[key] = flat[start : start + size].view(shape)
        start += size
    torch.save({key: value.clone() for key, value in tensors.items()}, path)
    raw.unlink()


def _write_values(file, number, shape, dtype):
    """Normal values of deviation 0.02, in pieces."""
    rng, left = np.random.default_rng(number), math.prod(shape)
    while left:
        some = min(left, 1 << 24)
        (0.02 * rng.standard_normal(some, np.float32)).astype(dtype).tofile(file)
        left -= some


def convert(kind, source, out):
    """Runs the command line; returns (seconds, peak resident memory in GB)."""
    command = [sys.executable, "-m", "converters", kind, "--in", str(source), "--out", str(out)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = _peak(process.pid) or peak
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return time.perf_counter() - start, peak / 1e9


def _peak(pid):
    """The kernel's high-water mark of a process's resident memory, bytes; 0 once it is gone.

    Not `ru_maxrss`: that of a child begins with its parent's memory.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").split("\n")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="dit,t5")
    parser.add_argument("--directory", help="where the files go for a while; default: temporary")
    parser.add_argument("--out", help="result file, such as benchmarks/results/convert.json")
    args = parser.parse_args()
    found = {}
    for kind in args.kinds.split(","):
        folder = Path(tempfile.mkdtemp(dir=results.made(args.directory)))
        try:
            sizes = shapes(kind)
            if kind == "dit":
                source = folder / "diffusion_pytorch_model.safetensors"
                write_safetensors(source, sizes, np.float32, "F32")
            else:
                source = folder / "models_t5_umt5-xxl-enc-bf16.pth"
                write_pth(source, sizes, ml_dtypes.bfloat16)
            seconds, peak = convert(kind, source, folder / "out")
            found[kind] = {
                "file": source.name,
                "file_gb": round(source.stat().st_size / 1e9, 2),
                "values": sum(map(math.prod, sizes.values())),
                "seconds": round(seconds, 1),
                "peak_rss_gb": round(peak, 2),
                "limit_gb": LIMITS_GB[kind],
            }
            print(kind, json.dumps(found[kind]), flush=True)
        finally:
            shutil.rmtree(folder)
    results.write(args.out, "convert", found)


if __name__ == "__main__":
    interrupts.guard(main)
