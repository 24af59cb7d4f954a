"""Compiles the full-size training step and the policy for machines that are not there.

  python -m benchmarks.aot --topology v5e:4x4      # or another of a TPU's, or h100:8
  python -m benchmarks.aot --docs docs/pods.md     # writes the tables of all results there

Needs requirements-aot.txt, no accelerator and no data. Batch per chip, mesh, accumulation and
rematerialisation are those of `RECIPES` unless given; other keys of the config as in train.py
(--config.data.text_len=64). A TPU's compiler refuses a program that does not fit its memory; a
GPU's does not. Every program is compiled in a process of its own, whose complaints are counted.

No time here was measured. `floor_ms` is a roofline: every matrix product at the chip's peak, or at
the speed of its memory where that is slower, all else hidden; `step_ms` lies between full overlap
of communication and none. A real program takes longer, a small one several times as long. For GPUs
the launches of the compiled program are counted too, and `estimate_ms` adds up what each of them
takes at speeds that a GPU is assumed to sustain (`benchmarks/launches.py`), communication aside.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
from absl import app, flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from benchmarks import action_pass, aot_devices, aot_tables, collectives, launches, results
from lightwam_jax import command_line, sharding
from lightwam_jax import config as config_lib
from lightwam_jax.training import flops, memory
from lightwam_jax.training import step as step_lib
from lightwam_jax.training.chips import CHIPS

GIB = 2**30
POLICY_BATCHES = (1, 8)
SCALING = (8, 16, 32, 64, 128, 256)  # chips


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a chip is used: samples per chip and step, devices over the parameters, ..."""

    batch_per_chip: int
    fsdp: int
    accum: int
    remat: str


RECIPES = {
    "v5e": Recipe(64, 8, 4, "full"),
    "v6e": Recipe(64, 8, 4, "full"),
    "h100": Recipe(16, 8, 1, "linears"),
}


# ---- one program, in a process of its own -------------------------------------------------------


def compile_step(config, topology):
    """Compiles the training step; returns its numbers and the text of the program."""
    mesh = sharding.make_mesh(config.mesh, aot_devices.devices(topology))
    sharding.check_batch_size(config.train.batch_size, config.optimizer.accum_steps, mesh)
    model, optimizer, shapes = step_lib.state_shapes(config)
    places = sharding.tree_shardings(mesh, shapes, config.mesh.frozen)
    step = step_lib.make_train_step(model, config, optimizer, places)
    batch = _placed(step_lib.batch_shapes(config), sharding.batch_sharding(mesh))
    arguments = sharding.with_shardings(shapes, places), batch
    traced, text, numbers = _compile(step_lib.jit_train_step(step, places), *arguments)
    program = collectives.instructions(text)

    exchanged = collectives.written(traced.jaxpr, mesh.shape)
    plan = memory.plan(config, shapes, places)
    samples, work = config.train.batch_size, flops.of_step(config)
    limits = {
        "compute_s": _products_s(traced.jaxpr, topology),
        "communication_s": _exchange_s(exchanged, mesh.shape, topology),
    }
    return {
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": samples,
        "accum_steps": config.optimizer.accum_steps,
        "remat": config.model.remat,
        "model": config.model.variant,
        **numbers,
        "floor_ms": 1000 * max(limits.values()),
        **_launches(text, topology),
        "collectives": collectives.totals(exchanged, program),
        "largest_collectives": collectives.largest(exchanged, mesh.shape),
        "memory_plan_gib": {name: size / GIB for name, size in plan.items()},
        "model_tflop_per_sample": work / samples / 1e12,
        "plan": collectives.compare(exchanged, program),
        "roofline": limits | speeds(limits, samples, work, mesh.size, topology),
        "scaling": scaling(config, shapes, traced.jaxpr, limits, work, topology, mesh.size),
    }, text


def compile_policy(config, topology, rows):
    """As `compile_step`, of the deployed policy, canvas to actions, for one chip."""
    one = aot_devices.devices(topology)[:1]
    place = sharding.replicated(sharding.make_mesh(config_lib.MeshConfig(1, 1, "sharded"), one))
    policy, weights = action_pass.of_config(config), action_pass.shapes(config)
    canvas, text, state = action_pass.inputs(config, rows)
    kept = jax.eval_shape(policy.remember, weights, text)
    arguments = _placed((weights, canvas, kept, state), place)
    traced, text, numbers = _compile(jax.jit(policy.act), *arguments)
    floor = {"floor_ms": 1000 * _products_s(traced.jaxpr, topology)}
    return {"batch": rows, **numbers, **floor, **_launches(text, topology)}, text


def _placed(shapes, place):
    """The shapes with one sharding for all."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def _compile(function, *arguments):
    """Returns what was traced, the text of the program, and {"trace_s", "compile_s", ...}."""
    start = time.perf_counter()
    traced = function.trace(*arguments)
    lowered = traced.lower()
    between = time.perf_counter()
    compiled = lowered.compile()
    numbers = {
        "trace_s": between - start,
        "compile_s": time.perf_counter() - between,
        "memory_gib_per_chip": memory.compiled(compiled),
        "tflop_per_chip": flops.count(traced.jaxpr) / 1e12,
    }
    return traced, compiled.as_text(), numbers


def _launches(text, topology):
    """`launches.summary` of a GPU's program; a TPU launches one program, whatever is in it."""
    return launches.summary(text) if aot_devices.on_gpu(topology) else {}


# ---- predictions -------------------------------------------------------------------------------


def _chip(topology):
    return CHIPS[topology.partition(":")[0]]


def _products_s(jaxpr, topology):
    """Seconds that a chip needs at least for its matrix products."""
    chip = _chip(topology)
    return sum(
        times * max(work / chip.flops, size / chip.memory)
        for times, work, size in flops.products(jaxpr)
    )


def _exchange_s(exchanged, mesh, topology):
    """Seconds that a chip needs at least to send its part of the `Collective`s."""
    return sum(c.wire_bytes(mesh) for c in exchanged) / _chip(topology).links


def speeds(limits, samples, work, chips, topology):
    """Returns step time, samples/s and MFU, [best, worst]: communication hidden, or not at all."""
    peak = chips * _chip(topology).flops
    seconds = (max(limits.values()), sum(limits.values()))
    return {
        "step_ms": [1000 * s for s in seconds],
        "samples_per_s": [samples / s for s in seconds],
        "mfu": [work / s / peak for s in seconds],
    }


def scaling(config, shapes, jaxpr, limits, work, topology, chips):
    """Returns rows of the same batch per chip on other numbers of chips.

    What every chip computes is the same; what it exchanges follows from the mesh.

    Args:
      config, shapes, jaxpr: of the step that was compiled, on `chips` chips.
      limits: its {"compute_s", ...}. work: FLOPs of the model in it.
    """
    fsdp, rows = config.mesh.fsdp, []
    for count in SCALING:
        if count % fsdp or aot_devices.on_gpu(topology):  # beyond 8, a slower network joins nodes
            continue
        mesh = AbstractMesh((count // fsdp, fsdp), sharding.AXES)
        batch = config.train.batch_size // chips * count
        train = dataclasses.replace(config.train, batch_size=batch)
        there = dataclasses.replace(config, train=train)
        held = memory.held(there, shapes, sharding.tree_shardings(mesh, shapes, config.mesh.frozen))
        exchange_s = _exchange_s(collectives.written(jaxpr, mesh.shape), mesh.shape, topology)
        seconds = {"compute_s": limits["compute_s"], "communication_s": exchange_s}
        rows.append(
            {
                "chips": count,
                "mesh": dict(mesh.shape),
                "batch_size": batch,
                "memory_plan_gib": sum(held.values()) / GIB,
                **seconds,
                **speeds(seconds, batch, work / chips * count, count, topology),
            }
        )
    return rows


# ---- the command -------------------------------------------------------------------------------


def configure(config, topology, options):
    """Returns the `Config` of a topology: its recipe, with what `options` gives in its place."""
    chip, _, shape = topology.partition(":")
    if chip not in RECIPES:
        raise ValueError(f"--topology={topology!r}; the chips are {', '.join(RECIPES)}")
    recipe = dataclasses.replace(
        RECIPES[chip], **{name: value for name, value in options.items() if value is not None}
    )
    chips = math.prod(int(side) for side in shape.split("x"))
    config.train.batch_size = chips * recipe.batch_per_chip
    config.mesh.fsdp = min(recipe.fsdp, chips)
    config.optimizer.accum_steps = recipe.accum
    config.model.remat = recipe.remat
    config.data.source = "fake"
    if config.model.attention == "auto":  # what it would be there; here it is what a CPU has
        config.model.attention = "cudnn" if aot_devices.on_gpu(topology) else "xla"
    return config_lib.from_config_dict(config)


def compile_apart(config, topology, job):
    """Runs `--job` in a process of its own; returns its numbers and the compiler's complaints."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder, "config.json"), pathlib.Path(folder, "numbers.json")
        given.write_text(config_lib.to_json(config), encoding="utf-8")
        environment = os.environ | aot_devices.environment(topology)
        command = [sys.executable, "-m", "benchmarks.aot", f"--topology={topology}",
                   f"--job={job}", f"--job_config={given}", f"--out={made}",
                   f"--text={flags.FLAGS.text}"]  # fmt: skip
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            raise RuntimeError(f"{job} for {topology} did not compile:\n{done.stderr[-6000:]}")
        # with its own command: a file of results may collect programs of several
        return json.loads(made.read_text(encoding="utf-8")) | {
            "complaints": complaints(done.stderr),
            "command": " ".join(["python -m benchmarks.aot", *sys.argv[1:]]),
        }


def complaints(text):
    """Returns how often a compiler complained of what makes a program slow or large."""
    wanted = {
        "involuntary_full_rematerialization": "Involuntary full rematerialization",
        "rematerialized_more_than_expected": "Can't reduce memory use below",
    }
    return {name: text.count(words) for name, words in wanted.items()}


def main(argv):
    """The command line; see the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f = flags.FLAGS
    if f.job:
        config = config_lib.from_json(pathlib.Path(f.job_config).read_text(encoding="utf-8"))
        job, _, rows = f.job.partition("_")
        with aot_devices.cudnn_attention(f.topology):
            numbers, text = (
                compile_step(config, f.topology)
                if job == "train"
                else compile_policy(config, f.topology, int(rows))
            )
        pathlib.Path(f.out).write_text(json.dumps(numbers), encoding="utf-8")
        if f.text:
            place = pathlib.Path(f.text, f"{f.topology.replace(':', '_')}_{f.job}.txt")
            place.write_text(text, encoding="utf-8")
        return
    if f.topology:
        options = {name: f[name].value for name in Recipe.__dataclass_fields__}
        try:
            config = configure(f.config, f.topology, options)
            aot_devices.check_compiler(f.topology)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        jobs = ["train", *(f"policy_{rows}" for rows in POLICY_BATCHES)]
        wanted = [job for job in jobs if job.split("_")[0] in f.jobs]
        numbers = {job: compile_apart(config, f.topology, job) for job in wanted}
        out = pathlib.Path(f.out or aot_tables.RESULTS / f"aot_{f.topology.replace(':', '_')}.json")
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        kept = {job: before[job] for job in jobs if job in before}
        numbers = {"topology": f.topology, "config": config.name, **kept, **numbers}
        results.write(out, "aot", numbers)
    if f.docs:
        aot_tables.write(f.docs)


if __name__ == "__main__":  # flags are global: importing this module must not define any
    config_flags.DEFINE_config_file("config", "configs/libero.py:spatial", "As in train.py.")
    flags.DEFINE_string("topology", None, "Such as v5e:4x4, v6e:2x4 or h100:8.")
    flags.DEFINE_integer("batch_per_chip", None, "Samples per chip and optimizer step.")
    flags.DEFINE_integer("fsdp", None, "Chips that share the parameters.")
    flags.DEFINE_integer("accum", None, "Micro-batches per step.")
    flags.DEFINE_enum("remat", None, ["none", "linears", "dots", "full"], "config.model.remat.")
    flags.DEFINE_list("jobs", ["train", "policy"], "What to compile; what else OUT has stays.")
    flags.DEFINE_string("out", None, "JSON file; default: benchmarks/results/aot_TOPOLOGY.json.")
    flags.DEFINE_string("docs", None, "Markdown file whose tables are written from all results.")
    flags.DEFINE_string("text", "", "Existing directory for the texts of the programs.")
    flags.DEFINE_string("job", None, "One program, in this process (used by the command itself).")
    flags.DEFINE_string("job_config", None, "Its config, JSON.")
    command_line.run(main, again="run the same command again")
