"""Which parts of the method matter: one change per cell, several seeds, one table.

    make demo    # records the demonstrations; configs/demo.py has the command for that alone
    python -m lightwam_jax.precompute --config configs/ablations.py --what all
    python -m lightwam_jax.evaluation.ablations --config configs/ablations.py --out runs/ablations

asks it of the embedded demo, with all of its training, and evaluates every 500 steps: what a cell
reaches in the end says less than when it gets there. Any other config can be asked too; its cells
are made of its own values:

    python -m lightwam_jax.evaluation.ablations --config configs/libero.py:object \\
        --config.train.init=weights/wan21 --out runs/ablations_object
"""

from configs import base, demo
from lightwam_jax.encoders import base as encoders_base

CELLS = {
    "base": "as configured",
    "video_off": "no video loss",
    "pool_1": "video latents pooled 1x",
    "pool_2": "video latents pooled 2x",
    "pool_4": "video latents pooled 4x",
    "mean": "mean over tokens instead of learned queries",
    "concat": "tokens concatenated instead of learned queries",
    "anchored": "learned queries that start on tokens of their own, not summed up",
    "queries_1": "1 learned query",
    "queries_4": "4 learned queries",
    "queries_8": "8 learned queries",
    "queries_16": "16 learned queries",
    "queries_32": "32 learned queries",
    "flow_dit": "Fast-WAM's generative action head",
    "frozen": "the backbone stays as it begins",
    "adapters_off": "no adapters",
    "taps_1": "the action expert reads 1 layer",
    "taps_2": "the action expert reads 2 layers",
    "taps_3": "the action expert reads 3 layers",
    "taps_5": "the action expert reads 5 layers",
}
# Without --cells.
MAIN = ("base", "video_off", "pool_1", "pool_4", "mean", "concat", "queries_1", "flow_dit")
MAIN += ("anchored",)
LEARNS_BESIDE_BACKBONE = (r"^dit/adapters_", r"^dit/head/", r"^expert/", r"^proprio_encoder/")


def get_config(depth="shallow"):
    if depth not in ("shallow", "deep"):
        raise ValueError(f"configs/ablations.py:{depth}: expected shallow or deep")
    c = demo.get_config()
    c.name = "ablations"
    if depth == "deep":  # for --cells taps_1,taps_2,taps_3,taps_5
        c.model.num_layers, c.model.adapter_layers = 6, (1, 3, 5)
    c.train.checkpoint_every = 500
    c.train.keep_last = 0  # each is evaluated
    c.evaluation.episodes = 100
    return c


def cell(c, name):
    """Returns a copy of config `c` as cell `name` has it.

    Raises:
      ValueError: an unknown cell, or one that this config's model cannot have.
    """
    if name not in CELLS:
        raise ValueError(f"there is no cell {name!r}; expected some of {', '.join(CELLS)}")
    c = c.copy_and_resolve_references()
    kind, _, number = name.partition("_")
    if name == "video_off":
        c.loss.lambda_video = 0.0
    elif name == "flow_dit":
        c.model.action_head = name
        if c.model.dim == base.SMALL["dim"]:
            c.model.update(demo.FLOW)  # as many parameters as the other head
    elif name == "frozen":
        c.train.trainable = LEARNS_BESIDE_BACKBONE
    elif name == "adapters_off":
        c.model.adapter_scale = 0.0
    elif kind == "pool":
        c.loss.downsample = int(number)
    elif kind == "queries":
        c.model.pooling, c.model.num_queries = "learned_query", int(number)
    elif kind == "taps":
        c.model.adapter_layers = _taps(max(c.model.adapter_layers), int(number))
    elif name == "mean":
        c.model.pooling = "mean"
    elif name == "anchored":
        c.model.update(query_anchor=5.0, merge_dim=256, merge_slots=c.model.num_queries)
    elif name == "concat":
        c.model.pooling, c.model.num_queries = "concat", _groups(c.data)
    return c


def _taps(last, count):
    """`count` layers, evenly spaced, that end with `last`: 8, 16, 24 for 3 up to 24."""
    layers = tuple(round(last * (i + 1) / count) for i in range(count))
    if len(set(layers)) < count:
        raise ValueError(
            f"{count} layers up to layer {last} cannot be read; this model is not "
            "deep enough (configs/ablations.py:deep is)"
        )
    return layers


def _groups(data):
    """As many groups as the canvas has tokens, or at most 32 of them, of equal size."""
    side = 2 * encoders_base.STRIDES[data.codec]
    tokens = data.canvas[0] // side * (data.canvas[1] // side)
    return max(n for n in range(1, 33) if tokens % n == 0)
