"""Rows on disk survive kills; the window keeps what is finite."""

import time

import jax.numpy as jnp
import pytest

from lightwam_jax import chips
from lightwam_jax.training import metrics as metrics_lib


def test_rows_after_the_restored_step_are_removed(tmp_path):
    writer = metrics_lib.MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": jnp.float32(step)})
    writer.write("eval", 3, {"l1": jnp.array([0.5, 1.5])})
    writer.sync()
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')  # killed while writing

    metrics_lib.MetricsWriter(tmp_path, 3).close()
    rows = metrics_lib.read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert rows[-1] == {"kind": "eval", "step": 3, "l1": [0.5, 1.5]}

    metrics_lib.MetricsWriter(tmp_path, 2).close()
    assert [row["step"] for row in metrics_lib.read_rows(path)] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir())


def test_only_the_first_process_writes(tmp_path):
    writer = metrics_lib.MetricsWriter(tmp_path, 0, active=False)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_window_means_and_first_bad_step():
    window = metrics_lib.Window([{"loss": 1.0, "lr": 0.1}])
    window.add({"loss": jnp.float32(3), "lr": jnp.float32(0.2), "finite": jnp.array(True)}, 2)
    window.fetch()
    assert window.close() == pytest.approx({"loss": 2.0, "lr": 0.2})
    for value, finite in ((1.0, True), (jnp.nan, False), (5.0, False)):
        window.add({"loss": jnp.float32(value), "finite": jnp.array(finite)}, 2)
    window.fetch()
    assert window.rows == [{"loss": 1.0}]
    assert str(window.bad["loss"]) == "nan"


def test_timer_splits_a_window():
    timer = metrics_lib.StepTimer()
    for _ in range(2):
        with timer("data"):
            time.sleep(0.01)
    with timer("save"):
        time.sleep(0.1)
    window = timer.window(steps=2, batch_size=4)
    assert 9 < window["ms_data"] < 60
    assert window["ms_step"] < 60
    assert window["ms_host"] == pytest.approx(window["ms_step"] - window["ms_data"], abs=1)
    assert window["samples_per_s"] == pytest.approx(4000 / window["ms_step"])


def test_timer_knows_where_it_is():
    timer = metrics_lib.StepTimer(step=7)
    with timer("data"):
        time.sleep(0.01)
        step, phase, seconds = timer.where()
        assert (step, phase) == (7, "data") and 0.01 <= seconds < 0.2
    timer.stepped(8)
    assert timer.where()[:2] == (8, "host")


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
