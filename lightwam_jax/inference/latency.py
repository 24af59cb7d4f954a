"""How long a policy takes to plan: calls of `Policy.act`, from camera images to actions."""

import time

import jax
import numpy as np

from lightwam_jax import config as config_lib

PROMPT = "warm up"  # as in `Policy.warm_up`: its text is encoded already


def line(policy, rows, seconds=5.0):
    """Returns "latency p50 12.3 ms, p95 13.1 ms at batch 8 on DEVICE", measured here and now.

    Args:
      policy: `Policy`. seconds: to spend on it, about, after a first call that is not counted.
    """
    observed = observation(policy.config, rows)
    measure(policy, observed, calls=1)  # may compile
    found = percentiles(measure(policy, observed, seconds=seconds))
    device = jax.devices()[0].device_kind
    return (
        f"latency p50 {found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f} ms at batch {rows} "
        f"on {device}"
    )


def observation(config, rows, size=None, seed=0):
    """Returns (images, state, prompts) as `Policy.act` takes them: noise.

    Args:
      size: (height, width) of every camera; default: what the canvas is made of.
    """
    data, rng = config.data, np.random.default_rng(seed)
    height, width = size or data.camera_size or data.canvas
    shape = (rows, height, width, 3)
    images = {camera: rng.integers(0, 256, shape, np.uint8) for camera in data.cameras}
    state = rng.normal(size=(rows, config_lib.state_width(config))).astype(np.float32)
    return images, state, [PROMPT] * rows


def measure(policy, observed, calls=20, seconds=float("inf")):
    """Returns the seconds of each call: `calls` of them, fewer once `seconds` are over."""
    taken, begin = [], time.perf_counter()
    while len(taken) < calls and (not taken or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        policy.act(*observed)
        taken.append(time.perf_counter() - start)
    return taken


def percentiles(seconds):
    """Returns {"p50_ms", "p95_ms"} of durations in seconds."""
    low, high = np.percentile(seconds, (50, 95))
    return {"p50_ms": 1000 * float(low), "p95_ms": 1000 * float(high)}
