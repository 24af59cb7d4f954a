"""The keys of config.model: what the network is. See `config.py`."""

import dataclasses
from typing import Literal

from lightwam_jax.models import variants

Source = Literal["backbone", "adapted", "delta"]
DType = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and dtypes. Keys without a default here have one per table of `models/variants.py`."""

    variant: str  # the table the sizes come from
    dim: int  # width of the backbone
    num_heads: int  # attention heads of a block
    head_dim: int  # width of a head
    ffn_dim: int  # width of the feed-forward layers
    num_layers: int  # blocks
    text_dim: int  # width of the text encoder's rows
    freq_dim: int  # width of the timestep's sinusoids
    latent_channels: int  # channels of the video latent
    eps: float = 1e-6  # of the backbone's norms
    # Which frames a video token sees: "first_frame_causal": all, but frame 0 only itself.
    attention_mask: Literal["first_frame_causal", "per_frame_causal", "bidirectional"] = (
        "first_frame_causal"
    )
    gate_init: float = 0.0  # mean of the blocks' gates at the start; 1: their output counts at once
    lora_rank: int  # 0: no LoRA
    lora_alpha: float  # what LoRA adds is scaled by lora_alpha / lora_rank
    lora_layers: tuple[int, ...]  # blocks with LoRA
    lora_targets: tuple[str, ...] = variants.ALL_LORA_TARGETS  # linear layers with LoRA
    adapter_layers: tuple[int, ...]  # blocks followed by an adapter; the action expert reads there
    adapter_dim: int  # width of the adapters' bottleneck
    adapter_scale: float = 1.0  # factor of what the adapters add
    # How the action expert reads the tokens; "concat" joins the means of num_queries groups.
    pooling: Literal["learned_query", "mean", "concat"] = "learned_query"
    num_queries: int  # learned queries per state that is read; of "concat": groups
    query_init: float = 0.02  # deviation of the learned queries at the start, as released
    pool_heads: int  # attention heads of the learned queries
    merge_dim: int = 0  # width of the merged query slots; 0: one softmax-weighted sum over queries
    merge_slots: int = 2  # merged query slots; only with merge_dim
    query_anchor: float = 0.0  # logit by which a query starts on tokens of its own; 0: as released
    sources: tuple[Source, ...] = ("adapted",)  # which states the action expert reads
    layer_sources: tuple[tuple[Source, ...], ...] = ()  # per adapter layer; (): `sources` for all
    per_layer_dim: int  # width of the summary of one adapter layer
    trunk_dim: int  # width of the action expert's trunk
    trunk_blocks: int = 1  # residual blocks of the trunk
    step_pos_dim: int  # width of the sinusoids that number the steps of the action chunk
    # How actions are made: "state_fusion", the paper's, in one pass from what the adapter layers
    # hold; "flow_dit", Fast-WAM's, denoised by a transformer of their own over all blocks' keys.
    action_head: Literal["state_fusion", "flow_dit"] = "state_fusion"
    flow_dim: int  # of "flow_dit": width of its transformer
    flow_ffn_dim: int  # ... and of its feed-forward layers
    flow_steps: int = 10  # ... steps from noise to actions
    flow_shift: float = 5.0  # ... of its schedule, in training and in use
    # ... how it starts: "from_video" makes its blocks of the video transformer's, as Fast-WAM does.
    flow_init: Literal["random", "from_video"] = "random"
    # ... which frames its actions read: the current one, or all of the clip ("joint"), which then
    # is imagined beside the actions, step by step.
    flow_reads: Literal["first_frame", "all_frames"] = "first_frame"
    # ... the noise of a plan: each its own, or Fast-WAM's one for all plans.
    flow_noise: Literal["fresh", "constant"] = "fresh"
    action_dim: int = 7  # width of an action
    proprio_dim: int = 8  # width of the robot's state
    dtype: DType = "bfloat16"  # compute
    # Storage of parameters that do not learn. "int8": kernels of the blocks' linears, with a scale
    # per output channel, in half the memory of bfloat16; the rest is bfloat16 then.
    frozen_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    # "cudnn": NVIDIA, bfloat16 only; "auto": that where it can be, else "xla".
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    # What the backward pass computes again: nothing; all but what linears and attention give
    # ("linears"); all but the matrix products of linears ("dots"), which keeps more; or everything.
    remat: Literal["none", "linears", "dots", "full"] = "none"
    scan_unroll: int = 1  # blocks per loop iteration; large: fully unrolled

    @property
    def generates(self):
        """Whether actions are denoised, rather than regressed in one pass."""
        return self.action_head == "flow_dit"

    @property
    def imagines(self):
        """Whether a plan needs the future frames, denoised together with the actions."""
        return self.generates and self.flow_reads == "all_frames"

    @property
    def attends(self):
        """Whether learned queries read the tokens, so that their attention can be shown."""
        return not self.generates and self.pooling == "learned_query"
