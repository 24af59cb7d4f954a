"""What a run shows while it runs: JSONL rows, TensorBoard curves, a progress bar, timings."""

import contextlib
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tensorboardX
import tqdm


class MetricsWriter:
    """Appends rows to `<workdir>/metrics.jsonl` and scalars to `<workdir>/tensorboard/`.

    Rows after `step` are of a run that was interrupted and is about to be repeated: they are
    removed, so that the file ends up equal to that of an uninterrupted run.

    Args:
      workdir: run directory.
      step: the step training (re)starts from.
      active: False on all but the first process; nothing is written then.
    """

    def __init__(self, workdir, step, active=True):
        self._active = active
        if not active:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(scratch, path)
        self._file = path.open("a")
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
        for name, value in values.items():
            curves = (
                {f"{name}/{i}": v for i, v in enumerate(value)}
                if isinstance(value, list)
                else {name: value}
            )
            for curve, v in curves.items():
                self._board.add_scalar(f"{kind}/{curve}", v, step)

    def sync(self):
        """Makes the rows survive a power failure; called before a checkpoint counts on them."""
        if self._active:
            os.fsync(self._file.fileno())

    def close(self):
        """Flushes and closes both."""
        if self._active:
            self._file.close()
            self._board.close()


def read_rows(path):
    """Returns the rows of a metrics.jsonl (none if there is no file).

    A last line without an end is what a killed writer leaves, and is dropped.
    """
    path = pathlib.Path(path)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class StepTimer:
    """Splits wall time into phases by name, without waiting for the device itself.

    `with timer("data"): ...` adds to a phase; `window(steps)` returns and clears the totals.
    """

    def __init__(self):
        self._spent = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - start

    def window(self, steps, batch_size):
        """Returns the split of the time since the last call, per step.

        Returns:
          {"ms_step", "ms_data", "ms_device", "ms_host", "samples_per_s"}: host is what is neither
          waiting for data nor for the device. The phase "aside" (validation, checkpoints) is taken
          out of all of them.
        """
        now = time.perf_counter()
        spent, self._spent = self._spent, {}
        wall = now - self._start - spent.get("aside", 0.0)
        self._start = now
        data, device = spent.get("data", 0.0), spent.get("device", 0.0)
        ms = 1000 / max(steps, 1)
        return {
            "ms_step": wall * ms,
            "ms_data": data * ms,
            "ms_device": device * ms,
            "ms_host": max(wall - data - device, 0.0) * ms,
            "samples_per_s": steps * batch_size / max(wall, 1e-9),
        }


class Window:
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


def progress_bar(start, total, active=True):
    """Returns a tqdm bar over optimizer steps, with loss and time left."""
    # On a terminal the bar moves; in a log file it is one line per 30 seconds.
    return tqdm.tqdm(
        initial=start,
        total=total,
        unit="step",
        dynamic_ncols=True,
        disable=not active,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )


def show(bar, values):
    """Puts the newest window into the bar."""
    bar.set_postfix(
        {name: f"{values[name]:.4g}" for name in ("loss", "lr", "samples_per_s")}, refresh=False
    )


def parameter_report(table):
    """Returns the printed form of `params.count_table` rows (group, total, trainable)."""
    lines = [f"{'parameters':<18}{'total':>16}{'trainable':>16}"]
    lines += [f"{group:<18}{total:>16,}{learns:>16,}" for group, total, learns in table]
    return "\n".join(lines)
