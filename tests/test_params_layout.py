"""The order of the blocks on disk."""

import numpy as np

from lightwam_jax import params


def test_runs_of_blocks_are_joined_by_number_not_by_name():
    cuts = [(0, 2), (2, 10), (10, 12)]  # by name, blocks_10 comes before blocks_2
    tree = {
        f"blocks_{start}": {"w": np.arange(start, stop, dtype=np.float32)} for start, stop in cuts
    }
    whole = params.canonical({"dit": dict(sorted(tree.items()))})
    np.testing.assert_array_equal(whole["dit"]["blocks"]["w"], np.arange(12))
