"""The five edits of docs/data.md fit the configs as they are, and read what is written for them."""

import dataclasses

import numpy as np
import pytest

from benchmarks import first_hour
from lightwam_jax import command_line
from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes as episodes_lib
from tests import synthetic

WRITERS = {"hdf5": first_hour.write_hdf5, "lerobot": first_hour.write_lerobot}


@pytest.mark.parametrize("layout", first_hour.EDITS)
def test_the_five_edits_read_the_recordings(layout, tmp_path):
    recordings = [
        dataclasses.replace(episode, state=episode.state[:, :5], action=episode.action[:, :4])
        for episode in synthetic.make_episodes(2)
    ]
    data, mine = tmp_path / "data", tmp_path / "mine.py"
    WRITERS[layout](recordings, data)
    mine.write_text(first_hour.edited(layout, data), encoding="utf-8")
    config = config_lib.from_config_dict(command_line.load(f"{mine}:tiny"))
    found = episodes_lib.load_episodes(config)
    assert len(found) == 2
    for one, wanted in zip(found, recordings):
        np.testing.assert_array_equal(one.state, wanted.state)
        np.testing.assert_array_equal(one.action, wanted.action)
        assert (one.task, one.fps) == (wanted.task, wanted.fps)
        seen = one.frames("wrist", [3])[0].astype(int)
        off = np.abs(seen - wanted.images["wrist"][3])
        assert off.max() == 0 if layout == "hdf5" else off.mean() < 5


def test_a_config_that_changed_is_noticed(monkeypatch):
    monkeypatch.setitem(first_hour.EDITS, "hdf5", [("no such line", "")])
    with pytest.raises(ValueError, match="'no such line' 0 times"):
        first_hour.edited("hdf5", "data")


def test_the_transcript_has_the_commands_the_edits_and_the_times(tmp_path):
    log = (
        f"$ python train.py --config {tmp_path}/mine_hdf5.py:tiny "
        f"--config.data.cache={tmp_path}/cache_hdf5 --workdir {tmp_path}/run_hdf5\n"
        "Devices: one\nvalidation: L1 0.1234 at step 5\nnext: python evaluate.py\n"
    )
    (tmp_path / "hdf5.log").write_text(log, encoding="utf-8")
    took = {"seconds": 12.3, "processor_seconds": 4.5}
    numbers = {"load_average_before": 0.1, "all_seconds": 49.2, "all_processor_seconds": 18.0}
    numbers |= dict.fromkeys(("stats", "all", "train", "open_loop"), took)
    text = first_hour.transcript({"hdf5": numbers}, tmp_path)
    assert "$ python train.py --config configs/mine.py:tiny --workdir runs/hdf5_tiny\n" in text
    assert "validation: L1 0.1234" in text and "Devices" not in text
    assert '+c.data.path = "data/mine"' in text
    assert "-fps=30.0\n+fps=10.0\n" in text and "| train | 12 (4) |" in text
    assert "| load average before | 0.1 |" in text and str(tmp_path) not in text
