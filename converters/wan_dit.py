"""The Wan video transformer's table: keys of a file <-> our paths, LoRA and adapters included."""

from converters.rules import KERNEL, Rule, Transform, Untold, linear_rows, norm_rows, some_of

# Conv3d [D, C, 1, 2, 2] <-> linear over a flattened patch (row, column, channel) [4C, D].
PATCH = Transform(
    lambda w: w[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
    lambda k: k.reshape(2, 2, -1, k.shape[-1]).transpose(3, 2, 0, 1)[:, :, None],
)
# Our name (official dots as underscores), theirs in the Wan files and in diffusers' folders. The
# official time_projection is Sequential(SiLU, Linear); text and time embeddings hold 0 and 2.
_NAMES = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("text_embedding_0", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding_2", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding_0", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding_2", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection", "time_projection.1", "condition_embedder.time_proj"),
    ("head/modulation", "head.modulation", "scale_shift_table"),
    ("head/head", "head.head", "proj_out"),
    ("modulation", "modulation", "scale_shift_table"),  # from here on: of a block
    ("self_attn", "self_attn", "attn1"),
    ("cross_attn", "cross_attn", "attn2"),
    ("q", "q", "to_q"),
    ("k", "k", "to_k"),
    ("v", "v", "to_v"),
    ("o", "o", "to_out.0"),
    ("norm3", "norm3", "norm2"),
    ("ffn/0", "ffn.0", "ffn.net.0.proj"),
    ("ffn/2", "ffn.2", "ffn.net.2"),
)


def _base(column):
    """Rows of the transformer without LoRA and adapters, for one column of `_NAMES`."""
    names = {row[0]: row[column] for row in _NAMES}
    return (
        *linear_rows(names["patch_embedding"], "dit/patch_embedding", PATCH),
        Rule(names["head/modulation"], "dit/head/modulation"),
        *linear_rows(names["head/head"], "dit/head/head"),
        *_stream(names, "dit"),
    )


def _stream(names, target):
    """Rows of what a stream of tokens is made of: embeddings of time and context, and blocks."""
    rows = linear_rows(names["time_projection"], f"{target}/time_projection")
    for ours in ("text_embedding_0", "text_embedding_2", "time_embedding_0", "time_embedding_2"):
        rows += linear_rows(names[ours], f"{target}/{ours}")
    block, ours = "blocks.{block}", f"{target}/blocks"
    rows += [
        Rule(f"{block}.{names['modulation']}", f"{ours}/modulation"),
        *norm_rows(f"{block}.{names['norm3']}", f"{ours}/norm3"),
    ]
    for layer in ("ffn/0", "ffn/2"):
        rows += linear_rows(f"{block}.{names[layer]}", f"{ours}/{layer}")
    for attention in ("self_attn", "cross_attn"):
        theirs = f"{block}.{names[attention]}"
        for p in "qkvo":
            rows += linear_rows(f"{theirs}.{names[p]}", f"{ours}/{attention}/{p}")
        rows += [
            Rule(f"{theirs}.norm_{p}.weight", f"{ours}/{attention}/norm_{p}/scale") for p in "qk"
        ]
    return rows


def _lora(source, target):
    """LoRA rows: stacked over the layers that have LoRA, field `lora`."""
    base, ours = f"blocks.{{lora}}.{source}", f"dit/blocks/{target}"
    return [
        Rule(f"{base}.down_proj.weight", f"{ours}/lora_a", KERNEL),
        Rule(f"{base}.up_proj.weight", f"{ours}/lora_b", KERNEL),
    ]


BASE, DIFFUSERS = _base(1), _base(2)

PEFT = (
    *(
        row
        for a in ("self_attn", "cross_attn")
        for p in "qkvo"
        for row in _lora(f"{a}.lora_{p}", f"{a}/{p}")
    ),
    *_lora("ffn_lora_in", "ffn/0"),
    *_lora("ffn_lora_out", "ffn/2"),
    *norm_rows("wam_adapters.{layer}.norm", "dit/adapters_{layer}/norm"),
    *linear_rows("wam_adapters.{layer}.down_proj", "dit/adapters_{layer}/down"),
    *linear_rows("wam_adapters.{layer}.up_proj", "dit/adapters_{layer}/up"),
)

RULES = BASE + PEFT

# Fast-WAM's stream of actions beside the video's: the same blocks, other ends.
ACTION = (
    *linear_rows("action_encoder", "expert/action_encoder"),
    *_stream({row[0]: row[1] for row in _NAMES}, "expert"),
    *linear_rows("head", "expert/head"),
)


def stacked_layers(num_layers, lora_layers):
    """The indices that the arrays of `RULES` are stacked over, for `rules.from_params`."""
    return {"block": range(num_layers), "lora": sorted(lora_layers)}


def model_fields(shapes, head_dim=None):
    """Fields of a `ModelConfig` that the keys and shapes of a DiT file tell.

    Args:
      shapes: {official key: shape}. head_dim: not in the shapes; None assumes Wan's 128.

    Raises:
      ValueError: a key is missing, or the width does not divide into heads.
    """

    def shape(key):
        if key not in shapes:
            raise ValueError(f"key {key} is missing; is this a Wan video transformer?")
        return shapes[key]

    blocks = sorted({int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")})
    if blocks != list(range(len(blocks))):
        raise ValueError(f"blocks {blocks} have gaps; the file is incomplete")
    needed = {rule.source.format(block=block) for rule in BASE for block in blocks}
    missing = needed - set(shapes)
    if missing:
        raise ValueError(f"missing keys: {some_of(missing)}")
    dim, channels = shape("patch_embedding.weight")[:2]
    width = shape("blocks.0.self_attn.q.weight")[0]
    if untold := untold_heads(width, head_dim):
        raise Untold(untold)
    head_dim = head_dim or 128
    fields = dict(
        dim=dim,
        latent_channels=channels,
        num_layers=len(blocks),
        head_dim=head_dim,
        num_heads=width // head_dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        text_dim=shape("text_embedding.0.weight")[1],
        freq_dim=shape("time_embedding.0.weight")[1],
    )
    return {**fields, **_peft_fields(shapes)}


def untold_heads(width, head_dim):
    """What to pass where a width does not divide into heads of `head_dim` (None: 128), or ""."""
    head_dim = head_dim or 128
    if not width % head_dim:
        return ""
    return (
        f"attention width {width} is not a multiple of the head dim {head_dim}; "
        "the file does not tell it: pass --head_dim"
    )


def action_fields(shapes):
    """Fields of a `ModelConfig` that the keys and shapes of Fast-WAM's action stream tell."""
    needed = ("action_encoder.weight", "blocks.0.ffn.0.weight")
    if missing := [key for key in needed if key not in shapes]:
        raise ValueError(f"missing keys of the action stream: {some_of(missing)}")
    dim, action_dim = shapes[needed[0]]
    return dict(
        action_head="flow_dit",
        action_dim=action_dim,
        flow_dim=dim,
        flow_ffn_dim=shapes[needed[1]][0],
    )


def _peft_fields(shapes):
    """LoRA and adapter fields; the scales alpha and adapter_scale are not in the shapes."""
    loras = {}  # target -> {layer: rank}
    for rule in PEFT:
        if not rule.target.endswith("/lora_a"):
            continue
        prefix, suffix = rule.source.split("{lora}")
        target = rule.target.removeprefix("dit/blocks/").removesuffix("/lora_a").replace("/", ".")
        for key, shape in shapes.items():
            if key.startswith(prefix) and key.endswith(suffix) and key.split(".")[1].isdigit():
                loras.setdefault(target, {})[int(key.split(".")[1])] = shape[0]
    adapters = {
        int(key.split(".")[1]): shape[0]
        for key, shape in shapes.items()
        if key.startswith("wam_adapters.") and key.endswith(".down_proj.weight")
    }
    ranks = {rank for layers in loras.values() for rank in layers.values()}
    layer_sets = {tuple(sorted(layers)) for layers in loras.values()}
    if len(ranks) > 1 or len(layer_sets) > 1 or len(set(adapters.values())) > 1:
        raise ValueError(
            f"LoRA ranks {sorted(ranks)} over layers {sorted(layer_sets)} and adapter "
            f"widths {sorted(set(adapters.values()))} are mixed; expected one of each"
        )
    return dict(
        lora_rank=ranks.pop() if ranks else 0,
        lora_targets=tuple(loras),
        lora_layers=layer_sets.pop() if layer_sets else (),
        adapter_layers=tuple(sorted(adapters)),
        adapter_dim=next(iter(adapters.values()), 0),
    )
