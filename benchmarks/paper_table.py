"""Light-WAM beside the generative head that it replaces, at full size: one table.

  python -m benchmarks.paper_table --out benchmarks/results/paper_table.json
  python -m benchmarks.paper_table --out benchmarks/results/paper_table.json \
      --compile policy,train --rows flow_dit_5b       # needs requirements-aot.txt; no GPU
  python -m benchmarks.paper_table --docs docs/ablations.md      # from the committed result

Parameters, FLOPs and planned memory follow from shapes: nothing is allocated, a row takes about a
minute. `--compile` adds what a compiler for an H100 reports of the deployed policy at batch 1 and
of a training step of 16 samples, to rows that the file has; programs that are not compiled anew
stay in it as they were. Nothing here was timed. Published numbers are those of `PUBLISHED`, each
with its source.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import action_pass, aot, aot_devices, aot_tables, results
from benchmarks import paper_table_text as text
from configs import libero, wan22_5b
from lightwam_jax import command_line, sharding
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.training import flops, memory
from lightwam_jax.training import step as step_lib

GIB = 2**30
RESULT = aot_tables.RESULTS / "paper_table.json"
TOPOLOGY, BATCH = "h100:1", 16  # samples per GPU, as both papers train
STEPS = (1, 5, 10)  # of the solver
JOBS = {"policy": "policy_1", "train": "train"}
# Fast-WAM trains everything, on latents that are not pooled, without LoRA and adapters.
_PLAIN = {"model.adapter_layers": (), "model.action_head": "flow_dit"}
_WHOLE = _PLAIN | {
    "model.lora_rank": 0,
    "model.lora_layers": (),
    "model.lora_targets": (),
    "train.trainable": (".*",),
    "loss.downsample": 1,
    "loss.temporal_weighting": False,
}
# The same recipe as Light-WAM's: LoRA and video head learn, the rest of the backbone is frozen.
_FROZEN = _PLAIN | {
    "train.trainable": (r"/lora_[ab]$", r"^dit/head/", r"^expert/", r"^proprio_encoder/")
}
ROWS = {
    "light_wam": (libero, {}),
    "flow_dit_frozen": (libero, _FROZEN),
    "flow_dit": (libero, _WHOLE),
    "flow_dit_5b": (wan22_5b, _WHOLE),
}
SAME_POLICY = {"flow_dit_frozen": "flow_dit"}  # deployed, LoRA is part of the kernels


def config_dict(row):
    """Returns the ConfigDict of a row: LIBERO's recipe with the model of the row."""
    module, changes = ROWS[row]
    config = module.get_config("spatial")
    config.update_from_flattened_dict(changes)
    return config


def measure(config):
    """Returns the numbers of a `Config` that follow from shapes.

    {"parameters": {"total", "trained", "vae", group: ...}, "tflop": {"vae", "plan": {steps:
    number}, "training_sample"}, "acting_gib": weights of the deployed policy and its VAE,
    "plan_gib": of a training step, as `memory.plan`}. FLOPs of a plan leave out the VAE and the
    instruction's text, whose keys and values are kept.
    """
    # What is counted does not depend on the kernel; a GPU's cannot be traced without one.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    _, _, state = step_lib.state_shapes(config)
    places = sharding.tree_shardings(sharding.single_device_mesh(), state)
    weights = action_pass.shapes(config)
    return {
        "parameters": _parameters(config, state),
        "tflop": {
            "vae": _tflop_of_vae(config, weights),
            "plan": {str(n): _tflop_of_plan(config, n) for n in _solver_steps(config)},
            "training_sample": flops.of_step(config) / config.train.batch_size / 1e12,
        },
        "acting_gib": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)) / GIB,
        "plan_gib": {k: size / GIB for k, size in memory.plan(config, state, places).items()},
    }


def _solver_steps(config):
    return STEPS if config.model.generates else (1,)


def _parameters(config, state):
    clip = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.float32)
    codec = action_pass.vae(config)
    vae = params_lib.count(jax.eval_shape(codec.init, jax.random.key(0), clip)["params"])
    whole = params_lib.merge(state.trainable, state.frozen)
    groups = {name: total for name, total, _ in params_lib.count_table(whole, (".*",))}
    total = groups.pop("total") + vae
    return {"total": total, "trained": params_lib.count(state.trainable), "vae": vae} | groups


def _tflop_of_vae(config, weights):
    canvas, _, _ = action_pass.inputs(config, 1)
    return _tflop(action_pass.of_config(config).encode, weights, canvas)


def _tflop_of_plan(config, steps):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, flow_steps=steps))
    stages, weights = action_pass.of_config(config), action_pass.shapes(config)
    canvas, rows, state = action_pass.inputs(config, 1)
    latents = jax.eval_shape(stages.encode, weights, canvas)
    kept = jax.eval_shape(stages.remember, weights, rows)
    return _tflop(stages.read, weights, latents, kept, state)


def _tflop(function, *arguments):
    return flops.count(jax.jit(function).trace(*arguments).jaxpr) / 1e12


# ---- compiled ----------------------------------------------------------------------------------


def compiled(config, job):
    """Returns what the compiler says of a program of a `Config`, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder, "config.json"), pathlib.Path(folder, "numbers.json")
        given.write_text(config_lib.to_json(config), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.aot", f"--topology={TOPOLOGY}",
                   f"--job={job}", f"--job_config={given}", f"--out={made}"]  # fmt: skip
        done = subprocess.run(
            command,
            env=os.environ | aot_devices.environment(TOPOLOGY),
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(f"{job} did not compile for {TOPOLOGY}:\n{done.stderr[-6000:]}")
        return _kept(json.loads(made.read_text(encoding="utf-8")))


def of_aot(folder):
    """Returns {"light_wam": {job: numbers}} of the `benchmarks.aot`, which compiles the same."""
    path = folder / f"aot_{TOPOLOGY.replace(':', '_')}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    jobs = {job: _kept(found[name]) for job, name in JOBS.items() if name in found}
    return {"light_wam": jobs}


def _kept(numbers):
    kept = ("memory_gib_per_chip", "tflop_per_chip", "launches", "floor_ms", "estimate_ms")
    return {name: numbers[name] for name in kept} | {"topology": TOPOLOGY}


def _recipe(row):
    """The `Config` of a row as one H100 would train it."""
    return aot.configure(config_dict(row), TOPOLOGY, {"batch_per_chip": BATCH})


def fill(found, rows, jobs):
    """Returns {row: numbers} of `found` with `rows` measured anew, or `jobs` of them compiled.

    Args:
      found: {row: {..., "compiled": {job: numbers}}}, of earlier runs. jobs: some of `JOBS`.
    """
    for row in rows:
        print(f"{row} ...", file=sys.stderr, flush=True)
        config, before = _recipe(row), found.get(row, {})
        numbers = before if jobs and before else measure(config)
        programs = of_aot(RESULT.parent).get(row, {}) | before.get("compiled", {})
        programs |= {job: compiled(config, JOBS[job]) for job in jobs}
        found = found | {row: numbers | {"compiled": programs}}
    for row, other in SAME_POLICY.items():
        if row in found and "policy" in found.get(other, {}).get("compiled", {}):
            found[row]["compiled"]["policy"] = found[other]["compiled"]["policy"]
    return {row: found[row] for row in ROWS if row in found}


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f, found = flags.FLAGS, {}
    if unknown := [name for name in f.rows if name not in ROWS]:
        raise app.UsageError(f"--rows has {unknown}; expected some of {', '.join(ROWS)}")
    if unknown := [name for name in f.compile if name not in JOBS]:
        raise app.UsageError(f"--compile has {unknown}; expected some of {', '.join(JOBS)}")
    path = pathlib.Path(f.out or RESULT)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if not f.docs:
        found = fill(found, f.rows, f.compile)
        results.write(f.out, "paper_table", {"rows": found, "published": text.PUBLISHED})
    lines = text.table(found, text.measured(RESULT.parent))
    print(lines)
    if f.docs:
        results.insert(f.docs, "paper_table", f"\n{lines}\n")


if __name__ == "__main__":  # flags are global: importing this module must not define any
    flags.DEFINE_list("rows", list(ROWS), "What to measure; the others stay as they are in --out.")
    flags.DEFINE_list("compile", [], f"Programs to compile: {', '.join(JOBS)}.")
    flags.DEFINE_string("out", None, "JSON file; the numbers are printed in any case.")
    flags.DEFINE_string("docs", None, "Markdown file: the table of --out is written there.")
    command_line.run(main, again="run the same command again")
