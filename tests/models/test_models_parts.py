"""Small parts of the models against numbers worked out by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import flow
from lightwam_jax.models import adapters, blocks, layers, lightwam, lora, t5


def test_rotary_angles_belong_to_frame_row_and_column_in_this_order():
    # 20 = 8 + 6 + 6: of the ten pairs, four turn with the frame, three each with row and column.
    for shape, turning in (
        ((2, 1, 1), range(4)),
        ((1, 2, 1), range(4, 7)),
        ((1, 1, 2), range(7, 10)),
    ):
        _, sines = layers.rope_table(*shape, 20)
        last = sines.reshape(-1, 10)[-1]
        assert np.flatnonzero(last).tolist() == list(turning)
        np.testing.assert_allclose(last[turning[0]], np.sin(1), rtol=1e-6)


def test_modulation_of_frame_0_ends_with_its_last_token():
    rows = jnp.array([[[1.0], [2.0]]])
    assert layers.per_token(rows, 3, 6)[0, :, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert layers.per_token(rows[:, :1], 1, 6).shape == (1, 1, 1)


def test_each_attention_mode_sees_the_frames_it_names():
    """Values are the numbers of their frames and all keys are alike: the output is a mean."""
    q = jnp.zeros((1, 6, 1, 2))
    v = jnp.repeat(jnp.arange(3.0), 2)[None, :, None, None] * jnp.ones((1, 6, 1, 2))
    for mode, means in (
        ("bidirectional", [1, 1, 1]),
        ("first_frame_causal", [0, 1, 1]),
        ("per_frame_causal", [0, 0.5, 1]),
    ):
        out = layers.frame_attention(q, q, v, 3, mode)[0, :, 0, 0]
        np.testing.assert_allclose(out, np.repeat(means, 2), atol=1e-6)


def test_gate_init_moves_the_two_gates_alone():
    key, shape = jax.random.key(0), (1, 6, 4)
    moved = blocks._modulation_init(1.0)(key, shape) - blocks._modulation_init(0.0)(key, shape)
    np.testing.assert_allclose(moved[0, :, 0], [0, 0, 1, 0, 0, 1], atol=1e-6)


def test_a_fresh_adapter_passes_everything_through():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)), jnp.float32)
    out, _ = adapters.Adapter(width=4).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)


def test_lora_starts_within_the_bound_of_its_inputs():
    made = lora.LoRALinear(3, rank=2).init(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    assert 0.045 < np.abs(made["lora_a"]).max() <= 0.05  # 1 / sqrt(400)


def test_merged_lora_is_scaled_by_alpha_over_rank():
    layer = {
        "kernel": jnp.ones((3, 4)),
        "bias": jnp.zeros(4),
        "lora_a": jnp.ones((3, 2)),
        "lora_b": jnp.ones((2, 4)),
    }
    # 1 + (1 + 1) * 5 / 2
    np.testing.assert_array_equal(lora.merge_lora(layer, 5.0)["kernel"], np.full((3, 4), 6.0))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 7), layer)
    merged = lora.merge_lora({"q": stacked}, 5.0)["q"]
    assert merged.keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(merged["kernel"], np.full((7, 3, 4), 6.0))


def test_the_state_is_seen_whatever_text_is_masked():
    stand_in = types.SimpleNamespace(
        dtype=jnp.float32,
        proprio_encoder=lambda proprio: proprio,
        dit=types.SimpleNamespace(
            embed_context=lambda rows: rows, keys_values=lambda rows, stop_after: rows
        ),
    )
    mask = jnp.array([[True, False]])
    rows, seen = lightwam.LightWAM.encode_context(
        stand_in, jnp.zeros((1, 2, 3)), jnp.ones((1, 3)), mask
    )
    assert seen.tolist() == [[True, False, True]]
    assert rows[0, :, 0].tolist() == [0, 0, 1]


def test_the_solver_starts_each_step_where_it_is():
    times, steps = flow.sampling_schedule(2, 3.0)  # 1/2 is moved to 3/2 / (1 + 2/2)
    np.testing.assert_allclose(times, [1000, 750], rtol=1e-6)
    np.testing.assert_allclose(steps, [-0.25, -0.75], rtol=1e-6)


def test_text_positions_tell_before_from_after():
    np.testing.assert_array_equal(t5.relative_buckets(3), [[0, 17, 18], [1, 0, 17], [2, 1, 0]])
