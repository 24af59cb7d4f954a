"""Names that tell an order or a file, by hand."""

import hashlib

import numpy as np

from converters import rules, umt5


def test_blocks_are_stacked_by_number_whatever_the_order_of_the_file():
    table = (rules.Rule("blocks.{block}.w", "blocks/w"),)
    tensors = {f"blocks.{i}.w": np.full(2, i, np.float32) for i in range(12)}
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        found = rules.to_params(table, {key: tensors[key] for key in order})
        np.testing.assert_array_equal(found["blocks/w"][:, 1], np.arange(12))


def test_the_references_name_of_an_embedding():
    name = umt5.cache_name("lift the cup", 128, "Wan-AI/Wan2.1-T2V-1.3B")
    digest = hashlib.sha256(b"lift the cup").hexdigest()
    assert name == f"{digest}.t5_len128.wan21t2v13b.pt"


def test_the_gate_of_the_feed_forward_is_wi_0_and_gate_0():
    for table, theirs in (
        (umt5.OFFICIAL, ("blocks.{block}.ffn.gate.0.weight", "blocks.{block}.ffn.fc1.weight")),
        (
            umt5.HUGGINGFACE,
            tuple(f"encoder.block.{{block}}.layer.1.DenseReluDense.wi_{i}.weight" for i in (0, 1)),
        ),
    ):
        source_of = {row.target: row.source for row in table}
        ours = ("blocks/ffn/gate_0/kernel", "blocks/ffn/fc1/kernel")
        assert tuple(source_of[path] for path in ours) == theirs
