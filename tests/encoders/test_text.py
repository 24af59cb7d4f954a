"""Prompts, the hashed encoder, and the cache of text embeddings."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from lightwam_jax import encoders
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.encoders import text as text_lib

TEMPLATE = "A robot does: {task}"
FROZEN_RED = [
    -0.6075078,
    -0.0218091,
    0.8793629,
    -1.0420524,
    -1.6629938,
    0.9723138,
    0.4272711,
    0.4610235,
]


def test_prompt_fills_the_template():
    assert text_lib.prompt("  lift \n the  cup ", TEMPLATE) == "A robot does: lift the cup"
    assert text_lib.prompt("use {braces}", TEMPLATE) == "A robot does: use {braces}"
    with pytest.raises(ValueError, match=r"has no '{task}'"):
        text_lib.prompt("lift", "A robot acts")


@pytest.mark.parametrize("mode", text_lib.CLEANING)
def test_cleaning_is_the_references(golden, mode):
    cases = json.loads((golden / "g_text" / "cleaning.json").read_text(encoding="utf-8"))["cases"]
    assert {case["raw"]: text_lib.clean(case["raw"], mode) for case in cases} == {
        case["raw"]: case[mode] for case in cases
    }
    assert text_lib.clean("Pick&amp;amp;up ") == "Pick&up"
    with pytest.raises(ValueError, match="mode 'upper' is unknown; expected one of"):
        text_lib.clean("x", "upper")


def test_hashed_rows_share_one_amplitude_and_end_in_zeros():
    encoder = text_lib.HashedTextEncoder(512)
    context, mask = encoder.encode(["put the red cube in the bowl", "Stop"], 10)
    assert context.shape == (2, 10, 512) and context.dtype == np.float32
    np.testing.assert_array_equal(mask.sum(1), [7, 1])
    np.testing.assert_array_equal(context[~mask], 0)
    np.testing.assert_allclose(context[mask].std(1), 4, atol=0.6)
    np.testing.assert_allclose(context[mask].mean(1), 0, atol=0.6)


def test_hashed_vectors_never_change():
    """A checkpoint relies on them: these numbers are part of its format."""
    row = text_lib.HashedTextEncoder(8).encode(["red"], 1)[0][0, 0]
    np.testing.assert_allclose(row, 4 * np.array(FROZEN_RED), rtol=1e-5)


def test_words_and_their_order_matter():
    encoder = text_lib.HashedTextEncoder(256)
    prompts = [
        f"the {first} cube in the {second} bowl"
        for first, second in (("red", "blue"), ("blue", "blue"), ("blue", "red"))
    ]
    (red, blue, swapped), _ = encoder.encode(prompts, 8)
    assert not np.allclose(red[1], blue[1])
    np.testing.assert_array_equal(red[2], blue[2])
    order = [np.sort((rows[:7] @ rows[0]).round(3)) for rows in (red, swapped)]
    assert not np.allclose(*order), "a bag of words cannot tell the two apart"
    again = text_lib.HashedTextEncoder(256).encode(["The RED cube in the blue bowl!"], 8)[0][0]
    np.testing.assert_array_equal(again, red)


def test_too_long_and_empty_prompts():
    encoder = text_lib.HashedTextEncoder(8)
    with pytest.raises(ValueError, match=r"has 3 words; expected 1 to config.data.text_len=2"):
        encoder.encode(["one two three"], 2)
    with pytest.raises(ValueError, match="has 0 words"):
        encoder.encode(["!"], 2)
    context, mask = encoder.encode(["", "go"], 2)
    assert not context[0].any() and not mask[0].any() and mask[1].tolist() == [True, False]
    with pytest.raises(ValueError, match="'umt6' has no encoder here; known encoders"):
        encoders.make_text_encoder("umt6", 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("cache") / "text")
    prompts = ["lift the cup", "stop"]
    text_cache.write_cache(
        directory, text_lib.HashedTextEncoder(16), prompts, 8, "hashed", TEMPLATE
    )
    return directory


def test_cache_returns_what_the_encoder_said(cache):
    encoder = text_lib.HashedTextEncoder(16)
    stored = text_cache.TextCache(cache)
    assert stored.prompts == ("lift the cup", "stop") and stored.encoder_id == encoder.id
    context, mask = stored.table(["stop", "lift the cup"], 5)
    want, want_mask = encoder.encode(["stop", "lift the cup"], 5)
    assert context.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(context, want.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(mask, want_mask)


def test_a_cache_without_prompts_asks_the_encoder(tmp_path):
    encoder = text_lib.HashedTextEncoder(16)
    text_cache.write_cache(str(tmp_path / "text"), encoder, [], 8, "hashed", TEMPLATE)
    empty = text_cache.TextCache(str(tmp_path / "text"))
    context, mask = text_lib.CachedTextEncoder(encoder, empty).encode(["stop"], 8)
    assert empty.prompts == () and mask.sum() == 1 and context[0, 0].any()


def test_cache_errors(cache, tmp_path):
    stored = text_cache.TextCache(cache)
    with pytest.raises(
        ValueError, match=r"'jump' is not among the 2 .* add it with: .*--what text"
    ):
        stored.table(["jump"], 8)
    with pytest.raises(ValueError, match=r"has 3 rows, config.data.text_len is 2"):
        stored.table(["lift the cup"], 2)
    with pytest.raises(FileNotFoundError, match=r"make it with: .*--what text"):
        text_cache.TextCache(str(tmp_path))
    with pytest.raises(ValueError, match="made by hashed-v2-16, the encoder is hashed-v2-8"):
        text_lib.CachedTextEncoder(text_lib.HashedTextEncoder(8), stored)


def test_cached_encoder_treats_known_and_new_prompts_alike(cache):
    encoder = text_lib.CachedTextEncoder(
        text_lib.HashedTextEncoder(16), text_cache.TextCache(cache)
    )
    context, mask = encoder.encode(["lift the cup", "lift the plate"], 8)
    want, want_mask = text_lib.HashedTextEncoder(16).encode(["lift the cup", "lift the plate"], 8)
    np.testing.assert_array_equal(context, want.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(mask, want_mask)


class Counting(text_lib.HashedTextEncoder):
    """Remembers what it was asked."""

    def encode(self, prompts, text_len):
        self.asked = [*getattr(self, "asked", []), *prompts]
        return super().encode(prompts, text_len)


def test_a_new_prompt_is_encoded_alone(tmp_path):
    directory = str(tmp_path / "text")

    def write(prompts, text_len=8, template=TEMPLATE, dim=16):
        encoder = Counting(dim)
        text_cache.write_cache(directory, encoder, prompts, text_len, "hashed", template)
        return getattr(encoder, "asked", [])

    old = [f"go to {i}" for i in range(5)]
    assert write(old) == old
    assert write(old) == []
    assert write(["first", *old[1:], "last"]) == ["first", "last"]
    stored = text_cache.TextCache(directory)
    assert stored.prompts == ("first", *old[1:], "last")
    want, mask = text_lib.HashedTextEncoder(16).encode(stored.prompts, 8)
    context, got_mask = stored.table(stored.prompts, 8)
    np.testing.assert_array_equal(context, want.astype(context.dtype))
    np.testing.assert_array_equal(got_mask, mask)
    for change in (dict(text_len=9), dict(template="now {task}"), dict(dim=8)):
        assert write(old, **change) == old
    assert sorted(os.listdir(tmp_path)) == ["text"]


def test_many_texts_stay_in_the_file(cache, monkeypatch):
    stored = text_cache.TextCache(cache)
    prompts = ["stop", "lift the cup", "stop"]
    context, mask = stored.table(prompts, 5)
    held = stored.contexts(prompts, 5)
    monkeypatch.setattr(text_cache, "_IN_MEMORY", len(prompts) * 5 * 16 * 2 - 1)
    read = pickle.loads(pickle.dumps(stored.contexts(prompts, 5)))
    assert isinstance(held, list) and not isinstance(read, list) and len(read) == 3
    for number in range(3):
        for got in (held[number], read[number]):
            np.testing.assert_array_equal(got[0], context[number])
            np.testing.assert_array_equal(got[1], mask[number])
    with pytest.raises(ValueError, match="'jump' is not among the 2"):  # at once, not when read
        stored.contexts(["jump"], 5)
    with pytest.raises(ValueError, match=r"has 3 rows, config.data.text_len is 2"):
        stored.contexts(prompts, 2)


def test_a_copy_of_a_text_cache_holds_no_texts(cache):
    stored = text_cache.TextCache(cache)
    copied = pickle.dumps(stored)
    assert len(copied) < 300
    np.testing.assert_array_equal(pickle.loads(copied).rows("stop"), stored.rows("stop"))
