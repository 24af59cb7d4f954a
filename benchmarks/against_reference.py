"""Times this implementation against the PyTorch reference on one CPU, A B A B in one run.

  python -m benchmarks.against_reference --ref DIR --out benchmarks/results/against_reference.json
  python -m benchmarks.against_reference --ref DIR --layers 4 --dtypes float32 --calls 2   # a trial

DIR is a checkout of the reference. Both have random weights of the same sizes (LIBERO's). What is
timed: inference, from the canvas to the actions, VAE included, the text's features given, at batch
1 and 8; and one training step at batch 1 on cached latents. Compilation and a first call are not
timed. Ours keeps what depends on the instruction alone between calls; the reference has no such
cache. Each turn is a process of its own that runs alone, so that one implementation at a time is
in memory. In bfloat16 the reference cannot train on a CPU: that is recorded as it says it.

On an otherwise idle machine of two cores and 24 GiB the full run is expected to take a little over
an hour (an estimate: 22 turns of one to six minutes, half of it batch 8). --cases and --dtypes take
parts of it.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from lightwam_jax import command_line

OURS, REFERENCE = SIDES = ("ours", "reference")
CASES = ("inference_1", "inference_8", "training_1")  # what, and at which batch


def run(cases, dtypes, rounds, turn):
    """Returns [{"case", "dtype", "ours", "reference": {"median_s", "seconds"}, "ratio"}].

    Args:
      rounds: of A B. turn: function of (side, case, dtype) to {"seconds": [...]} or {"failed"}.
    """
    rows = []
    for dtype in dtypes:
        for case in cases:
            turns = {side: [] for side in SIDES}
            for side in SIDES * rounds:
                turns[side].append(turn(side, case, dtype))
                if side == REFERENCE and any("failed" in turns[s][-1] for s in SIDES):
                    break  # what one of them cannot do is not compared
            row = {"case": case, "dtype": dtype}
            row |= {side: _joined(done) for side, done in turns.items()}
            if all("median_s" in row[side] for side in SIDES):
                row["ratio"] = row[OURS]["median_s"] / row[REFERENCE]["median_s"]
            print(line(row), flush=True)
            rows.append(row)
    return rows


def line(row):
    """Returns a row as one line of text."""
    shown = [f"{row['case']:<12} {row['dtype']:<9}"]
    for side in SIDES:
        seconds = row[side].get("median_s")
        shown.append(f"{side} {seconds:.3f} s" if seconds else f"{side} {row[side]['failed']}")
    return "  ".join([*shown, f"ratio {row['ratio']:.3f}" if "ratio" in row else "no ratio"])


def _joined(turns):
    failed = [turn for turn in turns if "failed" in turn]
    if failed:
        return failed[0]
    seconds = [turn["seconds"] for turn in turns]
    median = statistics.median(second for turn in seconds for second in turn)
    peak = max(turn["peak_gib"] for turn in turns)
    return {"median_s": median, "seconds": seconds, "peak_gib": peak}


# ---- one turn, in a process of its own -----------------------------------------------------------


def prepared(side, case, config, dtype, checkout):
    """Returns the function without arguments that is timed."""
    what, _, rows = case.partition("_")
    if side == REFERENCE:
        from benchmarks import reference

        model = reference.build(checkout, config, dtype, "cpu")
        make = reference.policy if what == "inference" else reference.training
        return make(model, config, int(rows))
    return our_policy(config, int(rows)) if what == "inference" else our_training(config)


def our_policy(config, rows):
    """Canvas on the host to actions on the host."""
    import jax
    import numpy as np

    from benchmarks import action_pass

    do, weights = action_pass.of_config(config), action_pass.random(action_pass.shapes(config))
    canvas, text, state = (
        np.random.default_rng(0).random(x.shape, np.float32).astype(x.dtype)
        for x in action_pass.inputs(config, rows)
    )
    kept, act = jax.jit(do.remember)(weights, text), jax.jit(do.act)
    return lambda: np.asarray(act(weights, canvas, kept, state))


def our_training(config):
    """One optimizer step of `config.train.batch_size` samples; its loss."""
    from benchmarks import action_pass

    step, state, batch = action_pass.training(config)

    def once():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return once


def config_of(case, dtype, layers):
    """Returns the `Config` of a case; with fewer layers than the release, a small canvas too."""
    from benchmarks import action_pass
    from configs import libero

    changes = {"model.dtype": dtype, "model.frozen_dtype": dtype}
    if case.startswith("training"):
        changes["train.batch_size"] = int(case.partition("_")[2])
    if layers:
        changes |= {
            "model.num_layers": layers,
            "model.lora_layers": tuple(range(layers)),
            "model.adapter_layers": (0, 1, layers - 1),
            "data.canvas": (32, 64),
            "data.camera_size": (),
        }
    return action_pass.config_of(libero.get_config("spatial"), **changes)


def take_turn(side, case, dtype, layers, calls, checkout):
    """Returns {"seconds": of each call, "peak_gib": of the process}, or {"failed": why}."""
    from benchmarks import results

    try:
        call = prepared(side, case, config_of(case, dtype, layers), dtype, checkout)
        call()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, NotImplementedError) as error:  # what an implementation cannot do
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"seconds": seconds, "peak_gib": results.memory_gib()["process"]}


def apart(side, case, dtype):
    """`take_turn` in a process of its own, with the flags of this one."""
    f = flags.FLAGS
    turn = json.dumps([side, case, dtype, f.layers, f.calls, str(pathlib.Path(f.ref).resolve())])
    command = [sys.executable, "-m", "benchmarks.against_reference", f"--turn={turn}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f.cache,  # the second turn compiles nothing
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:  # killed for its memory, say
        return {"failed": f"the process ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f = flags.FLAGS
    if f.turn:
        print(json.dumps(take_turn(*json.loads(f.turn))))
        return
    if not f.ref or not pathlib.Path(f.ref, "src", "lightwam").is_dir():
        print(f"error: --ref={f.ref!r} holds no src/lightwam: give a checkout", file=sys.stderr)
        sys.exit(2)
    unknown = set(f.cases) - set(CASES)
    if unknown:
        raise app.UsageError(f"--cases has {sorted(unknown)}; expected some of {CASES}")
    from benchmarks import results

    with tempfile.TemporaryDirectory() as cache:
        f.cache = f.cache or cache
        rows = run(f.cases, f.dtypes, f.rounds, apart)
    import importlib.metadata

    versions = results.versions() | {"torch": importlib.metadata.version("torch")}
    numbers = {"layers": f.layers or 30, "calls": f.calls, "rounds": f.rounds, "rows": rows}
    results.write(f.out, "against_reference", {**numbers, "versions": versions})


if __name__ == "__main__":  # flags are global: importing this module must not define any
    flags.DEFINE_string("ref", None, "Checkout of the PyTorch reference.")
    flags.DEFINE_list("cases", list(CASES), "What to time.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and arithmetic.")
    flags.DEFINE_integer("rounds", 2, "Turns of each: 2 is A B A B.", lower_bound=1)
    flags.DEFINE_integer("calls", 3, "Timed calls per turn.", lower_bound=1)
    flags.DEFINE_integer("layers", 0, "Blocks, at least 3, on a small canvas: a trial. 0: all.")
    flags.DEFINE_string("cache", "", "Compilation cache; default: a new one.")
    flags.DEFINE_string("out", None, "JSON file to write; the numbers are printed in any case.")
    flags.DEFINE_string("turn", None, "One turn, in this process (used by the command itself).")
    command_line.run(main, again="run the same command again")
