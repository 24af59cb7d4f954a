"""Every key with its default: the released recipe's values where the paper gives one.

Other configs import this and change values; `docs/config.md` lists the keys with their meaning.
Not runnable by itself: `data.source` is empty. See `configs/demo.py` for the smallest real run.
"""

import ml_collections

from lightwam_jax import config


def get_config(model="wan21_1_3b", **model_overrides):
    """The defaults of `lightwam_jax/config.py`, with the sizes of a table of models/variants.py."""
    return ml_collections.ConfigDict(config.defaults(model, **model_overrides))
