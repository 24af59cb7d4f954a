"""The Wan 2.1 VAE against recorded outputs of the reference, through the converter.

The fixture is the reference run in float32 with random weights at width 4 (videos [B,C,T,H,W]);
tolerances are ten times its own distance from a float64 run.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import wan_vae
from lightwam_jax import params as params_lib
from lightwam_jax.models.vae import WanVAE
from lightwam_jax.models.vae22 import Wan22VAE

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "f_vae"
TINY = WanVAE(dim=4)


def _shapes(model, frames):
    video = jnp.zeros((1, frames, 16, 16, 3))
    return jax.eval_shape(model.init, jax.random.key(0), video)["params"]


def _numbers(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def _run(method, params, model=TINY, **options):
    def apply(x):
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, x, method=method, **options)

    return jax.jit(apply)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "vae21.npz") as file:
        return {key: np.moveaxis(file[key], 1, -1) for key in file.files}


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "vae21_tiny.safetensors")


@pytest.fixture(scope="module")
def params(tensors):
    return wan_vae.to_params(tensors)


@pytest.fixture(scope="module")
def encode(params):
    # A policy loads this half only: nothing else may be asked for.
    return _run("encode", {key: params[key] for key in ("encoder", "conv1")})


@pytest.fixture(scope="module")
def decode(params):
    return _run("decode", {key: params[key] for key in ("decoder", "conv2")}, clip=False)


def test_full_size_has_the_published_count():
    shapes = _shapes(WanVAE(), frames=1)
    leaves = jax.tree.leaves(shapes)
    assert len(leaves) == 194
    assert sum(leaf.size for leaf in leaves) == 126_892_531
    # An image and a video create the same parameters.
    assert _numbers(shapes) == _numbers(_shapes(WanVAE(), frames=5))


def test_full_size_wan22_has_the_published_count():
    leaves = jax.tree.leaves(_shapes(Wan22VAE(), frames=1))
    assert len(leaves) == 196
    assert sum(leaf.size for leaf in leaves) == 704_688_668


@pytest.mark.parametrize(
    "model, version",
    [
        (WanVAE(), "wan21"),
        (
            WanVAE(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, time_downsample=(True, False)),
            "wan21",
        ),
        (Wan22VAE(), "wan22"),
        (
            Wan22VAE(
                dim=4, decoder_dim=8, dim_mult=(1, 1, 2, 2), time_downsample=(True, False, True)
            ),
            "wan22",
        ),
    ],
)
def test_shapes_tell_the_fields(model, version):
    flat = params_lib.flatten(_shapes(model, frames=1))
    fields = wan_vae.model_fields({path: leaf.shape for path, leaf in flat.items()})
    assert fields.pop("version") == version
    assert fields == {name: getattr(model, name) for name in fields} and len(fields) >= 5
    with pytest.raises(ValueError, match="no parameters of a Wan VAE: a/b"):
        wan_vae.model_fields({"a/b": (1,)})


def test_table_fills_every_parameter_and_inverts(params, tensors):
    assert _numbers(params) == _numbers(_shapes(TINY, frames=5))
    back = wan_vae.from_params(params)
    assert sorted(back) == sorted(tensors)
    for key, tensor in tensors.items():
        assert back[key].shape == tensor.shape, key
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_unknown_key_is_an_error(tensors):
    with pytest.raises(ValueError, match=r"model\.conv1\.weight; .* do its keys have a prefix"):
        wan_vae.to_params({"model.conv1.weight": tensors["conv1.weight"]})
    with pytest.raises(ValueError, match=r"no row of the table writes conv3/kernel"):
        wan_vae.from_params({"conv3": {"kernel": tensors["conv1.bias"]}})


@pytest.mark.parametrize("video, latents", [("image", "image_latent"), ("video", "video_latent")])
def test_encode_matches_reference(encode, golden, video, latents):
    got = encode(golden[video])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, golden[latents], rtol=0, atol=7e-6)


def test_decode_matches_reference(decode, golden):
    got = decode(golden["latent"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, golden["decoded_unclamped"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(np.clip(got, -1, 1), golden["decoded"], rtol=0, atol=5e-5)


def test_decode_of_one_frame_is_clipped(params, golden):
    got = _run("decode", params)(golden["latent"][:, :1])
    np.testing.assert_allclose(got, golden["decoded_1frame"], rtol=0, atol=5e-5)
    assert jnp.abs(got).max() == 1.0


def test_latents_depend_on_the_past_only(encode, golden):
    video = golden["video"]
    latents = encode(video)
    np.testing.assert_allclose(encode(video[:1, :1]), latents[:1, :1], rtol=0, atol=7e-6)
    changed = video.copy()
    changed[:, 5:] *= -1  # the last group of four
    np.testing.assert_array_equal(encode(changed)[:, :2], latents[:, :2])


def test_frames_after_the_last_group_have_no_latent(encode):
    shapes = {
        frames: jax.eval_shape(encode, jnp.zeros((1, frames, 16, 24, 3))).shape[1]
        for frames in (1, 4, 5, 8, 9)
    }
    assert shapes == {1: 1, 4: 1, 5: 2, 8: 2, 9: 3}


def test_an_image_meets_no_3d_convolution(params, golden):
    encode = jax.make_jaxpr(lambda x: TINY.apply({"params": params}, x, method="encode"))
    ranks = [
        eqn.outvars[0].aval.ndim
        for eqn in encode(golden["image"]).eqns
        if eqn.primitive.name == "conv_general_dilated" and eqn.outvars[0].aval.size
    ]
    assert ranks == [4] * len(ranks) and len(ranks) == 25


def test_bfloat16_stays_close(params, golden):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    got = _run("encode", half, WanVAE(dim=4, dtype=jnp.bfloat16))(golden["image"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, golden["image_latent"], rtol=0, atol=0.05)
