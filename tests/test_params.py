"""Parameter trees by hand: who learns, the two layouts, counts, and what a mismatch says."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import params


def test_paths_and_trees_are_two_forms_of_one_thing():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert params.flatten(tree) == flat and params.unflatten(flat) == tree


def test_what_any_pattern_finds_learns_and_the_rest_is_frozen():
    tree = {"dit": {"q": {"kernel": 1, "lora_a": 2}, "head": {"kernel": 3}}, "expert": {"b": 4}}
    learns, frozen = params.partition(tree, (r"/lora_[ab]$", r"^dit/head/"))
    assert learns == {"dit": {"q": {"lora_a": 2}, "head": {"kernel": 3}}}
    assert frozen == {"dit": {"q": {"kernel": 1}}, "expert": {"b": 4}}
    assert params.merge(learns, frozen) == tree
    with pytest.raises(ValueError, match=r"given twice: \['expert/b'\]"):
        params.merge(tree, {"expert": {"b": 5}})
    with pytest.raises(ValueError, match=r"'\^head' matches no parameter"):
        params.partition(tree, (r"/lora_[ab]$", "^head"))


def config(num_layers, adapters, lora):
    return types.SimpleNamespace(num_layers=num_layers, adapter_layers=adapters, lora_layers=lora)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_blocks_and_their_lora_lie_in_order_in_both_layouts(xp):
    """Twelve blocks in runs 0-1, 2-9, 10-11: by number, not by name, in whatever order given."""
    stack = xp.arange(12.0)[:, None] * xp.ones(3)
    lora = xp.array([[10.0], [11.0]])
    rest = {"expert": {"blocks_2": {"w": xp.zeros(2)}}}  # not of the transformer
    runs = {
        "blocks_10": {"ffn": {"kernel": stack[10:], "lora_a": lora}},
        "blocks_0": {"ffn": {"kernel": stack[:2]}},
        "blocks_2": {"ffn": {"kernel": stack[2:10]}},
    }
    disk = {"dit": {"blocks": {"ffn": {"kernel": stack, "lora_a": lora}}}, **rest}
    memory = {"dit": runs, **rest}
    got = params.canonical(memory)
    assert isinstance(got["dit"]["blocks"]["ffn"]["kernel"], np.ndarray) == (xp is np)
    back = params.segmented(disk, config(12, (1,), (11, 10)))
    for a, b in ((got, disk), (back, memory), (params.canonical(back), disk)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_lora_of_scattered_layers_goes_to_its_own_blocks():
    disk = {"mu": {"dit": {"blocks": {"q": {"lora_b": np.array([1, 2, 4]), "bias": np.arange(6)}}}}}
    got = params.flatten(params.segmented(disk, config(6, (), (1, 2, 4))))
    assert {path: x.tolist() for path, x in got.items()} == {
        "mu/dit/blocks_0/q/bias": [0],
        "mu/dit/blocks_1/q/bias": [1, 2],
        "mu/dit/blocks_1/q/lora_b": [1, 2],
        "mu/dit/blocks_3/q/bias": [3],
        "mu/dit/blocks_4/q/bias": [4],
        "mu/dit/blocks_4/q/lora_b": [4],
        "mu/dit/blocks_5/q/bias": [5],
    }


def test_a_mismatch_is_told_leaf_by_leaf():
    leaf = lambda *shape: np.zeros(shape)
    with pytest.raises(ValueError) as error:
        params.check_same_structure(
            {"a": leaf(2), "b": leaf(3), "same": leaf(1)},
            {"b": leaf(4), "c": leaf(5), "same": leaf(1)},
            "the file",
        )
    lines = str(error.value).splitlines()
    assert lines[0].startswith("the file holds another model's parameters")
    assert lines[1:] == ["  - c (5,)", "  + a (2,)", "  ~ b: (3,), expected (4,)"]
    many = {f"{i:02}": leaf(1) for i in range(23)}
    with pytest.raises(ValueError, match=r"  - 19 \(1,\)\n  \.\.\. and 3 more$"):
        params.check_same_structure({}, many, "it")
    params.check_same_structure(many, many, "it")


def test_counts_by_group():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {
        "dit": {
            "blocks": {"q": {"kernel": leaf(2, 3), "lora_a": leaf(2, 1), "lora_b": leaf(1, 3)}},
            "adapters_8": {"up": {"bias": leaf(7)}},
            "head": {"modulation": leaf(1, 2, 5)},
        },
        "expert": {"w": leaf(11)},
        "proprio_encoder": {"w": leaf(13)},
        "more": leaf(),
    }
    assert params.count(tree) == 6 + 5 + 7 + 10 + 11 + 13 + 1
    assert params.count_table(tree, (r"/lora_[ab]$", "lora_a", "^expert/")) == [
        ("lora", 5, 5),
        ("adapters", 7, 0),
        ("video_head", 10, 0),
        ("backbone", 6, 0),
        ("action_expert", 11, 11),
        ("proprio_encoder", 13, 0),
        ("other", 1, 0),
        ("total", 53, 16),
    ]
