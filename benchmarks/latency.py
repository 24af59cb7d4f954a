"""Times a policy: from camera images on the host to actions on the host, and the parts of that.

  python -m benchmarks.latency --workdir runs/x                        # a trained policy, deployed
  python -m benchmarks.latency --config configs/libero.py:spatial      # random weights, full size
  python -m benchmarks.latency --config configs/libero.py:spatial --tiny

One table, the same on every machine. "cold" is the first call of a batch size: compilation, and the
instruction's text. "p50" and "p95" are later calls of `Policy.act`. "host" is what Python does with
the images, "transfer" their way to the device; "canvas" (their layout), "vae", "context" (what the
robot's state adds to the instruction's) and "blocks" (with the head, and the context once more) run
on the device as programs of their own: each of them is waited for, so that together they take
longer than the whole.
"""

import statistics
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import action_pass, random_policy, results
from lightwam_jax import command_line
from lightwam_jax.inference import latency
from lightwam_jax.inference.policy import Policy

SIZES = ("224x224", "480x640")  # of every camera
BATCHES = (1, 8, 64)
PARTS = ("host", "transfer", "canvas", "vae", "context", "blocks")


def measure(policy, batches, sizes, calls=20, seconds=20.0):
    """Returns a row per batch and camera size.

    {"batch", "size": "224x224", "cold_s", "p50_ms", "p95_ms", "calls", "parts_ms": {part: median}}

    Args:
      policy: a deployed `Policy`. sizes: [(height, width)] of every camera.
      calls, seconds: of every row; fewer calls where the seconds are over.
    """
    rows = []
    for batch in batches:
        for size in sizes:
            observed = latency.observation(policy.config, batch, size)
            first = latency.measure(policy, observed, calls=1)
            later = latency.measure(policy, observed, calls, seconds)
            parts = {
                name: 1000 * _median(part, calls, seconds / len(PARTS))
                for name, part in random_policy.parts(policy, observed).items()
            }
            cold = {"cold_s": first[0] if size == sizes[0] else None}  # later ones are warm
            row = {"batch": batch, "size": "x".join(map(str, size)), **cold}
            row |= {**latency.percentiles(later), "calls": len(later), "parts_ms": parts}
            rows.append(row)
    return rows


def table(rows):
    """Returns the lines of what `measure` found."""
    head = ("batch", "cameras", "cold s", "p50 ms", "p95 ms", *PARTS)
    lines = [head]
    for row in rows:
        cold = "" if row["cold_s"] is None else f"{row['cold_s']:.1f}"
        times = (row["p50_ms"], row["p95_ms"], *(row["parts_ms"][part] for part in PARTS))
        lines.append((str(row["batch"]), row["size"], cold, *(f"{x:.2f}" for x in times)))
    return "\n".join("".join(f"{cell:>10}" for cell in line) for line in lines)


def _median(part, calls, seconds):
    """Seconds that a part takes, once it is compiled."""
    jax.block_until_ready(part())
    taken, begin = [], time.perf_counter()
    while len(taken) < calls and (not taken or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        jax.block_until_ready(part())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f = flags.FLAGS
    jax.config.update("jax_enable_compilation_cache", False)  # a cold start is measured too
    try:
        if f.workdir:
            policy = Policy.load(f.workdir, deploy=True)
        elif f.config:
            changes = {"model.dtype": f.dtype} if f.dtype else {}
            config = action_pass.config_of(f.config, tiny=f.tiny, **changes)
            policy = random_policy.make(config)
        else:
            raise ValueError("give --workdir, or --config for random weights")
        sizes = [tuple(int(side) for side in size.split("x")) for size in f.sizes]
        rows = measure(policy, [int(n) for n in f.batches], sizes, f.calls, f.seconds)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    numbers = {
        "config": policy.config.name,
        "weights": f.workdir or "random",
        "model": {name: getattr(policy.config.model, name) for name in ("variant", "dtype")},
        "rows": rows,
        "memory_gib": results.memory_gib(),
    }
    results.write(f.out, "latency", numbers)
    print(table(rows))


if __name__ == "__main__":  # flags are global: importing this module must not define any
    config_flags.DEFINE_config_file("config", None, "As in train.py: random weights of its model.")
    flags.DEFINE_string("workdir", None, "Run directory of train.py, or a checkpoint.")
    flags.DEFINE_bool("tiny", False, "The smallest model in the place of the config's.")
    flags.DEFINE_string("dtype", None, "config.model.dtype of random weights.")
    flags.DEFINE_list("batches", [str(n) for n in BATCHES], "Observations per call.")
    flags.DEFINE_list("sizes", list(SIZES), "Height x width of every camera.")
    flags.DEFINE_integer("calls", 20, "Timed calls per row, at most.", lower_bound=1)
    flags.DEFINE_float("seconds", 20.0, "Seconds per row, about: fewer calls of a slow policy.")
    flags.DEFINE_string("out", None, "JSON file to write; the numbers are printed in any case.")
    command_line.run(main, again="run the same command again")
