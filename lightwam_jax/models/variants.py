"""Size tables: one dictionary of numbers per model variant.

A variant fills every key of the `model` section of a config (`configs/base.py`); a config then
overrides what it wants. What the config prints is what is built: nothing is read from here later.
"""

ALL_LORA_TARGETS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
)

_SHARED = dict(
    latent_channels=16,  # channels of the video latent
    eps=1e-6,  # norms of the backbone
    attention_mask="first_frame_causal",  # | "bidirectional" | "per_frame_causal"
    gate_init=0.0,  # mean of the blocks' gates at the start; 1: residual branches count at once
    lora_targets=ALL_LORA_TARGETS,
    adapter_scale=1.0,
    pooling="learned_query",  # | "mean" | "concat" (of num_queries groups of neighbouring tokens)
    merge_dim=0,  # width of the merged query slots; 0: one softmax-weighted sum over queries
    merge_slots=2,
    query_init=0.02,  # deviation of the learned queries at the start, as released
    sources=("adapted",),  # of "backbone", "adapted", "delta"
    layer_sources=(),  # one such tuple per adapter layer; (): `sources` for all
    trunk_blocks=1,
    action_dim=7,
    proprio_dim=8,
    dtype="bfloat16",  # compute
    frozen_dtype="bfloat16",  # storage of parameters that do not learn
    attention="xla",  # | "cudnn" (NVIDIA, bfloat16 only)
    remat="none",  # | "full" | "dots"
    scan_unroll=1,  # blocks per loop iteration; large: fully unrolled
)

VARIANTS = {
    # Wan2.1-T2V-1.3B with the released LoRA, adapters and action expert (SPEC section 0).
    "wan21_1_3b": dict(
        _SHARED,
        dim=1536,
        num_heads=12,
        head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        text_dim=4096,
        freq_dim=256,
        lora_rank=64,
        lora_alpha=128.0,
        lora_layers=tuple(range(30)),
        adapter_layers=(8, 16, 24),
        adapter_dim=256,
        num_queries=16,
        pool_heads=8,
        per_layer_dim=4608,
        trunk_dim=6144,
        step_pos_dim=256,
    ),
    # Wan2.2-TI2V-5B. The paper has no such model: LoRA and what follows the pooling are those of
    # the 1.3B; adapters and the number of pooling heads grow with the width, which is twice that.
    "wan22_5b": dict(
        _SHARED,
        dim=3072,
        num_heads=24,
        head_dim=128,
        ffn_dim=14336,
        num_layers=30,
        text_dim=4096,
        freq_dim=256,
        latent_channels=48,
        lora_rank=64,
        lora_alpha=128.0,
        lora_layers=tuple(range(30)),
        adapter_layers=(8, 16, 24),
        adapter_dim=512,
        num_queries=16,
        pool_heads=16,
        per_layer_dim=4608,
        trunk_dim=6144,
        step_pos_dim=256,
    ),
    # Smallest model with every part in it: tests and dry runs.
    "tiny": dict(
        _SHARED,
        dim=48,
        num_heads=2,
        head_dim=24,
        ffn_dim=96,
        num_layers=4,
        text_dim=32,
        freq_dim=32,
        lora_rank=4,
        lora_alpha=8.0,
        lora_layers=tuple(range(4)),
        adapter_layers=(0, 1, 2),
        adapter_dim=16,
        num_queries=4,
        pool_heads=2,
        per_layer_dim=32,
        trunk_dim=48,
        step_pos_dim=16,
    ),
}


def variant(name, **overrides):
    """Returns the `model` section of a config: the numbers of variant `name` with `overrides`.

    Raises:
      KeyError: unknown variant or unknown override.
    """
    if name not in VARIANTS:
        raise KeyError(f"model variant {name!r} is unknown; expected one of {sorted(VARIANTS)}")
    table = dict(VARIANTS[name])
    unknown = sorted(set(overrides) - set(table))
    if unknown:
        raise KeyError(
            f"model override {unknown} is not a field of variant {name!r}; fields: {sorted(table)}"
        )
    return {"variant": name, **table, **overrides}
