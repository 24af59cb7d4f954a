"""Where the learned queries of a policy look: maps over the cells of its canvas."""

import numpy as np

from lightwam_jax.encoders import base as encoders_base


def maps(taps, data):
    """Summary attention of the learned queries: sum over queries of importance times weights.

    Args:
      taps: of `Policy.act(..., return_taps=True)`: "attention_{layer}_{source}" [...,Q,S] and
        "query_importance_{layer}_{source}" [Q].
      data: `DataConfig`.

    Returns:
      {"{layer}_{source}": float32 [...,h,w]}, each of which sums to 1; {} where the taps hold no
      attention (pooling without learned queries).
    """
    cell = 2 * encoders_base.STRIDES[data.codec]  # the backbone reads patches of 2x2 latent cells
    size = tuple(side // cell for side in data.canvas)
    found = {}
    for key, weights in taps.items():
        if key.startswith("attention_"):
            name = key.removeprefix("attention_")
            summary = np.einsum("q,...qs->...s", taps[f"query_importance_{name}"], weights)
            found[name] = summary.reshape(*summary.shape[:-1], *size).astype(np.float32)
    return found
