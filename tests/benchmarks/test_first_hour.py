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
