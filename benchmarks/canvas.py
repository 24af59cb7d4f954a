"""From raw camera images to the canvas: Pillow on the host against products on the device.

    python -m benchmarks.canvas [--batches 1 64] [--size 480 640] [--rounds 10] [--out FILE.json]

LIBERO's two cameras (224x224 each on a canvas of 224x448), raw images of 480x640. Milliseconds per
call, median and fastest of the rounds:

  pillow_ms     `cameras.canvas` on the host, and the float32 canvas handed to the device
  host_ms       what the host does instead: check the images and hand them over as uint8. The call
                returns before they are there
  transfer_ms   the same, until they are there
  device_ms     `device_canvas.canvas` of images that are there. Without an accelerator the device
                is this machine's CPU
  error         the largest difference between the two canvases, whose values are in 0..1

All take turns, so that what else the machine does falls on each; `load` is the number of processes
that wanted a core in the minute before.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

from benchmarks import results
from configs import libero
from lightwam_jax import config as config_lib
from lightwam_jax import interrupts
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import device_canvas
from lightwam_jax.encoders import base as encoders_base


def measure(data, batch, size, rounds):
    """Returns the numbers above for one batch size."""
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (batch, *size, 3), np.uint8) for camera in data.cameras}

    def pillow():
        return jax.device_put(encoders_base.to_float(cameras_lib.canvas(images, data)))

    def host():
        cameras_lib.check(images, data)
        return jax.device_put(images)

    products = jax.jit(lambda images: device_canvas.canvas(images, data))
    there = jax.block_until_ready(host())
    error = float(np.abs(np.asarray(products(there)) - np.asarray(pillow())).max())
    ways = {
        "pillow_ms": lambda: jax.block_until_ready(pillow()),
        "host_ms": host,
        "transfer_ms": lambda: jax.block_until_ready(host()),
        "device_ms": lambda: jax.block_until_ready(products(there)),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            made = None  # freed before the clock starts
            start = time.perf_counter()
            made = way()
            times[name].append(1000 * (time.perf_counter() - start))
            jax.block_until_ready(made)
    numbers = {
        name: {"median": round(statistics.median(each), 3), "fastest": round(min(each), 3)}
        for name, each in times.items()
    }
    return {"batch": batch, **numbers, "error": error}


def main():
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    data = config_lib.from_config_dict(libero.get_config()).data
    load = round(os.getloadavg()[0], 1)
    found = [measure(data, batch, args.size, args.rounds) for batch in args.batches]
    shapes = {"image_size": args.size, "cameras": len(data.cameras), "canvas": data.canvas}
    results.write(
        args.out, "canvas", {**shapes, "rounds": args.rounds, "load": load, "calls": found}
    )


if __name__ == "__main__":
    interrupts.guard(main)
