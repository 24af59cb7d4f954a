"""The released Light-WAM checkpoint: `mot`, action expert, proprio encoder <-> our tree.

Also that of Fast-WAM, whose action expert is in `mot`, beside the video transformer.
"""

import dataclasses
import re

from converters import wan_dit
from converters.rules import KERNEL, Rule, Untold, linear_rows, norm_rows, some_of
from lightwam_jax import config as config_lib
from lightwam_jax.models import variants
from lightwam_jax.models.action import SOURCES

SECTIONS = ("mot", "state_fusion_action_expert", "proprio_encoder")  # of the release's file
MOT_PREFIX = "mixtures.video."
ACTION_PREFIX = "mixtures.action."
EXPERT_SECTION = "state_fusion_action_expert"


def _norm_mlp(source, target, names=("norm", "fc1", "fc2")):
    norm, fc1, fc2 = names
    return [
        *norm_rows(f"{source}{norm}", f"{target}/norm"),
        *linear_rows(f"{source}{fc1}", f"{target}/fc1"),
        *linear_rows(f"{source}{fc2}", f"{target}/fc2"),
    ]


_POOLER, _OURS = "layer_poolers.{i}.{source}", "expert/poolers_{i}_{source}"
EXPERT = (
    Rule(f"{_POOLER}.query_tokens", f"{_OURS}/query_tokens"),
    Rule(f"{_POOLER}.query_merge_logits", f"{_OURS}/query_merge_logits"),
    Rule(f"{_POOLER}.query_slot_merge_logits", f"{_OURS}/query_slot_merge_logits"),
    *norm_rows(f"{_POOLER}.token_norm", f"{_OURS}/token_norm"),
    *norm_rows(f"{_POOLER}.output_norm", f"{_OURS}/output_norm"),
    Rule(f"{_POOLER}.attn.in_proj_weight", f"{_OURS}/in_proj/kernel", KERNEL),
    Rule(f"{_POOLER}.attn.in_proj_bias", f"{_OURS}/in_proj/bias"),
    *linear_rows(f"{_POOLER}.attn.out_proj", f"{_OURS}/out_proj"),
    *norm_rows(f"{_POOLER}.query_merge_projector.0", f"{_OURS}/merge_norm"),
    *linear_rows(f"{_POOLER}.query_merge_projector.1", f"{_OURS}/merge_proj"),
    *_norm_mlp("layer_compressors.{i}.", "expert/compressors_{i}"),
    *norm_rows("fused_norm", "expert/fused_norm"),
    *linear_rows("fused_proj", "expert/fused_proj"),
    *_norm_mlp("trunk.{i}.", "expert/trunk_{i}"),
    *_norm_mlp("step_pos_proj.", "expert/step_pos", ("0", "1", "3")),
    *_norm_mlp("output", "expert/output", ("_norm", ".0", ".2")),
)
PROPRIO = tuple(linear_rows("proprio_encoder", "proprio_encoder"))


def _prefixed(rules, prefix):
    return tuple(Rule(prefix + rule.source, rule.target, rule.transform) for rule in rules)


# One flat key space: the checkpoint's sections become prefixes.
CHECKPOINT = (
    *_prefixed(wan_dit.RULES, f"mot.{MOT_PREFIX}"),
    *_prefixed(wan_dit.ACTION, f"mot.{ACTION_PREFIX}"),
    *_prefixed(EXPERT, f"{EXPERT_SECTION}."),
    *PROPRIO,
)
# torch's named_parameters() of the training module, as gradient files name them.
TRAINING = (
    *_prefixed(wan_dit.RULES, "video_expert."),
    *_prefixed(EXPERT, "state_fusion_action_expert."),
    *PROPRIO,
)


def flatten_checkpoint(checkpoint):
    """{"mot": {...}, "state_fusion_action_expert": {...}, "proprio_encoder": {...}, "step", ...}
    -> ({flat key: tensor}, {the rest}).

    The legacy layout with a top-level "dit" (keys without prefix) is read as "mot". A file of
    Fast-WAM has no "state_fusion_action_expert".

    Raises:
      ValueError: a section is missing.
    """
    sections = {name: dict(checkpoint.get(name, {})) for name in SECTIONS}
    if not sections["mot"] and "dit" in checkpoint:
        sections["mot"] = {MOT_PREFIX + key: value for key, value in checkpoint["dit"].items()}
    if any(key.startswith(ACTION_PREFIX) for key in sections["mot"]):
        del sections[EXPERT_SECTION]
    empty = [name for name, section in sections.items() if not section]
    if empty:
        raise ValueError(
            f"section {', '.join(empty)} is missing; top level has "
            f"{some_of(map(str, checkpoint))}: is this a Light-WAM checkpoint?"
        )
    flat = {f"{name}.{key}": x for name, section in sections.items() for key, x in section.items()}
    return flat, {key: value for key, value in checkpoint.items() if key not in (*SECTIONS, "dit")}


def unflatten_checkpoint(flat, rest):
    """The inverse of `flatten_checkpoint`, current layout."""
    checkpoint = {name: {} for name in SECTIONS}
    for key, value in flat.items():
        section, name = key.split(".", 1)
        checkpoint[section][name] = value
    return {name: section for name, section in checkpoint.items() if section} | rest


def model_config(
    shapes,
    *,
    head_dim=None,
    pool_heads=None,
    lora_alpha=None,
    adapter_scale=1.0,
    attention_mask="first_frame_causal",
    sources=(),
    dtype="float32",
):
    """The `ModelConfig` of a Light-WAM checkpoint, read from its keys and shapes.

    Args:
      shapes: {flat key: shape}, in file order, which tells the order of pooled
        sources; safetensors files keep none, so give `sources` where a layer pools several.
      head_dim, pool_heads, lora_alpha, adapter_scale, attention_mask, sources: what shapes cannot
        tell; None takes the release's value (128, 8, twice the rank). `sources` (per layer, or
        one for all) is needed for mean pooling only.

    Raises:
      ValueError: a missing key, or a width that does not divide into the heads.
    """
    dit = _under(shapes, f"mot.{MOT_PREFIX}")
    expert = _under(shapes, f"{EXPERT_SECTION}.")
    if untold := _untold(dit, expert, head_dim, pool_heads, sources):
        raise Untold("; ".join(untold))  # all at once
    fields = wan_dit.model_fields(dit, head_dim)
    if action := _under(shapes, f"mot.{ACTION_PREFIX}"):
        fields.update(wan_dit.action_fields(action))
    else:
        fields.update(expert_fields(expert, fields["dim"], pool_heads, sources))
    if "proprio_encoder.weight" not in shapes:
        raise ValueError("key proprio_encoder.weight is missing")
    fields.update(
        proprio_dim=shapes["proprio_encoder.weight"][1],
        lora_alpha=float(lora_alpha or 2 * fields["lora_rank"] or 1),
        adapter_scale=adapter_scale,
        attention_mask=attention_mask,
        dtype=dtype,
    )
    made = config_lib.model_variant("wan21_1_3b", **fields)
    named = (n for n in variants.VARIANTS if _sizes(config_lib.model_variant(n)) == _sizes(made))
    return dataclasses.replace(made, variant=next(named, "custom"))


def _sizes(config):
    return {key: x for key, x in dataclasses.asdict(config).items() if key not in _NOT_SIZES}


# Keys that two models of one variant may differ in.
_NOT_SIZES = {"variant", "action_dim", "proprio_dim", "dtype", "frozen_dtype", "layer_sources"}
_NOT_SIZES |= {"sources", "flow_dim", "flow_ffn_dim"}


def _under(shapes, prefix):
    """The entries whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in shapes.items() if key.startswith(prefix)}


def _untold(dit, expert, head_dim, pool_heads, sources):
    """What to pass besides, each with its reason; of a file that lacks keys what they tell."""
    query = dit.get("blocks.0.self_attn.q.weight", (0,))[0]
    found, dim = [wan_dit.untold_heads(query, head_dim)], dit.get("patch_embedding.weight", (0,))[0]
    layers = _numbers(expert, "layer_compressors")
    if layers and dim and all(f"layer_compressors.{i}.norm.weight" in expert for i in layers):
        pooled = bool(_pooled_sources(expert, layers)[0])
        found.append(_untold_heads(dim, pool_heads) if pooled else "")
        found.append("" if pooled else _untold_sources(expert, layers, dim, sources))
    return [text for text in found if text]


def _untold_heads(dim, pool_heads):
    heads = pool_heads or 8
    if not dim % heads:
        return ""
    return (
        f"pooling width {dim} is not a multiple of {heads} heads; the file does not tell the "
        "heads: pass --pool_heads"
    )


def _untold_sources(expert, layers, dim, sources):
    counts = _source_counts(expert, layers, dim)
    if all(_given(sources, i) or count == len(SOURCES) for i, count in enumerate(counts)):
        return ""
    return (
        f"mean pooling over {counts} sources per layer: the file does not tell which; pass "
        f"--sources with names of {SOURCES}"
    )


def _source_counts(expert, layers, dim):
    return [expert[f"layer_compressors.{i}.norm.weight"][0] // dim for i in layers]


def expert_fields(expert, dim, pool_heads=None, sources=()):
    """Fields of a `ModelConfig` that the action expert's keys and shapes tell."""
    layers = _numbers(expert, "layer_compressors")
    if not layers:
        raise ValueError(
            "key layer_compressors.0.norm.weight is missing; is this an action expert?"
        )
    pooled = _pooled_sources(expert, layers)
    if pooled[0]:
        pooling = _query_fields(expert, f"layer_poolers.0.{pooled[0][0]}", dim, pool_heads)
    else:
        pooling = dict(pooling="mean", num_queries=1, merge_dim=0, merge_slots=2)
        pooling["pool_heads"] = pool_heads or 8
        pooled = _mean_sources(expert, layers, dim, sources)
    chosen = tuple(_given(sources, i) or names for i, names in zip(layers, pooled))
    return dict(
        **pooling,
        trunk_blocks=len(_numbers(expert, "trunk")),
        sources=chosen[0],
        layer_sources=() if len(set(chosen)) == 1 else chosen,
        per_layer_dim=expert["layer_compressors.0.fc1.weight"][0],
        trunk_dim=expert["fused_proj.weight"][0],
        step_pos_dim=expert["step_pos_proj.0.weight"][0],
        action_dim=expert["output.2.weight"][0],
    )


def _pooled_sources(expert, layers):
    """The sources that each layer has a pooler for, in the order of the file."""
    found = {i: {} for i in layers}
    for key in expert:
        if (match := re.match(r"layer_poolers\.(\d+)\.(\w+)\.", key)) and int(match[1]) in found:
            found[int(match[1])][match[2]] = True
    return [tuple(names) for names in found.values()]


def _query_fields(expert, pooler, dim, pool_heads):
    """Fields of learned-query pooling, from the keys under `pooler`."""
    if untold := _untold_heads(dim, pool_heads):
        raise Untold(untold)
    return dict(
        pooling="learned_query",
        num_queries=expert[f"{pooler}.query_tokens"][0],
        pool_heads=pool_heads or 8,
        merge_slots=expert.get(f"{pooler}.query_slot_merge_logits", (2,))[0],
        merge_dim=expert.get(f"{pooler}.query_merge_projector.1.weight", (0,))[0],
    )


def _mean_sources(expert, layers, dim, sources):
    """The sources of each layer of mean pooling, where the widths leave no choice; else ()."""
    if untold := _untold_sources(expert, layers, dim, sources):
        raise Untold(untold)
    counts = _source_counts(expert, layers, dim)
    return [SOURCES if count == len(SOURCES) else () for count in counts]


def _numbers(keys, prefix):
    """The numbers n of keys `prefix.n.…`, ascending."""
    return sorted({int(m[1]) for key in keys if (m := re.match(rf"{prefix}\.(\d+)\.", key))})


def _given(sources, i):
    """The i-th layer's sources from a per-layer or a single specification."""
    if not sources:
        return ()
    return tuple(sources[i]) if isinstance(sources[0], (list, tuple)) else tuple(sources)
