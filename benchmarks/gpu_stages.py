"""The stages of `benchmarks/gpu.sh`, each run in a process of its own.

  python -m benchmarks.gpu_stages list                       # name and seconds of each, in order
  python -m benchmarks.gpu_stages run NAME                   # one line of JSON, last on stdout
  python -m benchmarks.gpu_stages collect $OUT/results.jsonl # -> benchmarks/results/gpu.json

The models have random weights, made on the device, at the size of configs/libero.py; with TINY=1 in
the environment they are the smallest. A stage that raises is a result too: {"failed": why}.
REF is a checkout of the PyTorch reference. What a stage leaves besides its line goes to $OUT.
"""

import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from typing import NamedTuple

RESULTS = pathlib.Path(__file__).parent / "results" / "gpu.json"
TINY = os.environ.get("TINY") == "1"
KERNELS = 30  # of a profile


class Stage(NamedTuple):
    """A measurement: what `kind` of, with which options, and how many seconds it should take."""

    name: str
    kind: str
    seconds: int
    options: dict


# Most important first: what does not fit into the time is left out.
LINEARS = {"model.remat": "linears"}
STAGES = (
    Stage("policy_b1", "policy", 50, {"rows": 1, "trace": True}),
    Stage("reference", "reference", 75, {"dtype": "bfloat16", "rows": (1, 8), "train": 16}),
    Stage("policy_b8", "policy", 45, {"rows": 8}),
    Stage("policy_b64", "policy", 50, {"rows": 64}),
    Stage("train_b16_linears", "train", 90, {"batch": 16, **LINEARS}),
    Stage("train_b16_dots", "train", 90, {"batch": 16, "model.remat": "dots"}),
    Stage("train_b16_cudnn", "train", 90, {"batch": 16, **LINEARS, "model.attention": "cudnn"}),
    Stage("train_b16_xla", "train", 90, {"batch": 16, **LINEARS, "model.attention": "xla"}),
    Stage("train_b32_linears", "train", 90, {"batch": 32, **LINEARS}),
    Stage("profile", "train", 95, {"batch": 16, **LINEARS, "trace": True}),
    Stage("latency", "latency", 50, {"batches": (1, 8), "sizes": ((224, 224), (480, 640))}),
    Stage("policy_b1_cudnn", "policy", 45, {"rows": 1, "model.attention": "cudnn"}),
    Stage("train_b16_full", "train", 90, {"batch": 16, "model.remat": "full"}),
)


def run(stage):
    """Returns the line of a stage: its numbers, or why it failed."""
    began = time.perf_counter()
    line = {"stage": stage.name, "kind": stage.kind}
    try:
        line |= KINDS[stage.kind](**stage.options)
    except Exception as error:  # whatever it is, the other stages go on
        traceback.print_exc()
        line["failed"] = f"{type(error).__name__}: {str(error)[:400]}"
    return line | {"tiny": TINY, "stage_s": time.perf_counter() - began}


def config_of(changes, **more):
    """Returns the `Config` that a stage measures."""
    from benchmarks import action_pass
    from configs import libero

    return action_pass.config_of(libero.get_config("spatial"), tiny=TINY, **changes, **more)


# ---- kinds of stages: the imports are theirs alone, so that none needs what it does not use ------


def policy(rows, trace=False, **changes):
    """The deployed policy: canvas to actions, and its parts."""
    import jax
    import numpy as np

    from benchmarks import action_pass
    from lightwam_jax.training import memory

    rows = min(rows, 4) if TINY else rows
    config = config_of(changes)
    do, weights = action_pass.of_config(config), action_pass.random(action_pass.shapes(config))
    rng = np.random.default_rng(0)
    canvas, text, state = (
        rng.random(x.shape, np.float32).astype(x.dtype) for x in action_pass.inputs(config, rows)
    )
    kept = jax.jit(do.remember)(weights, text)
    program, numbers = _compiled(jax.jit(do.act), weights, canvas, kept, state)
    on_device = jax.device_put((canvas, state))
    parts = {name: jax.jit(getattr(do, name)) for name in ("encode", "context", "read")}
    latents = parts["encode"](weights, on_device[0])
    calls = {
        "device_ms": lambda: program(weights, on_device[0], kept, on_device[1]),
        "with_transfers_ms": lambda: np.asarray(program(weights, canvas, kept, state)),
        "vae_ms": lambda: parts["encode"](weights, on_device[0]),
        "context_ms": lambda: parts["context"](weights, on_device[1]),
        "blocks_ms": lambda: parts["read"](weights, latents, kept, on_device[1]),
    }
    n = 5 if TINY else 50 if rows == 1 else 15
    times = {name: _timed(call, jax.block_until_ready, n) for name, call in calls.items()}
    if trace:
        numbers["kernels"] = _profiled(calls["device_ms"], 3, f"policy_b{rows}")
    actions = np.asarray(calls["device_ms"]())
    finite = {"finite": bool(np.isfinite(actions).all())}
    memory_gib = memory.compiled(program)
    return {"rows": rows, **numbers, **times, **finite, "memory_gib": memory_gib, **_about(config)}


def train(batch, trace=False, **changes):
    """Training steps of the frozen backbone with LoRA, on one batch of cached latents."""
    import jax

    from benchmarks import action_pass
    from lightwam_jax.training import chips, flops, memory

    batch = 2 if TINY else batch
    config = config_of(changes, **{"train.batch_size": batch})
    step, state, data = action_pass.training(config)
    program, numbers = _compiled(step, state, data)

    def steps(count):
        nonlocal state
        for _ in range(count):
            state, metrics = program(state, data)
        return jax.block_until_ready(metrics)

    steps(2)
    count = 2 if TINY else 8
    ms = _timed(lambda: steps(count), lambda _: None, 3, per=count)
    if trace:
        numbers["kernels"] = _profiled(lambda: steps(20), 1, "train", steps=20)
    metrics = steps(1)
    chip = chips.of_kind(jax.devices()[0].device_kind)
    work = flops.of_step(config) / (1e-3 * ms["p50"])
    return {
        "batch": batch,
        **{name: getattr(config.model, name) for name in ("remat", "attention")},
        **numbers,
        "step_ms": ms,
        "samples_per_s": 1000 * batch / ms["p50"],
        "tflop_per_s": work / 1e12,
        **({"mfu": work / chip.flops} if chip else {}),
        "loss": float(metrics["loss"]),
        "finite": bool(metrics["finite"]),
        "memory_gib": memory.compiled(program),
        **_about(config),
    }


def reference(dtype, rows, train):
    """The PyTorch reference in the same run: the policy and one training step."""
    checkout = os.environ.get("REF")
    if not checkout:
        return {"skipped": "REF is not set: no checkout of the reference was given"}
    os.environ["JAX_PLATFORMS"] = "cpu"  # it would take the card's memory
    import torch

    from benchmarks import reference as reference_lib

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of({})
    model = reference_lib.build(checkout, config, dtype, device)
    wait = lambda _: reference_lib.wait(device)
    found = {"dtype": dtype}
    rows, train = ((1,), 1) if TINY else (rows, train)
    for count in rows:
        act = reference_lib.policy(model, config, count)
        found[f"rows_{count}_ms"] = _timed(act, wait, 2 if TINY else 20 if count == 1 else 5)
    try:
        step = reference_lib.training(model, config, train)
        ms = _timed(step, wait, 1 if TINY else 5)
        found |= {"train_batch": train, "train_ms": ms, "samples_per_s": 1000 * train / ms["p50"]}
    except Exception as error:  # of the policy there are numbers all the same
        traceback.print_exc()
        found["train_failed"] = f"{type(error).__name__}: {str(error)[:400]}"
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["device"] = {"kind": torch.cuda.get_device_name(), "platform": "gpu", "count": 1}
    return found | {"versions": {"torch": torch.__version__}}


def latency(batches, sizes):
    """`benchmarks.latency`: the same policy through `Policy.act`, cameras on the host included."""
    import jax

    from benchmarks import latency as latency_lib
    from benchmarks import random_policy, results

    jax.config.update("jax_enable_compilation_cache", False)
    policy = random_policy.make(config_of({}))
    batches, sizes = ((1,), ((32, 32),)) if TINY else (batches, sizes)
    rows = latency_lib.measure(policy, batches, sizes)
    return {"rows": rows, "memory_gib": results.memory_gib(), **_about(policy.config)}


KINDS = {"policy": policy, "train": train, "reference": reference, "latency": latency}

# ---- what they share ---------------------------------------------------------------------------


def _compiled(function, *arguments):
    """Returns the program and {"compile_s"}; on a GPU also its `launches.summary`."""
    import jax

    from benchmarks import launches

    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    numbers = {"compile_s": time.perf_counter() - start}
    if jax.default_backend() == "gpu":
        try:
            numbers |= launches.summary(program.as_text())
        except Exception as error:  # a text that this version of XLA writes in another way
            numbers["launches_failed"] = f"{type(error).__name__}: {error}"
    return program, numbers


def _timed(call, wait, n, per=1):
    """Returns {"p50", "min", "max"} in ms of a call, of which each does `per` pieces of work."""
    wait(call())
    taken = []
    for _ in range(n):
        start = time.perf_counter()
        wait(call())
        taken.append(1000 * (time.perf_counter() - start) / per)
    return {"p50": statistics.median(taken), "min": min(taken), "max": max(taken)}


def _profiled(call, times, name, steps=1):
    """Returns [{"kernel", "count", "ms"}] per step, the dearest first, from the device's profile.

    The profile itself becomes $OUT/NAME.xplane.pb, for TensorBoard or Perfetto.
    """
    import jax

    out = pathlib.Path(os.environ.get("OUT", "."))
    with jax.profiler.trace(str(out / f"trace_{name}")):
        for _ in range(times):
            jax.block_until_ready(call())
    (path,) = (out / f"trace_{name}").rglob("*.xplane.pb")
    path = path.rename(out / f"{name}.xplane.pb")
    found = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines if "/device:" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                count, ns = found.get(event.name, (0, 0))
                found[event.name] = (count + 1, ns + event.duration_ns)
    runs = times * steps
    dearest = sorted(found.items(), key=lambda item: -item[1][1])[:KERNELS]
    rows = [{"kernel": k, "count": c / runs, "ms": ns / 1e6 / runs} for k, (c, ns) in dearest]
    total = [{"kernel": "all", "count": sum(c for c, _ in found.values()) / runs,
              "ms": sum(ns for _, ns in found.values()) / 1e6 / runs}]  # fmt: skip
    return total + rows


def _about(config):
    from benchmarks import results

    return {
        "model": {name: getattr(config.model, name) for name in ("variant", "dtype")},
        "device": results.device(),
        "versions": results.versions(),
    }


# ---- the command -------------------------------------------------------------------------------


def collect(path, out=RESULTS):
    """Writes the lines of a run as one file of results."""
    from benchmarks import results

    lines = [
        json.loads(line)
        for line in pathlib.Path(path).read_text(encoding="utf-8").split("\n")
        if line
    ]
    seen = [line["device"] for line in lines if "device" in line]
    versions = {}
    for line in lines:
        versions |= line.pop("versions", {})
        line.pop("device", None)
    about = {"device": seen[0], "versions": versions} if seen else {}
    results.write(out, "gpu_stages", {"stages": lines, **about})


def main(argv):
    """The command line; see the top of this file."""
    what, *rest = argv or ["nothing"]
    if what == "list":
        print(*(f"{stage.name} {stage.seconds}" for stage in STAGES), sep="\n")
    elif what == "run":
        (stage,) = [stage for stage in STAGES if stage.name == rest[0]]
        print(json.dumps(run(stage)))
    elif what == "collect" and os.path.isfile(rest[0] if rest else ""):
        collect(*rest)
    else:
        raise SystemExit(f"error: {' '.join(argv)!r}: expected list, run NAME or collect FILE")


if __name__ == "__main__":
    main(sys.argv[1:])
