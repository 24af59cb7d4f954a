"""The page of `--mode visualize`."""

import types

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.evaluation import closed_loop, draw, visualize
from tests.evaluation.test_imagined import numbers
from tests.evaluation.test_stitched import episode


def stand_in(attends=True, val_fraction=0.5):
    data = types.SimpleNamespace(cameras=("scene",), val_fraction=val_fraction, path="data")
    model = types.SimpleNamespace(attends=attends)
    config = types.SimpleNamespace(data=data, model=model, name="run")
    return types.SimpleNamespace(config=config, step=5)


@pytest.fixture
def recorded(monkeypatch):
    """Sixteen episodes; returns what is drawn of them."""
    seen = []
    found = [episode(f"e{k}", [[0, 0]] * 9) for k in range(16)]
    monkeypatch.setattr(episodes, "load_episodes", lambda config: found)

    def attention(policy, observations):
        seen.extend(observations)
        return np.zeros((8, 8, 3), np.uint8)

    def future(policy, directory, chosen):
        assert len(chosen) == 6
        for name in ("future.png", "future.mp4"):
            (directory / name).write_bytes(b"x")
        return numbers([1.0], [-0.1])

    monkeypatch.setattr(draw, "attention_grid", attention)
    monkeypatch.setattr(closed_loop, "draw_future", future)
    return seen


def test_the_page_holds_attention_and_what_imagined_video_is_worth(recorded, tmp_path):
    path, lines = visualize.write(stand_in(), tmp_path / "new")
    text = path.read_text(encoding="utf-8")
    assert "Query attention" in text and text.count('class="chart"') == 2
    assert len(lines) == 1 and lines[0].startswith("The imagined video beats") and lines[0] in text
    assert [one["images"]["scene"][0, 0, 0] for one in recorded] == [3, 3, 3]
    assert {one["prompt"] for one in recorded} == {"go"}


def test_without_queries_there_is_no_attention(recorded, tmp_path):
    path, lines = visualize.write(stand_in(attends=False), tmp_path)
    assert "Query attention" not in path.read_text(encoding="utf-8") and not recorded
    assert "no attention.png" in lines[0]


def test_training_data_are_not_shown(recorded, tmp_path):
    with pytest.raises(ValueError, match="holds no episode out"):
        visualize.write(stand_in(val_fraction=0.0), tmp_path / "none")
    assert not (tmp_path / "none").exists()
