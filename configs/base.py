"""Every key with its default: the released recipe's values where the paper gives one.

Other configs import this and change values; `docs/config.md` lists the keys with their meaning.
Not runnable by itself: `data.source` is empty. See `configs/demo.py` for the smallest real run.
"""

import ml_collections

from lightwam_jax import config

# The model of the demo and of every config that starts without pretrained weights.
SMALL = dict(
    dim=128,
    num_heads=4,
    head_dim=32,
    ffn_dim=256,
    num_layers=2,
    text_dim=64,
    freq_dim=64,
    latent_channels=32,
    lora_rank=0,
    lora_layers=(),
    lora_targets=(),
    adapter_layers=(0, 1),
    adapter_dim=32,
    num_queries=8,
    pool_heads=4,
    per_layer_dim=256,
    trunk_dim=384,
    step_pos_dim=64,
    query_init=1.0,  # at the release's 0.02, queries from scratch look everywhere for long
    gate_init=1.0,  # ... and at 0 the blocks' own contribution takes hundreds of steps to grow
    dtype="float32",
    frozen_dtype="float32",
)


def get_config(model="wan21_1_3b", **model_overrides):
    """The defaults of `lightwam_jax/config.py`, with the sizes of a table of models/variants.py."""
    return ml_collections.ConfigDict(config.defaults(model, **model_overrides))


def pretrained(**model):
    """The released model, which starts from Wan's weights (docs/weights.md)."""
    return get_config("wan21_1_3b", remat="linears", **model)


def from_scratch(**model):
    """A small model, backbone included, trained on the user's recordings alone.

    No weights are needed or downloaded: the PCA codec is fitted on the recordings, and words have
    fixed vectors. `model`: keys of `config.ModelConfig` over those of `SMALL`.
    """
    c = get_config("tiny", **SMALL | model)
    c.data.update(codec="pca", text_encoder="hashed", prompt_template="{task}")
    c.data.text_len = 32  # words of the longest instruction
    c.data.update(num_frames=17, frame_stride=2, action_horizon=16)

    c.loss.downsample = 2
    c.loss.lambda_video = 0.25  # from scratch, the actions must not wait for the video
    c.loss.prefix_steps = 8  # what is executed before the policy plans anew
    c.loss.tail_weight = 0.1
    c.evaluation.replan_steps = 8
    c.optimizer.update(lr=1e-3, warmup_steps=200, clip_norm=1.0, ema_decay=0.995)

    c.train.trainable = (".*",)  # nothing is pretrained, so everything learns
    c.train.update(steps=2000, batch_size=32, checkpoint_every=1000)
    c.train.update(eval_every=500, eval_batches=4)
    return c
