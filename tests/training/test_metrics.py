"""Rows on disk survive kills; the window keeps what is finite."""

import contextlib
import types

import jax.numpy as jnp
import pytest

from lightwam_jax.training import chips
from lightwam_jax.training import metrics as metrics_lib


def test_rows_after_the_restored_step_are_removed(tmp_path):
    writer = metrics_lib.MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": jnp.float32(step)})
    writer.write("eval", 3, {"l1": jnp.array([0.5, 1.5])})
    writer.sync()
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8") + '{"kind": "train", "st', encoding="utf-8"
    )  # killed while writing

    metrics_lib.MetricsWriter(tmp_path, 3).close()
    rows = metrics_lib.read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert rows[-1] == {"kind": "eval", "step": 3, "l1": [0.5, 1.5]}

    metrics_lib.MetricsWriter(tmp_path, 2).close()
    assert [row["step"] for row in metrics_lib.read_rows(path)] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_of_a_killed_run_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 5, "loss": 2.0}\n'
        '{"kind": "eval", "step": 6, "l1": [0.5, 0.25], "loss": 3.0}\n'
        '{"kind": "train", "step": 10, "loss": 1.0}\n{"kind": "tr',
        encoding="utf-8",
    )
    assert metrics_lib.read_series(tmp_path / "metrics.jsonl") == {
        "train/loss": ([5, 10], [2.0, 1.0]),
        "eval/l1/0": ([6], [0.5]),
        "eval/l1/1": ([6], [0.25]),
        "eval/loss": ([6], [3.0]),
    }


def test_only_the_first_process_writes(tmp_path):
    writer = metrics_lib.MetricsWriter(tmp_path, 0, active=False)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_window_means_and_first_bad_step():
    """Of the learning rate the last, not the mean; after the first bad step nothing counts."""
    window = metrics_lib.MetricBuffer([{"loss": 1.0, "lr": 0.1}])
    window.add({"loss": jnp.float32(3), "lr": jnp.float32(0.2), "finite": jnp.array(True)}, 2)
    window.fetch()
    assert window.close() == pytest.approx({"loss": 2.0, "lr": 0.2})
    for value, finite in ((1.0, True), (jnp.nan, False), (5.0, True)):
        window.add({"loss": jnp.float32(value), "finite": jnp.array(finite)}, 2)
    window.fetch()
    window.add({"loss": jnp.float32(jnp.inf), "finite": jnp.array(False)}, 2)
    window.fetch()
    assert window.rows == [{"loss": 1.0}]
    assert str(window.bad["loss"]) == "nan"


@pytest.fixture
def clock(monkeypatch):
    """Time as the timers see it, seconds; it stands still until it is set."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics_lib.time, "perf_counter", lambda: clock.now)
    return clock


def spend(clock, timer, **phases):
    """Lets time pass in each phase; "host" is in none."""
    for phase, seconds in phases.items():
        with contextlib.nullcontext() if phase == "host" else timer(phase):
            clock.now += seconds


def test_timer_splits_a_window(clock):
    timer = metrics_lib.StepTimer()
    for _ in range(2):
        spend(clock, timer, data=0.01, host=0.002, device=0.03)
    spend(clock, timer, compile=5.0, save=0.1)  # no part of a step
    assert timer.window(steps=2, batch_size=4) == pytest.approx(
        {"ms_step": 42, "ms_data": 10, "ms_device": 30, "ms_host": 2, "samples_per_s": 8 / 0.084}
    )
    spend(clock, timer, data=0.25)  # the next window starts from nothing
    assert timer.window(steps=1, batch_size=3) == pytest.approx(
        {"ms_step": 250, "ms_data": 250, "ms_device": 0, "ms_host": 0, "samples_per_s": 12}
    )


def test_waits_for_the_step_that_many_before(monkeypatch):
    waited = []
    monkeypatch.setattr(metrics_lib.jax, "block_until_ready", waited.append)
    window = metrics_lib.MetricBuffer()
    for step in range(5):
        window.add({"step": step}, in_flight=2)
    assert waited == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_curves_are_named_and_those_to_be_repeated_are_purged(tmp_path, monkeypatch):
    boards = []

    class Board:
        def __init__(self, directory, purge_step):
            self.directory, self.purge_step, self.scalars = directory, purge_step, []
            boards.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            pass

    monkeypatch.setattr("tensorboardX.SummaryWriter", Board)
    writer = metrics_lib.MetricsWriter(tmp_path, 4)
    writer.write("train", 5, {"loss": jnp.float32(2)})
    writer.write("eval", 6, {"l1": [0.5, 1.5]})
    writer.close()
    assert boards[0].purge_step == 5 and boards[0].directory == str(tmp_path / "tensorboard")
    assert boards[0].scalars == [("train/loss", 2, 5), ("eval/l1/0", 0.5, 6), ("eval/l1/1", 1.5, 6)]


@pytest.mark.parametrize(("last", "done"), [(4, [(3, "start"), (4, "stop")]),
                                            (6, [(3, "start"), (5, "stop")])])  # fmt: skip
def test_profile_is_of_the_steps_asked_for_or_until_the_run_stops(
    tmp_path, monkeypatch, last, done
):
    now, calls = 0, []
    fake = types.SimpleNamespace(
        start_trace=lambda directory: calls.append((now, "start")),
        stop_trace=lambda: calls.append((now, "stop")),
    )
    monkeypatch.setattr(metrics_lib.jax, "profiler", fake)
    profiler = metrics_lib.Profiler(tmp_path, (3, last), step=0, total=9)
    for now in (1, 2, 3, 4, 5):
        profiler.before(now)
        profiler.after(now, {})
    profiler.close()
    assert calls == done


def test_utilisation_only_where_the_peak_is_known():
    assert metrics_lib.utilisation(100.0, 0, 4, 1e12) == {}
    assert metrics_lib.utilisation(100.0, 4e11, 4, 2e12) == pytest.approx(
        {"tflop_per_s_per_device": 1.0, "mfu": 0.5}
    )


def test_chips_are_recognised_by_what_jax_calls_them():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "TPU v4": "v4",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
    }
    for kind, name in names.items():
        assert chips.of_kind(kind) == chips.CHIPS[name]
    for other in ("cpu", "NVIDIA H100 PCIe", "TPU v99"):
        assert chips.of_kind(other) is None


def test_profile_window_must_lie_ahead(tmp_path):
    metrics_lib.Profiler(tmp_path, (11, 20), step=10, total=20)
    for window in ((10, 12), (19, 21), (15, 14)):
        with pytest.raises(ValueError, match=r"this run takes steps 11 to 20"):
            metrics_lib.Profiler(tmp_path, window, step=10, total=20)


def test_parameter_report_has_one_line_per_group():
    report = metrics_lib.parameter_report([("lora", 10, 10), ("total", 1234567, 10)])
    assert "1,234,567" in report
    assert len(report.splitlines()) == 3
