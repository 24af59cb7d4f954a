"""Memory of a training step per device: a plan before anything is allocated, and the compiler's
report once the step is compiled.
"""

import contextlib
import dataclasses
import math

import jax
import numpy as np

from lightwam_jax import build, sharding
from lightwam_jax import params as params_lib
from lightwam_jax.data import spec
from lightwam_jax.models import blocks
from lightwam_jax.training import losses

GIB = 2**30
ADVICE = (
    "Parameters, optimizer and frozen weights: raise config.mesh.fsdp, keep config.mesh.frozen="
    "'sharded' and config.model.frozen_dtype='bfloat16', or 'int8'. Activations: "
    "config.model.remat='full', raise config.optimizer.accum_steps. Both: lower "
    "config.train.batch_size, or more devices"
)


def plan(config, state, shardings):
    """Returns what a training step needs, bytes per device, from shapes alone.

    Args:
      config: `Config`.
      state, shardings: ShapeDtypeStructs of a `TrainState`, and where they go.

    Returns:
      what `held` returns, and "activations": what the forward pass of a micro-batch keeps for the
      backward pass. What a block needs while it runs comes on top.
    """
    rows = config.train.batch_size // (shardings.step.mesh.size * config.optimizer.accum_steps)
    return {**held(config, state, shardings), "activations": activations(config, state, rows)}


def held(config, state, shardings):
    """Returns the bytes per device that do not depend on the layers of the model.

    {"parameters", "frozen", "optimizer", "average", "batch", "gathered", "gradients"}: the first
    five are held all the time. "gathered" are the trainable parameters, whole; "gradients" their
    gradients, whole, and twice with accumulation (the sum and those of a micro-batch).
    """
    mesh, accum = shardings.step.mesh, config.optimizer.accum_steps
    batch = spec.batch_spec(config, config.train.batch_size)

    def part(shapes, places):
        sizes = jax.tree.map(lambda x, s: _bytes(s.shard_shape(x.shape), x.dtype), shapes, places)
        return sum(jax.tree.leaves(sizes))

    rows = sharding.batch_sharding(mesh)
    learns = sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(state.trainable))
    return {
        "parameters": part(state.trainable, shardings.trainable),
        "frozen": part(state.frozen, shardings.frozen),
        "optimizer": part(state.opt_state, shardings.opt_state),
        "average": part(state.ema, shardings.ema),
        "batch": part(batch, jax.tree.map(lambda x: rows, batch)),
        "gathered": learns if mesh.shape[sharding.AXES[1]] > 1 else 0,
        "gradients": learns * (2 if accum > 1 else 1),
    }


def activations(config, state, rows):
    """Returns the bytes that the forward pass of `rows` samples keeps for the backward pass.

    These are the residuals of the loss's derivative without arrays of the shapes of parameters:
    the weights are held anyway, or cast from those held.
    """
    model = build.build_model(dataclasses.replace(config.model, attention="xla"))
    batch = spec.model_batch_spec(config, rows)
    known = {x.shape for x in jax.tree.leaves((state.trainable, state.frozen))}

    def kept(trainable, frozen, batch, key):
        noise = losses.draw(key, batch, config)

        def loss(trainable):
            params = params_lib.merge(trainable, frozen)
            return losses.training_loss(model, params, batch, noise, config.loss)[0]

        return jax.vjp(loss, trainable)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    residuals = jax.eval_shape(kept, state.trainable, state.frozen, batch, key)
    return sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(residuals) if x.shape not in known)


def summary(plan):
    """Returns a `plan` as lines for the log, GiB."""
    missing = "" if "activations" in plan else " (activations: by the compiler, below)"
    rows = {name: size for name, size in plan.items() if size} | {"together": sum(plan.values())}
    lines = [f"  {name:<12}{size / GIB:8.2f}" for name, size in rows.items()]
    return "\n".join([f"Memory per device as planned, GiB{missing}:", *lines])


def remat_that_fits(config, state, shardings, limit):
    """Returns the fastest config.model.remat whose `plan` is at most `limit` bytes, or None.

    The others are those of `plan`. Each try traces the loss: seconds at full size.
    """
    for remat in ("none", *blocks.REMAT_POLICIES):
        model = dataclasses.replace(config.model, remat=remat)
        tried = plan(dataclasses.replace(config, model=model), state, shardings)
        if sum(tried.values()) <= limit:
            return remat
    return None


def check(plan, remat_that_fits=None):
    """Raises ValueError if a `plan` exceeds the memory that this process's devices report.

    Args:
      remat_that_fits: bytes -> the config.model.remat that would fit them or None, for the error.
    """
    needed = sum(plan.values())
    for device in jax.local_devices():
        there = (device.memory_stats() or {}).get("bytes_limit", needed)
        if needed > there:
            largest = max(plan, key=plan.get)
            remat = remat_that_fits and remat_that_fits(there)
            proposal = f"config.model.remat={remat!r} would fit. " if remat else ""
            raise ValueError(
                f"{device} has {there / GIB:.1f} GiB, the plan needs at least {needed / GIB:.1f} "
                f"GiB, most of it for {largest!r}. {proposal}{ADVICE}"
            )


@contextlib.contextmanager
def explained():
    """Turns an out-of-memory error of the devices into a MemoryError that says what helps."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise MemoryError(
            f"the training step does not fit the devices: {reason}\n  {ADVICE}. "
            "Something else on a GPU? JAX reserves three quarters of it at the start "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION)"
        ) from error


def compiled_summary(program):
    """Returns the compiler's report as one line for the log."""
    sizes = compiled(program)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = f" of {limit / GIB:.1f}" if limit else ""
    return (
        f"{sizes['peak']:.2f}{there} GiB per device by the compiler's report "
        f"({sizes['arguments']:.2f} held, {sizes['temporaries']:.2f} temporary)"
    )


def compiled(program):
    """Returns GiB per device: the compiler's report, and what the device saw where it tells.

    {"arguments", "temporaries", "peak"}, and "peak_measured" (initialisation included).
    """
    report = program.memory_analysis()
    arguments, temporaries = report.argument_size_in_bytes, report.temp_size_in_bytes
    fresh = report.output_size_in_bytes - report.alias_size_in_bytes  # not written in place
    # The report's own peak leaves the temporaries out on some platforms.
    sizes = {
        "arguments": arguments,
        "temporaries": temporaries,
        "peak": max(report.peak_memory_in_bytes, arguments + fresh + temporaries),
    }
    seen = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in seen:
        sizes["peak_measured"] = seen["peak_bytes_in_use"]
    return {name: size / GIB for name, size in sizes.items()}


def _bytes(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize
