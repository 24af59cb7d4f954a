"""Sizes of the model variants: numbers only.

A table has every key of `config.ModelConfig` that has no default there; a config then overrides
what it wants. What the config prints is what is built: nothing is read from here later.
"""

ALL_LORA_TARGETS = (
    *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    *("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"),
    *("ffn.0", "ffn.2"),
)

# Wan2.1-T2V-1.3B with the released LoRA, adapters and action expert (docs/spec.md section 0).
WAN21_1_3B = dict(
    dim=1536,
    num_heads=12,
    head_dim=128,
    ffn_dim=8960,
    num_layers=30,
    text_dim=4096,
    freq_dim=256,
    latent_channels=16,
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
    flow_dim=1024,
    flow_ffn_dim=4096,
)
# Wan2.2-TI2V-5B. The paper has no such model: LoRA and what follows the pooling are those of the
# 1.3B; adapters and the number of pooling heads grow with the width, which is twice that.
WAN22_5B = dict(
    WAN21_1_3B,
    dim=3072,
    num_heads=24,
    ffn_dim=14336,
    latent_channels=48,
    adapter_dim=512,
    pool_heads=16,
)
# Smallest model with every part in it: tests and dry runs.
TINY = dict(
    dim=48,
    num_heads=2,
    head_dim=24,
    ffn_dim=96,
    num_layers=4,
    text_dim=32,
    freq_dim=32,
    latent_channels=16,
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
    flow_dim=32,
    flow_ffn_dim=64,
)
VARIANTS = {"wan21_1_3b": WAN21_1_3B, "wan22_5b": WAN22_5B, "tiny": TINY}
