"""What a run shows while it runs: JSONL rows, TensorBoard curves, a progress bar, timings."""

import contextlib
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

from lightwam_jax import atomic
from lightwam_jax.training import stuck, wandb_log


class MetricsWriter:
    """Appends rows to `<workdir>/metrics.jsonl`, scalars to `<workdir>/tensorboard/`.

    Rows after `step` are of a run that was interrupted and is about to be repeated: they are
    removed, so that the file ends up equal to that of an uninterrupted run.

    Args:
      workdir: run directory.
      step: the step training (re)starts from.
      active: False on all but the first process; nothing is written then.
      wandb: project at Weights & Biases that gets the same scalars; "": none.
    """

    def __init__(self, workdir, step, active=True, wandb=""):
        self._active = active
        if not active:
            return
        import tensorboardX  # which imports PyTorch where that is installed, for seconds

        self._mirror = wandb_log.Mirror(wandb, workdir) if wandb else None
        path = pathlib.Path(workdir) / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= step]
        atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=step + 1
        )

    def write(self, kind, step, values):
        """Writes one row {"kind", "step", **values}; a list is one TensorBoard curve per entry."""
        if not self._active:
            return
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        curves = {f"{kind}/{curve}": value for curve, value in _curves(values).items()}
        for curve, value in curves.items():
            self._board.add_scalar(curve, value, step)
        if self._mirror:
            self._mirror.write(curves, step)

    def sync(self):
        """Makes the rows survive a power failure; called before a checkpoint counts on them."""
        if self._active:
            os.fsync(self._file.fileno())

    def close(self):
        """Flushes and closes them."""
        if self._active:
            self._file.close()
            self._board.close()
            if self._mirror:
                self._mirror.close()


def read_rows(path):
    """Returns the rows of a metrics.jsonl (none if there is no file).

    A last line without an end is what a killed writer leaves, and is dropped.
    """
    path = pathlib.Path(path)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def read_series(path):
    """Returns {"{kind}/{name}": (steps [n], values [n])} of a metrics.jsonl.

    A list becomes one series per entry, "{kind}/{name}/{i}".
    """
    series = {}
    for row in read_rows(path):
        kind, step = row.pop("kind"), row.pop("step")
        for name, value in _curves(row).items():
            steps, values = series.setdefault(f"{kind}/{name}", ([], []))
            steps.append(step)
            values.append(value)
    return series


def _curves(row):
    """{name: number, or list of numbers} -> {name, or name/i: number}."""
    curves = {}
    for name, value in row.items():
        if isinstance(value, list):
            curves |= {f"{name}/{i}": x for i, x in enumerate(value)}
        else:
            curves[name] = value
    return curves


class StepTimer:
    """Splits wall time into phases by name, without waiting for the device itself.

    `with timer("data"): ...` adds to a phase; `window(steps)` returns and clears the totals. Phases
    besides "data" and "device" (validating, saving) are no part of a step.
    """

    def __init__(self):
        self._spent, self._start = {}, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - start

    def window(self, steps, batch_size):
        """Returns the split of the time since the last call, per step.

        Returns:
          {"ms_step", "ms_data", "ms_device", "ms_host", "samples_per_s"}: host is what is neither
          waiting for data nor for the device.
        """
        now = time.perf_counter()
        spent, self._spent = self._spent, {}
        data, device = spent.pop("data", 0.0), spent.pop("device", 0.0)
        wall = now - self._start - sum(spent.values())
        self._start = now
        ms = 1000 / max(steps, 1)
        return {
            "ms_step": wall * ms,
            "ms_data": data * ms,
            "ms_device": device * ms,
            "ms_host": max(wall - data - device, 0.0) * ms,
            "samples_per_s": steps * batch_size / max(wall, 1e-9),
        }


class Log:
    """The log of a run: metrics of its steps in windows, where the time goes, a progress bar.

    Args:
      workdir: run directory. config: `TrainConfig`.
      step: the step training (re)starts from.
      rows: metrics of the steps since the last log row.
      active: False on all but the first process, which alone writes and shows.

    Attributes:
      window: `MetricBuffer` of the steps since the last log row. write, sync: of `MetricsWriter`.
    """

    def __init__(self, workdir, config, step, rows=(), active=True):
        self._config, self._step, self._logged = config, step, step
        self.window, self._timer = MetricBuffer(rows), StepTimer()
        self._writer = MetricsWriter(workdir, step, active, config.wandb)
        self.write, self.sync = self._writer.write, self._writer.sync
        # On a terminal the bar moves; in a log file it is one line per 30 seconds.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm.tqdm(initial=step, total=config.steps, unit="step", dynamic_ncols=True,
                              disable=not active, mininterval=interval)  # fmt: skip

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase of the loop, and says so if the run is stuck in it."""
        with stuck.watch(name, self._step, self._config.stuck_after_s), self._timer(name):
            yield

    def add(self, metrics, in_flight):
        """Adds the metrics of the next step; see `MetricBuffer.add`."""
        self.window.add(metrics, in_flight)
        self._step += 1
        self._bar.update()

    def write_window(self, utilisation):
        """Writes the means of the window that ends here, and starts the next one.

        Args:
          utilisation: as below, a function of the milliseconds of a step.
        """
        steps, self._logged = self._step - self._logged, self._step
        values = self.window.close() | self._timer.window(steps, self._config.batch_size)
        with stuck.watch("log", self._step, self._config.stuck_after_s):
            self.write("train", self._step, values | utilisation(values["ms_step"]))
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "lr", "samples_per_s")}
        self._bar.set_postfix(shown, refresh=False)

    def close(self):
        """Closes the bar, then the files, which a full disk may prevent."""
        self._bar.close()  # what an error says must not follow on the line of the bar
        self._writer.close()


def utilisation(ms_step, work, devices, peak):
    """Returns {"tflop_per_s_per_device", "mfu"} of steps of `work` FLOPs, {} where it is unknown.

    Args:
      ms_step: milliseconds of a step. work: FLOPs of the model in a step, or 0.
      devices: number of them. peak: FLOP/s of one.
    """
    if not work:
        return {}
    speed = work / devices / (ms_step / 1000)
    return {"tflop_per_s_per_device": speed / 1e12, "mfu": speed / peak}


class Profiler:
    """Records a window of steps with `jax.profiler`, into `<workdir>/profile/`.

    Args:
      workdir: run directory.
      steps: (first, last) step of the window, counted from 1; None: no profile.
      step: the step training (re)starts from. total: the last step of the run.

    Raises:
      ValueError: the run does not pass through the window.
    """

    def __init__(self, workdir, steps, step, total):
        self._directory, self._steps, self._on = pathlib.Path(workdir) / "profile", steps, False
        if steps and not step < steps[0] <= steps[1] <= total:
            raise ValueError(
                f"--profile={steps[0]}:{steps[1]}: this run takes steps {step + 1} to {total}; "
                "expected FIRST:LAST among them"
            )

    def before(self, step):
        """Starts recording if `step` is the first of the window."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._directory)
            self._on = True

    def after(self, step, metrics):
        """Ends recording after the last step of the window, once `metrics` of it are there."""
        if self._on and step == self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()
            tqdm.tqdm.write(
                f"Profile of steps {self._steps[0]} to {self._steps[1]}: "
                f"{self._directory} (TensorBoard, or Perfetto's trace viewer)"
            )

    def close(self):
        """Ends recording where a run stops within the window."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


class MetricBuffer:
    """Metrics of the steps since the last log row, left on the device until they are needed.

    Attributes:
      rows: [{name: float}], the steps already brought to the host, finite ones only.
      bad: the row of the first step that was not finite, or None; later ones are dropped.
    """

    def __init__(self, rows=()):
        self.rows = list(rows)
        self.bad = None
        self._pending = []

    def add(self, metrics, in_flight):
        """Adds a step's metrics ({name: device scalar}); waits for the step `in_flight` before."""
        self._pending.append(metrics)
        if len(self._pending) > in_flight:
            jax.block_until_ready(self._pending[-1 - in_flight])

    def fetch(self):
        """Brings all steps to the host, in one transfer."""
        pending, self._pending = self._pending, []
        for row in jax.device_get(pending):
            finite = bool(row.pop("finite"))
            row = {name: float(value) for name, value in row.items()}
            if finite and self.bad is None:
                self.rows.append(row)
            elif self.bad is None:
                self.bad = row

    def close(self):
        """Returns the means over the window (its last learning rate) and starts the next one."""
        rows, self.rows = self.rows, []
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return means | {"lr": rows[-1]["lr"]}


def parameter_report(table):
    """Returns the printed form of `params.count_table` rows (group, total, trainable)."""
    lines = [f"{'parameters':<18}{'total':>16}{'trainable':>16}"]
    lines += [f"{group:<18}{total:>16,}{learns:>16,}" for group, total, learns in table]
    return "\n".join(lines)
