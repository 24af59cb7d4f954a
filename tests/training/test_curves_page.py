"""The page of a run."""

import json

import pytest

from lightwam_jax.training import curves_page
from tests.inference.test_policy import make_config
from tests.test_svg_chart import data


def logged(path, steps=3, held_out=True):
    rows = []
    for step in range(1, steps + 1):
        losses = {"loss": 3.0 / step, "loss_video": 1.0, "loss_action": 2.0, "lr": 0.1}
        speed = {"samples_per_s": 100.0 * step, "ms_step": 9.0 / step}
        rows.append({"kind": "train", "step": step, "grad_norm": 1.0, **losses, **speed})
        if held_out:
            rows.append({"kind": "eval", "step": step, "l1": [0.5, 0.25], "l1_mean": 0.375 / step})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    page = curves_page.write(path, make_config()).read_text(encoding="utf-8")
    return page, [data(f'data-chart="{part}') for part in page.split('data-chart="')[1:]]


def test_the_page_shows_losses_validation_and_speed(tmp_path):
    page, charts = logged(tmp_path)
    mean, each, losses, rate, norm, speed, _ = charts
    assert mean["series"] == [[[1, 2, 3], [0.375, 0.1875, 0.125]]]
    assert [values for _, values in each["series"]] == [[0.5] * 3, [0.25] * 3]
    assert losses["series"][0] == [[1, 2, 3], [3, 1.5, 1]] and len(losses["series"]) == 3
    assert rate["series"][0][1] == [0.1] * 3 and norm["series"][0][1] == [1] * 3
    assert speed["series"] == [[[2, 3], [200, 300]]], "without the window that compiles"
    assert "after step 3" in page and ">0.125</" in page and "http" not in page


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_without_validation_has_a_page(tmp_path, steps):
    page, charts = logged(tmp_path, steps, held_out=False)
    assert "No data are held out" in page and len(charts) == (3 if steps == 1 else 5)


def test_without_rows_there_is_no_page(tmp_path):
    assert curves_page.write(tmp_path, make_config()) is None
    assert not list(tmp_path.iterdir())
