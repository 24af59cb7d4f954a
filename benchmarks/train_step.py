"""Times the jitted training step of a config, from the first trace to the last step.

  python -m benchmarks.train_step --config configs/libero.py:spatial --config.data.source=fake \
      --steps 30 --out benchmarks/results/train_step.json

The step is the one `train.py` runs, on one batch that stays on the devices: loading is measured by
the run itself (ms_data in metrics.jsonl). FLOPs are those of the model, whatever way it is
executed: recomputation (config.model.remat) costs time and counts as nothing.
"""

import itertools
import statistics
import sys
import tempfile
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import results
from lightwam_jax import command_line, sharding
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
from lightwam_jax.training import flops, loop, memory

WARM_UP = 3  # steps before the clock runs


def measure(config, steps):
    """Returns the numbers of a `Config` over `steps` timed steps, as plain values."""
    jax.config.update("jax_enable_compilation_cache", False)  # a cold start is what is timed
    with tempfile.TemporaryDirectory() as workdir:
        run = loop.prepare(config, workdir)
        run.checkpoints.close()
    batch = sharding.put_batch(_first_batch(config), run.mesh)
    state, run.state = run.state, None  # the step consumes it
    work = flops.of_step(config)
    state, *_ = _run(run.train_step, state, batch, WARM_UP)
    state, metrics, seconds = _run(run.train_step, state, batch, steps)
    if not bool(metrics["finite"]):
        raise FloatingPointError(
            f"the loss is {float(metrics['loss'])} after {int(state.step)} "
            "steps: what was timed was not training"
        )
    mean = sum(seconds) / steps
    samples = config.train.batch_size
    return {
        "config": config.name,
        "data": config.data.source,
        "batch_size": samples,
        "accum_steps": config.optimizer.accum_steps,
        "mesh": dict(run.mesh.shape),
        "model": {
            name: getattr(config.model, name)
            for name in ("variant", "dtype", "frozen_dtype", "attention", "remat", "scan_unroll")
        },
        "compile_s": run.compile_s,
        "steps": steps,
        "ms_step": 1000 * mean,
        "ms_step_median": 1000 * statistics.median(seconds),
        "samples_per_s": samples / mean,
        "tflop_per_sample": work / samples / 1e12,
        "tflop_per_s_per_device": work / mean / run.mesh.size / 1e12,
        "memory_gib_per_device": memory.compiled(run.train_step),
        "loss": float(metrics["loss"]),
    }


def _first_batch(config):
    batches = loader.train_loader(config, jax.process_index(), jax.process_count())
    batch = next(batches)
    batches.close()
    return {name: x for name, x in batch.items() if name != "index"}


def _run(train_step, state, batch, steps):
    """Runs steps as the loop does, a few in flight; returns (state, metrics, seconds of each)."""
    pending, ends = [], [time.perf_counter()]
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        pending.append(metrics)
        if len(pending) > loop.IN_FLIGHT:
            jax.block_until_ready(pending.pop(0))
            ends.append(time.perf_counter())
    for metrics in pending:
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
    return state, metrics, [end - begin for begin, end in itertools.pairwise(ends)]


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        config = config_lib.from_config_dict(flags.FLAGS.config)
        numbers = measure(config, flags.FLAGS.steps)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    results.write(flags.FLAGS.out, "train_step", numbers)


if __name__ == "__main__":  # flags are global: importing this module must not define any
    config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
    flags.DEFINE_integer("steps", 20, "Timed steps.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write; the numbers are printed in any case.")
    flags.mark_flag_as_required("config")
    command_line.run(main, again="run the same command again")
