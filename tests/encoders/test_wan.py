"""The Wan VAEs as codecs, with tiny random weights where the real ones would be."""

import json
import shutil

import jax
import numpy as np
import pytest

from lightwam_jax import encoders
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.encoders import wan
from lightwam_jax.models.vae import WanVAE
from tests.pretrained import VAE, clips, save_t5, save_vae


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with vae21/, vae22/ and t5/ as the converters write them."""
    root = tmp_path_factory.mktemp("weights")
    save_vae(root / "vae21")
    save_vae(root / "vae22", "wan22")
    save_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def vae21(weights):
    return wan.WanCodec(weights / "vae21", "wan21", "float32")


def test_latents_are_the_vaes_of_pixels_in_minus_one_to_one(vae21, weights):
    video = clips(2)
    latents = vae21.encode(video)
    assert latents.shape == (2, 2, 4, 4, 16) and latents.dtype == np.float32
    params = checkpoint.load_params(weights / "vae21").params
    want = jax.jit(lambda x: WanVAE(**VAE).apply({"params": params}, x, method="encode"))(
        video / np.float32(127.5) - 1
    )
    np.testing.assert_allclose(latents, want, atol=2e-5)
    assert set(vae21.arrays) == {"encoder", "conv1"}


def test_frames_are_truncated_like_the_references(vae21, weights):
    latents = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 16)).astype(np.float32)
    frames = vae21.decode(latents)
    assert frames.shape == (2, 5, 32, 32, 3) and frames.dtype == np.uint8
    params = checkpoint.load_params(weights / "vae21").params
    video = jax.jit(lambda x: WanVAE(**VAE).apply({"params": params}, x, method="decode"))(latents)
    level = (np.asarray(video, np.float64) + 1) * 127.5
    assert (np.floor(level - 0.01) <= frames).all() and (frames <= np.floor(level + 0.01)).all()
    assert 0 < frames.mean() < 255


def test_parts_do_not_change_the_latents(vae21, monkeypatch):
    video = clips(3)
    whole = vae21.encode(video)
    monkeypatch.setattr(wan, "_ENCODING_BYTES", 1)
    assert vae21._rows(video.shape[1:4]) == 1
    np.testing.assert_allclose(vae21.encode(video), whole, atol=1e-5)


def test_memory_bounds_the_rows():
    full = object.__new__(wan.WanCodec)
    full.model, full.stride = WanVAE(), 8
    clip, image = full._rows((9, 224, 448)), full._rows((1, 224, 448))
    assert (clip, image) == (2, 16)


def test_wan22_cells_are_16_pixels(weights):
    vae22 = wan.WanCodec(weights / "vae22", "wan22", "float32")
    assert (vae22.stride, vae22.latent_channels) == (16, 48)
    assert vae22.encode(clips(1, 1)).shape == (1, 1, 2, 2, 48)
    with pytest.raises(ValueError, match="multiples of 16: change"):
        vae22.encode(clips(1, 1, size=(32, 40)))


def test_the_id_names_what_changes_the_latents(vae21, weights, tmp_path):
    save_vae(tmp_path / "other", seed=1)
    ids = {wan.WanCodec(weights / "vae21", "wan21", dtype).id for dtype in ("float32", "bfloat16")}
    ids.add(wan.WanCodec(tmp_path / "other", "wan21", "float32").id)
    assert vae21.id in ids and len(ids) == 3


def test_bfloat16_holds_half_the_bytes(vae21, weights):
    low = wan.WanCodec(weights / "vae21", "wan21", "bfloat16")
    size = lambda c: sum(x.nbytes for x in jax.tree.leaves(c.arrays))
    assert 2 * size(low) == size(vae21)
    np.testing.assert_allclose(low.encode(clips(1)), vae21.encode(clips(1)), atol=0.1)


def test_saved_codec_shares_the_files_and_is_checked(vae21, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LARGE", 1000)
    vae21.save(tmp_path / "codec")
    loaded = encoders.load_codec(tmp_path / "codec")
    assert (loaded.id, loaded.kind, loaded.dtype) == (vae21.id, "wan21", "float32")
    np.testing.assert_array_equal(loaded.encode(clips(1)), vae21.encode(clips(1)))
    links = [
        p.stat().st_nlink
        for p in (tmp_path / "codec").rglob("*")
        if p.is_file() and p.stat().st_size >= 1000
    ]
    assert links and min(links) == 2
    shutil.rmtree(tmp_path / "codec" / "weights")
    save_vae(tmp_path / "codec" / "weights", seed=1)
    with pytest.raises(ValueError, match="one of them was replaced"):
        encoders.load_codec(tmp_path / "codec")


def test_wrong_weights_are_refused(weights, tmp_path):
    for place, words in (
        ("", r"config.data.codec_weights is empty; .* converters vae"),
        (weights / "t5", "holds weights of text_encoder, expected vae"),
        (weights / "vae22", "holds VAE 'wan22', config.data.codec is 'wan21'"),
    ):
        with pytest.raises(ValueError, match=words):
            wan.WanCodec(place, "wan21", "float32")
    with pytest.raises(FileNotFoundError, match="holds no converted weights; make them with"):
        wan.WanCodec(tmp_path, "wan21", "float32")
    save_vae(tmp_path / "later", latent_std=(1.0,) * 16)
    meta = tmp_path / "later" / "meta" / "metadata"
    values = json.loads(meta.read_text(encoding="utf-8").replace("latent_std", "tile_size"))
    meta.write_text(
        json.dumps(values | {"checksum": storage.meta_checksum(values)}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="WanVAE has no field tile_size; convert again"):
        wan.WanCodec(tmp_path / "later", "wan21", "float32")
