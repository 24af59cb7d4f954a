"""The PCA codec: interface of the Wan VAE, determinism, quality, and the same numbers under jit."""

import jax
import numpy as np
import pytest

from lightwam_jax import encoders
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.encoders import pca, quality
from tests import synthetic


@pytest.fixture(scope="module")
def videos():
    """uint8 [N, 5, 32, 32, 3] of drifting squares."""
    clips = [e.images["scene"][:5] for e in synthetic.make_episodes(24, seed=3)]
    return np.stack(clips)


@pytest.fixture(scope="module")
def fitted(videos):
    return pca.PcaCodec.fit(videos[:20], channels=16)


def test_shapes_are_those_of_the_wan_vae(fitted, videos):
    latents = fitted.encode(videos)
    assert latents.shape == (24, 2, 4, 4, 16) and latents.dtype == np.float32
    images = fitted.decode(latents)
    assert images.shape == videos.shape and images.dtype == np.uint8
    assert fitted.encode(videos[:, :1]).shape == (24, 1, 4, 4, 16)
    assert fitted.decode(latents[:, :1]).shape == (24, 1, 32, 32, 3)


def test_first_latent_frame_depends_on_the_first_frame_only(fitted, videos):
    np.testing.assert_array_equal(fitted.encode(videos[:, :1]), fitted.encode(videos)[:, :1])


def test_quality_on_images_it_was_not_fitted_on(fitted, videos):
    images = fitted.decode(fitted.encode(videos[20:]))
    assert quality.psnr(images[:, 0], videos[20:, 0]) > 23
    assert quality.psnr(images[:, 1:], videos[20:, 1:]) > 20


def test_all_components_lose_nothing(videos):
    """192 components of a first-frame patch are a change of basis."""
    full = pca.PcaCodec.fit(videos, channels=192)
    images = full.decode(full.encode(videos[:, :1]))
    assert np.abs(images.astype(int) - videos[:, :1]).max() <= 1


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_mean_variance_is_one(videos, whitening):
    fitted = pca.PcaCodec.fit(videos, channels=8 + pca.PLACES, whitening=whitening)
    latents = fitted.encode(videos)
    later = latents[:, 1:, ..., : -pca.PLACES].reshape(-1, 8)
    np.testing.assert_allclose(later.mean(0), 0, atol=1e-2)
    variance = later.var(0)
    np.testing.assert_allclose(variance.mean(), 1, atol=0.02)
    assert (np.diff(variance) < 1e-3).all(), "components are not in order"
    np.testing.assert_allclose(variance[0] / variance[-1] > 1.1, whitening < 1)


def test_fit_is_deterministic(fitted, videos):
    assert pca.PcaCodec.fit(videos[:20].copy(), channels=16).id == fitted.id
    assert pca.PcaCodec.fit(videos[:19], channels=16).id != fitted.id


def test_encode_under_jit_is_the_same_function(fitted, videos):
    jitted = jax.jit(fitted.encode_with)(fitted.arrays, videos)
    np.testing.assert_allclose(jitted, fitted.encode(videos), atol=1e-4)


def test_resampled_canvases_are_the_same_images_in_0_to_1(fitted, videos):
    floats = encoders_base.to_float(videos)
    latents = fitted.encode(videos)
    np.testing.assert_allclose(fitted.encode(floats), latents, atol=1e-4)
    np.testing.assert_allclose(
        jax.jit(fitted.encode_with)(fitted.arrays, floats), latents, atol=1e-4
    )
    again = pca.PcaCodec.fit(floats[:20], channels=16)
    np.testing.assert_allclose(again.encode(videos), latents, atol=1e-2)
    assert quality.psnr(fitted.decode(latents), floats) == pytest.approx(
        quality.psnr(fitted.decode(latents), videos)
    )
    beyond = floats.copy()
    beyond[..., 0, 0, :] = -0.1, 1.1, 0.5  # bicubic overshoot is neither refused nor clipped
    assert np.abs(fitted.encode(beyond) - latents)[:, :, 0, 0].max() > 0.01


def test_chunks_do_not_change_the_latents(fitted):
    rng = np.random.default_rng(0)
    many = rng.integers(0, 256, (90, 5, 32, 32, 3)).astype(np.uint8)  # 1.4 MB: two chunks
    np.testing.assert_allclose(fitted.encode(many)[-1], fitted.encode(many[-1:])[0], atol=1e-4)


def test_save_and_load(fitted, videos, tmp_path):
    fitted.save(tmp_path / "codec")
    loaded = encoders.load_codec(tmp_path / "codec")
    assert loaded.id == fitted.id and loaded.latent_channels == 16 and loaded.stride == 8
    np.testing.assert_array_equal(loaded.encode(videos), fitted.encode(videos))
    with pytest.raises(FileNotFoundError, match=r"make it with: .*--what latents"):
        encoders.load_codec(tmp_path / "nowhere")
    pca.PcaCodec.fit(videos[:9], channels=16).save(tmp_path / "other")
    (tmp_path / "other" / "codec.npz").replace(tmp_path / "codec" / "codec.npz")
    with pytest.raises(ValueError, match="one of them was replaced"):
        encoders.load_codec(tmp_path / "codec")
    (tmp_path / "codec" / "codec.json").write_text('{"kind": "wan23", "id": ""}', encoding="utf-8")
    with pytest.raises(ValueError, match="'wan23' is unknown; known kinds"):
        encoders.load_codec(tmp_path / "codec")


def test_wrong_inputs_are_refused(fitted, videos):
    with pytest.raises(ValueError, match="video of 4 frames of 32x32; expected 1"):
        fitted.encode(videos[:, :4])
    with pytest.raises(ValueError, match="video of 5 frames of 31x32"):
        fitted.encode(videos[:, :, 1:])
    with pytest.raises(ValueError, match=r"video is float64 .*; expected uint8, or"):
        fitted.encode(videos / 255)
    with pytest.raises(ValueError, match=r"video is float32 from 20.0 to 220.0; expected 0..1"):
        fitted.encode(videos.astype(np.float32))
    with pytest.raises(ValueError, match="float32 from nan to nan"):
        fitted.encode(np.full_like(videos, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"expected \[B, F, h, w, 16\]"):
        fitted.decode(np.zeros((1, 1, 4, 4, 8), np.float32))
    with pytest.raises(ValueError, match="PCA codec of 200 channels"):
        pca.PcaCodec.fit(videos, channels=200)


def test_latents_tell_their_place_and_images_ignore_it(fitted, videos):
    latents = fitted.encode(videos[:2])
    places = latents[..., -pca.PLACES :]
    assert (places == places[:1, :1]).all()  # the same whatever is shown
    cells = places[0, 0].reshape(-1, pca.PLACES)
    assert len(np.unique(cells, axis=0)) == len(cells)
    moved = latents.copy()
    moved[..., -pca.PLACES :] = 0
    np.testing.assert_array_equal(fitted.decode(latents), fitted.decode(moved))


def images():
    """An image and five that differ from it, made of integers alone: the same everywhere."""
    y, x, c = np.mgrid[:24, :40, :3]
    image = (x * 5 + y * 3 + c * 20 + (x * y * 7) % 60).astype(np.uint8)
    return image, {
        "noise": (image // 2 + (x * 37 + y * 91 + c * 53) % 101).astype(np.uint8),
        "brighter": np.minimum(image.astype(int) + 25, 255).astype(np.uint8),
        "flat": np.full_like(image, 128),
        "negative": 255 - image,
        "moved": np.roll(image, 2, axis=1),
    }


# scikit-image 0.26.0: structural_similarity(other, image, channel_axis=-1, data_range=255,
# gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
GOLDEN_SSIM = {
    "noise": 0.375382556180,
    "brighter": 0.984315148992,
    "flat": 0.103443739240,
    "negative": -0.646227904760,
    "moved": 0.205949907151,
}


def test_ssim_equals_scikit_image():
    image, others = images()
    assert set(others) == set(GOLDEN_SSIM)
    for name, other in others.items():
        assert quality.ssim(other, image) == pytest.approx(GOLDEN_SSIM[name], abs=1e-9), name


def test_ssim_of_flat_images_is_the_formula_s_first_factor():
    a, b = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert quality.ssim(a, b) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_symmetric_and_one_only_for_equal_images():
    image, others = images()
    assert quality.ssim(image, image) == pytest.approx(1, abs=1e-12)
    for other in others.values():
        assert quality.ssim(image, other) == pytest.approx(quality.ssim(other, image), rel=1e-12)
        assert quality.ssim(image, other) < 0.99
    scaled = image.astype(np.float32) / 255
    assert quality.ssim(scaled, others["moved"]) == pytest.approx(
        quality.ssim(image, others["moved"]), abs=1e-5
    )
    with pytest.raises(ValueError, match=r"\[10, 24, 3\]; expected two of one shape .* 11 pixels"):
        quality.ssim(image[:10, :24], image[:10, :24])
