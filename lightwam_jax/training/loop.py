"""Training from a config to the last checkpoint, one straight story (files: `workdir.py`)."""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import threading
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import build, distributed, sharding
from lightwam_jax import config as config_lib
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.data import loader
from lightwam_jax.training import chips, flops, losses, memory, watchdog
from lightwam_jax.training import encode_video as encode_video_lib
from lightwam_jax.training import gripper_timing as gripper_timing_lib
from lightwam_jax.training import metrics as metrics_lib
from lightwam_jax.training import optimizer as optimizer_lib
from lightwam_jax.training import step as step_lib
from lightwam_jax.training import workdir as workdir_lib

IN_FLIGHT = 2  # steps queued on the device before the host waits: hides the host, bounds memory


@dataclasses.dataclass
class Run:
    """A run ready to go: what `prepare` made and `run` uses up."""

    config: config_lib.Config
    workdir: pathlib.Path
    mesh: typing.Any
    model: typing.Any
    optimizer: typing.Any
    state: step_lib.TrainState
    shardings: step_lib.TrainState
    checkpoints: checkpoint.Checkpoints
    encoder: encode_video_lib.Encoder | None  # where batches hold video
    validation: list
    step: int
    window: list  # metrics of the steps since the last log row
    work: float  # FLOPs of the model in a step; 0 where the peak of the devices is not known
    profiler: metrics_lib.Profiler


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: optimizer steps taken, and the signal that stopped it early (or None)."""

    step: int
    signal: int | None


def train(config, workdir, profile=None):
    """Trains `config` in `workdir`, or continues there; returns an `Outcome`.

    With `profile`, (first, last), these steps are recorded with `jax.profiler`.

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
    return run(prepare(config, workdir, profile))


def prepare(config, workdir, profile=None):
    """Does everything of `train` that can fail by a user's mistake; returns the `Run`."""
    workdir = storage.local_path(workdir)

    # ---- devices -------------------------------------------------------------------------------
    sharding.enable_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.train.batch_size, config.optimizer.accum_steps, mesh)
    _say(f"Devices: {sharding.mesh_summary(mesh)}")

    # ---- run directory and data ----------------------------------------------------------------
    workdir_lib.check_same_run(config, workdir)
    validation = loader.val_batches(config, jax.process_index(), jax.process_count())
    encoder = encode_video_lib.make_encoder(config, mesh)

    # ---- shapes and shardings ------------------------------------------------------------------
    model = build.build_model(config.model)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)

    def init(given):
        params = build.init_params(model, jax.random.key(config.seed), config.model)
        if given:
            given = params_lib.segmented(given, config.model)
            params = step_lib.start_params(params, given, config.train.trainable)
        return step_lib.init_state(params, config, optimizer)

    shapes = jax.eval_shape(init, {})
    shardings = sharding.tree_shardings(mesh, shapes, config.mesh.frozen)
    every = params_lib.merge(shapes.trainable, shapes.frozen)
    table = params_lib.count_table(every, config.train.trainable)
    _say(metrics_lib.parameter_report(table))
    # Tracing the activations takes seconds; a CPU has no memory of its own to overflow.
    plan = (memory.held if jax.default_backend() == "cpu" else memory.plan)(
        config, shapes, shardings
    )
    _say(memory.summary(plan))
    memory.check(plan)

    # ---- restore or initialise -----------------------------------------------------------------
    workdir_lib.write_reports(config, workdir, table)
    checkpoints = checkpoint.Checkpoints(workdir, config, assets=workdir / "assets")
    with contextlib.ExitStack() as on_error:
        on_error.callback(checkpoints.close)
        state, meta = _restore(checkpoints, config, mesh, shapes, shardings)
        if state is None:
            given = {}
            if config.train.init:
                given = checkpoint.load_params(config.train.init, mesh).params
            start = jax.jit(init, out_shardings=shardings, compiler_options=_run_once_options())
            state = start(given)
            _say(f"Parameters from {config.train.init or f'random values, seed {config.seed}'}")
        profiler = metrics_lib.Profiler(workdir, profile, meta["step"], config.train.steps)
        on_error.pop_all()
    work = flops.of_step(config, optimizer, shapes) if _chip(mesh) else 0.0
    return Run(config, workdir, mesh, model, optimizer, state, shardings, checkpoints, encoder,
               validation, meta["step"], meta["window"], work, profiler)  # fmt: skip


def run(r):
    """Runs the steps of a prepared `Run`; returns an `Outcome`."""
    config, step, total = r.config.train, r.step, r.config.train.steps
    if step >= total:
        r.checkpoints.close()
        _say(f"{r.workdir} has {step} of {total} steps; raise config.train.steps to train on")
        return Outcome(step, None)
    batches = _loader(r.config, step)
    writer = metrics_lib.MetricsWriter(r.workdir, step, active=jax.process_index() == 0)
    bar = metrics_lib.progress_bar(step, total, active=jax.process_index() == 0)
    window, timer = metrics_lib.MetricBuffer(r.window), metrics_lib.StepTimer(step)
    state, r.state = r.state, None  # the step consumes it
    train_step, validate = None, _validator(r)
    logged, saved = step, r.checkpoints.latest_step()

    def due(every):
        return every > 0 and (step % every == 0 or step == total)

    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.explained())
        for resource in (batches, writer, bar, r.checkpoints, r.profiler):
            stack.enter_context(contextlib.closing(resource))
        stack.enter_context(watchdog.Watchdog(timer, config.stuck_after_s, jax.process_index()))
        stop = stack.enter_context(_StopSignals(r.checkpoints))
        while step < total and not stop.wanted(step):
            # ---- one step ----------------------------------------------------------------------
            with timer("data"):
                batch = next(batches)
            if train_step is None:
                with timer("compile"):
                    train_step = _begin(r, state, batch)
            r.profiler.before(step + 1)
            with timer("device"):
                state, metrics = train_step(state, *_on_device(r, batch))
                window.add(metrics, IN_FLIGHT)
            step += 1
            timer.stepped(step)
            r.profiler.after(step, metrics)
            bar.update()

            # ---- log, validate, save -----------------------------------------------------------
            if any(map(due, (config.log_every, config.eval_every, config.checkpoint_every))):
                with timer("device"):
                    window.fetch()
                if window.bad:
                    break
            if due(config.log_every):
                values = window.close() | timer.window(step - logged, config.batch_size)
                values |= _utilisation(r, values["ms_step"])
                writer.write("train", step, values)
                metrics_lib.show(bar, values)
                logged = step
            if due(config.eval_every) and r.validation:
                with timer("validate"):
                    writer.write("eval", step, validate(state))
            if due(config.checkpoint_every):
                with timer("save"):
                    saved = _save(r, state, step, window, writer)

        # ---- end -------------------------------------------------------------------------------
        with timer("device"):
            window.fetch()
        if window.bad:
            step = int(state.step)  # it stayed where it was before the bad one
        with timer("save"):
            if saved != step:
                _save(r, state, step, window, writer)
            r.checkpoints.wait()
    if window.bad:
        raise FloatingPointError(_not_finite(r, step, window.bad))
    if stop.signal:
        _say(f"Stopped by {signal.Signals(stop.signal).name} after step {step} of {total}; saved "
             f"in {r.workdir}. Run the same command again to continue.")  # fmt: skip
    return Outcome(step, stop.signal)


def jit_step(r):
    """Returns the jitted training step of a `Run`: (state, batch) -> (state, metrics).

    With config.data.encode_online: (state, batch, r.encoder.arrays) -> (state, metrics).
    """
    encode = r.encoder.train if r.encoder else None
    return step_lib.jit_train_step(
        step_lib.make_train_step(
            r.model, r.config, r.optimizer, shardings=r.shardings, encode=encode
        ),
        r.shardings,
        sharding.batch_sharding(r.mesh),
        sharding.replicated(r.mesh),
        encode=encode is not None,
    )


# ---- the parts of a run ------------------------------------------------------------------------


def _say(message):
    if jax.process_index() == 0:
        print(message, flush=True)


def _run_once_options():
    """Compiler options of a program that runs once: on CPU, compiling costs more than running."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _loader(config, step):
    return loader.train_loader(config, jax.process_index(), jax.process_count(), step)


def _on_device(r, batch):
    """What a compiled step takes besides the state: the batch without the sample ids, which only
    the host reads, and where it holds video the arrays that encode it.
    """
    batch = {name: x for name, x in batch.items() if name != "index"}
    return sharding.put_batch(batch, r.mesh), *([r.encoder.arrays] if r.encoder else [])


def _begin(r, state, batch):
    """Keeps what the first batch of a run tells, and returns the compiled training step."""
    if r.step == 0:
        workdir_lib.write_assets(r.config, r.workdir, batch)
    start = time.perf_counter()
    compiled = jit_step(r).lower(state, *_on_device(r, batch)).compile()
    distributed.wait_for_all("training step compiled")
    _say(
        f"Compiled the training step in {time.perf_counter() - start:.1f} s: "
        f"{memory.compiled_summary(compiled)}"
    )
    return compiled


def _chip(mesh):
    return chips.of_kind(mesh.devices.flat[0].device_kind)


def _utilisation(r, ms_step):
    chip = _chip(r.mesh)
    return metrics_lib.utilisation(ms_step, r.work, r.mesh.size, chip.flops if chip else 0.0)


def _validator(r):
    """Returns validate(state) -> `losses.validation_row` over the validation batches."""
    grippers = gripper_timing_lib.of_run(r.config) if r.validation else []

    @jax.jit
    def errors(state, batch, *arrays):
        if r.encoder:
            batch = r.encoder.first(*arrays, batch)
        return losses.open_loop_errors(
            r.model, step_lib.eval_params(state), batch, r.config.loss, grippers
        )

    def validate(state):
        means = losses.mean_errors([errors(state, *_on_device(r, b)) for b in r.validation])
        return losses.validation_row(means, grippers)

    return validate


def _save(r, state, step, window, writer):
    """Starts saving the state as checkpoint `step`; returns `step`."""
    writer.sync()
    state = sharding.one_copy(state)
    frozen = (lambda: params_lib.canonical(state.frozen)) if state.frozen else None
    r.checkpoints.save(
        step, step_lib.state_items(state), frozen, {"window": window.rows, "next_batch": step}
    )
    return step


def _restore(checkpoints, config, mesh, shapes, shardings):
    """Returns (state, meta) of the newest intact checkpoint, or (None, the meta of a start)."""
    stored = jax.eval_shape(
        lambda s: step_lib.state_items(s) | {"frozen": params_lib.canonical(s.frozen)}, shapes
    )
    restored = checkpoints.restore(
        sharding.with_shardings(stored, sharding.tree_shardings(mesh, stored, config.mesh.frozen))
    )
    if restored is None:
        return None, {"step": 0, "window": []}
    items, meta = restored
    assemble = functools.partial(
        step_lib.state_from_items, shapes=shapes, model_config=config.model
    )
    state = jax.jit(assemble, out_shardings=shardings)(items, jnp.int32(meta["step"]))
    _say(f"Continuing from step {meta['step']} ({checkpoints.directory})")
    return state, meta


def _not_finite(r, step, row):
    """The message about step `step`, whose batch is read again to look into it."""
    with contextlib.closing(_loader(r.config, step)) as batches:
        batch = next(batches)
    broken, samples = [], _sample_names(r.config, batch)
    for name, x in batch.items():
        rows = ~np.isfinite(x.astype(np.float32)).reshape(len(x), -1).all(axis=1)
        if rows.any():
            broken.append(f"{name} of {samples[rows].tolist()}")
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    workdir_lib.write_not_finite(r.workdir, step, samples.tolist(), row, broken)
    good = r.checkpoints.directory / str(step)
    lines = [
        f"step {step} is not finite: {numbers}",
        f"samples of its batch: {samples.tolist()}",
        f"the state before it is saved ({good}), what is known of the step in "
        f"{r.workdir / 'not_finite.json'}; the same command would meet the same batch again",
    ]
    if broken:
        lines.append(
            f"the data are not finite: {'; '.join(broken)}. Repair them, rebuild the cache"
        )
    else:
        lines.append(
            "the data are finite. Choose another --workdir and a lower config.optimizer.lr, "
            "config.optimizer.clip_norm=1.0 or config.model.dtype=float32; "
            "config.train.init can be the saved state"
        )
    return "\n  ".join(lines)


def _sample_names(config, batch):
    """Which samples a batch holds: their rows, in a mixture with the data set: "libero 3"."""
    if "dataset" not in batch:
        return batch["index"]
    names = [dataset.name for dataset in config_lib.datasets(config)]
    return np.array([f"{names[m]} {row}" for m, row in zip(batch["dataset"], batch["index"])])


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
            self._before = {
                s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def _request(self, number, frame):
        del frame
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
