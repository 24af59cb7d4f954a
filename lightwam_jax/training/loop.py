"""Training, from a config to the last checkpoint. `workdir.py` lists the files of a run."""

import contextlib
import dataclasses
import functools
import signal
import threading
import time
import typing

import jax
import jax.numpy as jnp

from lightwam_jax import bucket, distributed, sharding
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import places
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import loader, spec
from lightwam_jax.training import chips, curves_page, flops, memory, not_finite, stuck, wandb_log
from lightwam_jax.training import encode_video as encode_video_lib
from lightwam_jax.training import gripper_timing as gripper_timing_lib
from lightwam_jax.training import metrics as metrics_lib
from lightwam_jax.training import step as step_lib
from lightwam_jax.training import validation as validation_lib
from lightwam_jax.training import workdir as workdir_lib

IN_FLIGHT = 2  # steps queued on the device before the host waits: hides the host, bounds memory


@dataclasses.dataclass
class Run:
    """A run ready to go: what `prepare` made and `run` uses up."""

    config: config_lib.Config
    place: places.Directory | places.InBucket  # where the run lives
    mesh: jax.sharding.Mesh
    model: typing.Any
    encoder: encode_video_lib.Encoder | None  # where batches hold video
    validation: list
    checkpoints: checkpoint.Checkpoints
    profiler: metrics_lib.Profiler
    state: step_lib.TrainState
    step: int
    window: list  # metrics of the steps since the last log row
    utilisation: typing.Callable  # of the milliseconds of a step
    train_step: typing.Callable | None = None  # compiled; None where no step is left to take
    compile_s: float = 0.0

    @property
    def workdir(self):
        """pathlib.Path of the run's directory; of a run in a bucket, of its working copy."""
        return self.place.path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: optimizer steps taken, and the signal that stopped it early (or None)."""

    step: int
    signal: int | None


def train(config, workdir, profile=None, scratch=""):
    """Trains `config` in `workdir`, or continues there; returns an `Outcome`.

    With `profile`, (first, last), these steps are recorded with `jax.profiler`. `workdir` is a
    directory or an address, `scratch` where the working copy of the latter goes.

    Where the parameters come from, first that applies:
      1. the newest intact checkpoint in `workdir` (with optimizer, data position and log window);
      2. `config.train.init`, a checkpoint of base weights; what learns may be missing there and is
         random then;
      3. random values from `config.seed`.

    Raises:
      ValueError, FileNotFoundError: config, data, workdir or checkpoint do not fit together.
      FloatingPointError: a loss or gradient was not finite; the state before it is saved.
      MemoryError: the step does not fit the devices.
    """
    return run(prepare(config, workdir, profile, scratch))


def prepare(config, workdir, profile=None, scratch=""):
    """Does everything of `train` before the first step; returns the `Run`."""
    wandb_log.check(config.train.wandb)
    place = places.opened(workdir, scratch)
    with contextlib.ExitStack() as on_error:
        on_error.callback(place.close)
        ready = _prepared(config, place, profile)
        on_error.pop_all()
    return ready


def _prepared(config, place, profile):
    workdir = place.path

    # ---- devices -------------------------------------------------------------------------------
    sharding.enable_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.train.batch_size, config.optimizer.accum_steps, mesh)
    _say(f"Devices: {sharding.mesh_summary(mesh)}")

    # ---- run directory and data ----------------------------------------------------------------
    workdir_lib.check_same_run(config, workdir, place.started())
    _check_init(config, place)
    validation = loader.val_batches(config, jax.process_index(), jax.process_count())
    encoder = encode_video_lib.make_encoder(config, mesh)

    # ---- shapes and shardings ------------------------------------------------------------------
    model, optimizer, shapes = step_lib.state_shapes(config)
    shardings = sharding.tree_shardings(mesh, shapes, config.mesh.frozen)
    every = params_lib.merge(shapes.trainable, shapes.frozen)
    table = params_lib.count_table(every, config.train.trainable)
    _say(metrics_lib.parameter_report(table))
    # Tracing the activations takes seconds; a CPU has no memory of its own to overflow.
    planned = memory.held if jax.default_backend() == "cpu" else memory.plan
    plan = planned(config, shapes, shardings)
    _say(memory.summary(plan))
    remat_that_fits = functools.partial(memory.remat_that_fits, config, shapes, shardings)
    memory.check(plan, remat_that_fits)
    workdir_lib.write_reports(config, workdir, table)
    _say(f"Curves: tensorboard --logdir {workdir / 'tensorboard'}  (pip install tensorboard)")

    checkpoints = place.checkpoints(config, workdir / "assets")
    with contextlib.ExitStack() as on_error:
        on_error.callback(checkpoints.close)

        # ---- restore or initialise -------------------------------------------------------------
        state, meta = _restore(checkpoints, config, mesh, shapes, shardings)
        step = meta["step"]
        profiler = metrics_lib.Profiler(workdir, profile, step, config.train.steps)
        if state is None:
            state = _start(config, mesh, model, optimizer, shardings)
        r = Run(config, place, mesh, model, encoder, validation, checkpoints, profiler, state,
                step, meta["window"], _utilisation(config, mesh))  # fmt: skip

        # ---- compile ---------------------------------------------------------------------------
        if step < config.train.steps:
            _compile(r, optimizer, shardings)
        on_error.pop_all()
    return r


def run(r):
    """Runs the steps of a prepared `Run`; returns an `Outcome`."""
    with contextlib.closing(r.place), r.place.published():
        return _run(r)


def _run(r):
    config, step, total = r.config.train, r.step, r.config.train.steps
    if step >= total:
        r.checkpoints.close()
        _say(f"{r.place} has {step} of {total} steps; raise config.train.steps to train on")
        return Outcome(step, None)
    batches = _loader(r.config, step)
    log = metrics_lib.Log(r.workdir, config, step, r.window, active=jax.process_index() == 0)
    state, r.state = r.state, None  # the step consumes it
    validate, saved = _validator(r), r.checkpoints.latest_step()

    def due(every):
        return every > 0 and (step % every == 0 or step == total)

    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.explained())
        for resource in (batches, log, r.checkpoints, r.profiler):
            stack.enter_context(contextlib.closing(resource))
        stop = stack.enter_context(_StopSignals(r.checkpoints))
        while step < total and not stop.wanted(step):
            # ---- one step ----------------------------------------------------------------------
            with log.phase("data"):
                batch = next(batches)
            if step == r.step:
                _look_at_first(r, batch)
            r.profiler.before(step + 1)
            with log.phase("device"):
                state, metrics = r.train_step(state, *_on_device(r, batch))
                log.add(metrics, IN_FLIGHT)
            step += 1
            r.profiler.after(step, metrics)

            # ---- log, validate, save -----------------------------------------------------------
            if any(map(due, (config.log_every, config.eval_every, config.checkpoint_every))):
                with log.phase("device"):
                    log.window.fetch()
                if log.window.bad:
                    break
            if due(config.log_every):
                log.write_window(r.utilisation)
            if due(config.eval_every) and r.validation:
                with log.phase("validate"):
                    log.write("eval", step, validate(state))
            if due(config.checkpoint_every):
                with log.phase("save"):
                    saved = _save(r, state, step, log)

        # ---- the end ---------------------------------------------------------------------------
        with log.phase("device"):
            log.window.fetch()
        if log.window.bad:
            step = int(state.step)  # it stayed where it was before the bad one
        with log.phase("save"):
            if saved != step:
                _save(r, state, step, log)
            r.checkpoints.wait()
    return _outcome(r, step, log.window.bad, stop.signal)


# ---- the parts of a run ------------------------------------------------------------------------


def _say(message):
    if jax.process_index() == 0:
        print(message, flush=True)


def _loader(config, step):
    return loader.train_loader(config, jax.process_index(), jax.process_count(), step)


def _on_device(r, batch):
    """What a step takes besides the state: the batch on the devices, without what only the host
    reads, and for video the arrays of the encoder.
    """
    batch = {name: x for name, x in batch.items() if name != "index"}
    return sharding.put_batch(batch, r.mesh), *_arrays(r)


def _arrays(r):
    return [r.encoder.arrays] if r.encoder else []


def _compile(r, optimizer, shardings):
    """Compiles the training step; returns when all processes have."""
    encode = r.encoder.train if r.encoder else None
    step = step_lib.make_train_step(r.model, r.config, optimizer, shardings, encode=encode)
    step = step_lib.jit_train_step(step, shardings, encode is not None)
    start = time.perf_counter()
    with memory.explained(), stuck.watch("compile", r.step, r.config.train.stuck_after_s):
        r.train_step = step.lower(r.state, step_lib.batch_shapes(r.config), *_arrays(r)).compile()
        r.compile_s = time.perf_counter() - start
        distributed.wait_for_all("training step compiled")
    _say(f"Compiled the training step in {r.compile_s:.1f} s: "
         f"{memory.compiled_summary(r.train_step)}")  # fmt: skip


def _look_at_first(r, batch):
    """Checks the first batch, and keeps one row of it where the run begins."""
    spec.check_batch(batch, r.config)
    if r.step == 0:
        workdir_lib.write_assets(r.config, r.workdir, batch)


def _utilisation(config, mesh):
    """Returns `metrics.utilisation` as a function of the milliseconds of a step."""
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    work, peak = (flops.of_step(config), chip.flops) if chip else (0.0, 0.0)
    return functools.partial(metrics_lib.utilisation, work=work, devices=mesh.size, peak=peak)


def _validator(r):
    """Returns validate(state) -> `validation.validation_row` over the validation batches."""
    grippers = gripper_timing_lib.of_run(r.config) if r.validation else []

    @jax.jit
    def errors(state, batch, *arrays):
        if r.encoder:
            batch = r.encoder.first(*arrays, batch)
        noise, params = validation_lib.noise(r.config, batch), step_lib.eval_params(state)
        return validation_lib.open_loop_errors(
            r.model, params, batch, r.config.loss, grippers, noise
        )

    def validate(state):
        means = validation_lib.mean_errors([errors(state, *_on_device(r, b)) for b in r.validation])
        return validation_lib.validation_row(means, grippers)

    return validate


def _save(r, state, step, log):
    """Starts saving the state as checkpoint `step`; returns `step`."""
    log.sync()
    state = sharding.one_copy(state)
    frozen = (lambda: params_lib.canonical(state.frozen)) if state.frozen else None
    extra = {"window": log.window.rows, "next_batch": step}
    r.checkpoints.save(step, step_lib.state_items(state), frozen, extra)
    return step


def _check_init(config, place):
    """Raises FileNotFoundError, before anything is made, where config.train.init is not there."""
    init = config.train.init
    if not init or bucket.is_address(init) or place.started():
        return
    try:
        checkpoint.find_checkpoint(init)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config.train.init={init!r}: {error}; python -m converters dit --in FILE --out DIR "
            "makes one of Wan's transformer (docs/weights.md)"
        ) from error


def _start(config, mesh, model, optimizer, shardings):
    """Returns the state at step 0, with the parameters of config.train.init in their place."""
    base = checkpoint.load_params(config.train.init, mesh).params if config.train.init else {}
    start = functools.partial(step_lib.start_state, model, config, optimizer)
    # On CPU, compiling a program that runs once costs more than running it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    state = jax.jit(start, out_shardings=shardings, compiler_options=options)(base)
    _say(_origin(config, state.frozen))
    return state


def _origin(config, frozen):
    """What a new run says of its parameters."""
    said = f"Parameters from {config.train.init or f'random values, seed {config.seed}'}"
    if not frozen or config.train.init or config.data.source == "fake":
        return said
    return f"{said}\nWARNING: the frozen ones stay random; --config.train.init=DIR gives them"


def _restore(checkpoints, config, mesh, shapes, shardings):
    """Returns (state, meta) of the newest intact checkpoint, or (None, the meta of a start)."""
    stored = jax.eval_shape(
        lambda s: step_lib.state_items(s) | {"frozen": params_lib.canonical(s.frozen)}, shapes
    )
    places = sharding.tree_shardings(mesh, stored, config.mesh.frozen)
    restored = checkpoints.restore(sharding.with_shardings(stored, places))
    if restored is None:
        return None, {"step": 0, "window": []}
    items, meta = restored
    state = jax.jit(
        lambda items, step: step_lib.state_from_items(items, step, shapes, config.model),
        out_shardings=shardings,
    )(items, jnp.int32(meta["step"]))
    _say(f"Continuing from step {meta['step']} ({checkpoints.place})")
    return state, meta


def _outcome(r, step, bad, stopped_by):
    """Returns the `Outcome` after the last good step; raises where the one after it was `bad`."""
    if bad:  # the batch is read again to look into it
        with contextlib.closing(_loader(r.config, step)) as batches:
            batch = next(batches)
        saved = r.checkpoints.directory / str(step)
        raise FloatingPointError(not_finite.report(r.config, r.workdir, saved, step, batch, bad))
    if stopped_by:
        _say(f"Stopped by {signal.Signals(stopped_by).name} after step {step} of "
             f"{r.config.train.steps}; saved in {r.place}. Run the same command again to "
             "continue.")  # fmt: skip
    if jax.process_index() == 0 and (page := curves_page.write(r.workdir, r.config)):
        _say(f"report      {page}")
    return Outcome(step, stopped_by)


class _StopSignals:
    """Turns the first SIGTERM or SIGINT into a request to stop; a second one acts as always.

    With several processes only `Checkpoints.preempted` is asked, so that all stop at the same step.
    """

    def __init__(self, checkpoints):
        self.signal = None
        self._checkpoints, self._before = checkpoints, {}

    def wanted(self, step):
        """Whether to stop after `step`."""
        if self._checkpoints.preempted(step):
            self.signal = signal.SIGTERM  # to any of several processes
        return self.signal is not None

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame):
        del frame
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
