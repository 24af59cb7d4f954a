"""umT5 as a text encoder, with tiny random weights where the real ones would be."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import encoders
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.encoders import umt5
from lightwam_jax.models.t5 import UMT5Encoder
from tests.pretrained import T5, WORDS, save_t5, save_vae


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with vae21/ and t5/ as the converters write them."""
    root = tmp_path_factory.mktemp("weights")
    save_vae(root / "vae21")
    save_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def encoder(weights):
    return umt5.UMT5TextEncoder(weights / "t5", keep=True)


def test_rows_are_the_encoders_and_end_with_the_text(encoder, weights):
    context, mask = encoder.encode(["put the red cube", " PUT&amp;  \n the"], 8)
    assert context.shape == (2, 8, 32) and context.dtype == np.float32
    np.testing.assert_array_equal(mask.sum(1), [5, 4])  # with </s>; PUT & are unknown words
    np.testing.assert_array_equal(context[~mask], 0)
    ids = np.array([[3, 4, 5, 8, 1, 0, 0, 0]])
    params = checkpoint.load_params(weights / "t5").params
    want = UMT5Encoder(**T5).apply({"params": params}, ids, np.arange(8)[None] < 5)
    np.testing.assert_allclose(context[0, :5], want[0, :5], atol=1e-5)


def test_prompts_are_cleaned_first(encoder):
    clean, _ = encoder.encode(["put the cube"], 8)
    dirty, _ = encoder.encode(["  put &nbsp; the\tcube\n"], 8)
    np.testing.assert_array_equal(dirty, clean)


def test_a_prompt_that_is_cut_is_named(encoder):
    with pytest.warns(
        UserWarning,
        match="'put the red cube in the bowl' is 4 tokens longer than config.data.text_len=4",
    ):
        ids, mask = encoder._tokenize(["put the red cube in the bowl"], 4)
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1]])  # as the reference: </s> is kept
    assert mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["put the red"], 4)


def test_bfloat16_weights_are_computed_in_bfloat16(encoder, weights, tmp_path):
    stored = checkpoint.load_params(weights / "t5")
    half = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16")), stored.params)
    checkpoint.save_params(
        tmp_path / "half", half, {"config": stored.meta["config"]}, weights / "t5" / "assets"
    )
    low = umt5.UMT5TextEncoder(tmp_path / "half")
    assert low.id != encoder.id and low._model.dtype == jnp.bfloat16
    context, _ = low.encode(["put the red cube"], 8)
    want, _ = encoder.encode(["put the red cube"], 8)
    np.testing.assert_allclose(context, want, atol=0.1)


def test_many_prompts_come_in_parts(encoder, monkeypatch):
    prompts = [" ".join(WORDS[:i]) for i in range(1, 6)]
    whole, _ = encoder.encode(prompts, 8)
    monkeypatch.setattr(umt5, "_TEXTS", 2)
    np.testing.assert_allclose(encoder.encode(prompts, 8)[0], whole, atol=1e-5)


def test_weights_are_read_when_a_prompt_comes_and_let_go(weights, monkeypatch):
    reads = []
    load = checkpoint.load_params
    monkeypatch.setattr(checkpoint, "load_params", lambda path: reads.append(path) or load(path))
    once, kept = (umt5.UMT5TextEncoder(weights / "t5", keep) for keep in (False, True))
    assert not reads
    for encoder in (once, once, kept, kept):
        encoder.encode(["put the cube"], 8)
    assert len(reads) == 3 and once._params is None


def test_broken_text_weights_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"config.data.text_weights is empty; .* converters t5"):
        encoders.make_text_encoder("umt5", 32)
    with pytest.raises(ValueError, match="holds weights of vae, expected text_encoder"):
        encoders.make_text_encoder("umt5", 32, str(weights / "vae21"))
    with pytest.raises(ValueError, match=r"rows of width 32, config.model.text_dim is 48"):
        encoders.make_text_encoder("umt5", 48, str(weights / "t5"))
    save_t5(tmp_path / "endless", end=False)
    with pytest.raises(ValueError, match="does not end a text with </s>"):
        encoders.make_text_encoder("umt5", 32, str(tmp_path / "endless")).encode(["put"], 4)
    os.remove(tmp_path / "endless" / "assets" / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; convert again"):
        encoders.make_text_encoder("umt5", 32, str(tmp_path / "endless"))
