"""Kernels as int8 with a scale per output channel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import params as params_lib
from lightwam_jax.models import layers, lora, quantized


def kernel(*shape):
    """Normal values; channels differ in size, and one is zero."""
    values = np.random.default_rng(0).normal(size=shape) * 10.0 ** np.linspace(-3, 1, shape[-1])
    values[..., 2] = 0
    return jnp.float32(values)


def test_no_weight_moves_by_more_than_half_a_step_of_its_channel():
    w = kernel(3, 40, 7)
    int8, scale = quantized.quantize(w)
    assert int8.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == (3, 7)
    back = quantized.dequantized({"kernel": int8, quantized.SCALE: scale})
    assert list(back) == ["kernel"] and back["kernel"].dtype == jnp.float32
    largest = np.abs(w).max(axis=1)
    error = np.abs(back["kernel"] - w).max(axis=1)
    assert (error <= largest / 127 * 0.5001).all() and error[0, 0] > largest[0, 0] / 127 * 0.4
    np.testing.assert_allclose(np.abs(back["kernel"]).max(axis=1), largest, rtol=1e-6)
    assert (np.abs(int8.astype(np.int32)).max(axis=1)[:, [0, 1, 3, 6]] == 127).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_multiplies_by_what_the_integers_stand_for(dtype):
    """In bfloat16 the error is that of x and of what comes out, as if the kernel were float32."""
    rng = np.random.default_rng(1)
    x, bias = jnp.asarray(rng.normal(size=(2, 5, 40)), dtype), jnp.float32(rng.normal(size=7))
    int8, scale = quantized.quantize(kernel(40, 7))
    held = {"kernel": int8, quantized.SCALE: scale, "bias": bias}
    got = layers.Linear(7, jnp.dtype(dtype)).apply({"params": held}, x)
    whole = quantized.dequantized(held)
    want = layers.Linear(7).apply({"params": whole}, x.astype(jnp.float32))
    assert got.dtype == dtype and got.shape == (2, 5, 7)
    size = np.abs(want - bias) + np.abs(want)
    sums = 1e-6 * np.abs(want - bias).max(axis=(0, 1))  # of float32
    assert (np.abs(got - want) <= sums + size * (2.0**-8 if dtype == "bfloat16" else 1e-6)).all()


def test_only_kernels_of_the_blocks_become_int8():
    linear = lambda *sizes: {"kernel": kernel(*sizes), "bias": jnp.ones(sizes[:-2] + sizes[-1:])}
    block = {"ffn": {"0": linear(2, 8, 6)}, "modulation": jnp.ones((2, 1, 6, 8))}
    frozen = {"dit": {"blocks_0": block, "blocks": block, "text_embedding_0": linear(8, 6)}}
    old, new = (params_lib.flatten(quantized.stored(frozen, d)) for d in ("float32", "int8"))
    int8 = {path for path, x in new.items() if x.dtype == jnp.int8}
    scales = {path for path, x in new.items() if x.dtype == jnp.float32}
    assert int8 == {"dit/blocks_0/ffn/0/kernel", "dit/blocks/ffn/0/kernel"}
    assert scales == {path + "_scale" for path in int8} == set(new) - set(old)
    assert {x.dtype for path, x in new.items() if path not in int8 | scales} == {
        jnp.dtype("bfloat16")
    }
    assert all(new[path].shape == x.shape for path, x in old.items())
    assert params_lib.count(params_lib.unflatten(new)) == params_lib.count(frozen)
    table = [params_lib.count_table(x, ["bias"]) for x in (frozen, params_lib.unflatten(new))]
    assert table[0] == table[1]


def test_where_no_kernel_of_a_block_is_frozen_int8_is_refused():
    frozen = {
        "dit": {"blocks_0": {"norm3": {"scale": jnp.ones(3)}}, "head": {"kernel": kernel(4, 6)}}
    }
    with pytest.raises(
        ValueError, match=r"frozen_dtype='int8'.*config.train.trainable leaves none"
    ):
        quantized.stored(frozen, "int8")


def test_lora_is_merged_into_what_the_integers_stand_for():
    rng = np.random.default_rng(2)
    linear = {"kernel": kernel(2, 8, 6), "bias": jnp.ones((2, 6))}
    low = {"lora_a": jnp.float32(rng.normal(size=(2, 8, 3))),
           "lora_b": jnp.float32(rng.normal(size=(2, 3, 6)))}  # fmt: skip
    other = {"q": linear | {quantized.SCALE: None}, "k": linear}
    held = quantized.quantized_like({"q": linear, "k": linear}, other)
    assert held["k"]["kernel"] is linear["kernel"]
    merged = lora.merge_lora({"with": held["q"] | low, "without": held["q"]}, alpha=6.0)
    want = quantized.dequantized(held["q"])["kernel"]
    np.testing.assert_array_equal(merged["without"]["kernel"], want)
    with_lora = want + 2 * jnp.matmul(low["lora_a"], low["lora_b"])
    np.testing.assert_allclose(merged["with"]["kernel"], with_lora, rtol=1e-5, atol=1e-5)
    assert {name: sorted(x) for name, x in merged.items()} == {
        "with": ["bias", "kernel"], "without": ["bias", "kernel"]}  # fmt: skip
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, merged))
