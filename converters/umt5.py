"""The umT5 encoder: the Wan file (`models_t5_umt5-xxl-enc-bf16.pth`), Hugging Face's, ours."""

import hashlib
import re

from converters.rules import KERNEL, Rule

_NAMES = (  # our name, theirs in the Wan file and in Hugging Face's; after "block": of a block
    ("token_embedding", "token_embedding.weight", "shared.weight"),
    ("norm", "norm.weight", "encoder.final_layer_norm.weight"),
    ("block", "blocks.{block}.", "encoder.block.{block}."),
    ("norm1", "norm1.weight", "layer.0.layer_norm.weight"),
    ("norm2", "norm2.weight", "layer.1.layer_norm.weight"),
    (
        "pos_embedding",
        "pos_embedding.embedding.weight",
        "layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("attn/q", "attn.q.weight", "layer.0.SelfAttention.q.weight"),
    ("attn/k", "attn.k.weight", "layer.0.SelfAttention.k.weight"),
    ("attn/v", "attn.v.weight", "layer.0.SelfAttention.v.weight"),
    ("attn/o", "attn.o.weight", "layer.0.SelfAttention.o.weight"),
    ("ffn/gate_0", "ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    ("ffn/fc1", "ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn/fc2", "ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
)


# Hugging Face models list the token table twice; their files hold it under one name or both.
TIED = ("shared.weight", "encoder.embed_tokens.weight")


def _table(column):
    """Rows of `models.t5.UMT5Encoder` for one column of `_NAMES`."""
    names = {row[0]: row[column] for row in _NAMES}
    rows = [
        Rule(names["token_embedding"], "token_embedding/embedding"),
        Rule(names["norm"], "norm/scale"),
    ]
    for part, source in names.items():
        source = names["block"] + source
        if part in ("norm1", "norm2"):
            rows.append(Rule(source, f"blocks/{part}/scale"))
        elif part == "pos_embedding":
            rows.append(Rule(source, "blocks/pos_embedding/embedding"))
        elif part.startswith(("attn", "ffn")):
            rows.append(Rule(source, f"blocks/{part}/kernel", KERNEL))
    return tuple(rows)


OFFICIAL, HUGGINGFACE = _table(1), _table(2)


def model_fields(flat):
    """Fields of `UMT5Encoder` from the shapes of its parameters, {path: shape}."""
    vocab, dim = flat["token_embedding/embedding"]
    _, buckets, heads = flat["blocks/pos_embedding/embedding"]
    layers = max(shape[0] for path, shape in flat.items() if path.startswith("blocks/"))
    return dict(
        vocab=vocab,
        dim=dim,
        attention_dim=flat["blocks/attn/q/kernel"][-1],
        ffn_dim=flat["blocks/ffn/fc1/kernel"][-1],
        num_heads=heads,
        num_layers=layers,
        num_buckets=buckets,
    )


def cache_name(prompt, text_len, model):
    """Name of the file in which the reference keeps the embedding of a prompt.

    Args:
      model: where its encoder came from, such as "Wan-AI/Wan2.1-T2V-1.3B".
    """
    encoder = re.sub(r"[^a-z0-9]", "", model.split("/")[-1].lower()) or "textenc"
    return f"{hashlib.sha256(prompt.encode()).hexdigest()}.t5_len{text_len}.{encoder}.pt"
