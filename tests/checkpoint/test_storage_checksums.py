"""Checksums see every element, and the newest checkpoint is the one with the largest number."""

import numpy as np
import pytest

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
def test_a_change_of_any_one_element_changes_the_checksum(dtype):
    x = np.ones((2, 3), dtype)
    checksum = int(storage.checksums({"x": x})["x"])
    for place in np.ndindex(x.shape):
        other = x.copy()
        other[place] = 0
        assert int(storage.checksums({"x": other})["x"]) != checksum, place


def test_parts_of_an_array_add_up_to_its_checksum():
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    whole = int(storage.checksums({"x": x})["x"])
    parts = [int(storage._checksum(x[row], np.uint32(6 * row))) for row in range(4)]
    assert sum(parts) % 2**32 == whole


def test_step_1000_is_newer_than_step_900(tmp_path):
    for step in (900, 1000, 50):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert checkpoint.find_checkpoint(tmp_path).name == "1000"
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints").name == "1000"
