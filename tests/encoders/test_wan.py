"""The pretrained codec and text encoder, with tiny random weights where the real ones would be."""

import dataclasses
import json
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import build, encoders, precompute
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import pca, umt5, wan
from lightwam_jax.inference.policy import Policy
from lightwam_jax.models.t5 import UMT5Encoder
from lightwam_jax.models.vae import WanVAE
from tests import synthetic

VAE = dict(dim=4, num_res_blocks=1)
VAE22 = dict(dim=3, decoder_dim=2, num_res_blocks=1)
T5 = dict(vocab=80, dim=32, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=2)
WORDS = ("put", "the", "red", "blue", "green", "cube", "in", "on", "bowl", "plate", "a", "very")


def random_params(model, *example, seed=0):
    """Random parameters without compiling the initialisers."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    return jax.tree.map(
        lambda s: rng.normal(
            0, 0.5 if len(s.shape) < 2 else np.prod(s.shape[:-1]) ** -0.5, s.shape
        ).astype(np.float32),
        shapes,
    )


def save_vae(directory, version="wan21", seed=0, **fields):
    fields = {**(VAE if version == "wan21" else VAE22), **fields}
    model = wan.VAES[version](**fields)
    params = random_params(model, jnp.zeros((1, 5, 16, 16, 3)), seed=seed)
    checkpoint.save_params(directory, params, {"config": {"vae": {"version": version, **fields}}})
    return model, params


def save_tokenizer(directory, end=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def save_t5(directory, end=True, **meta):
    model = UMT5Encoder(**T5)
    params = random_params(model, jnp.zeros((1, 4), jnp.int32))
    assets = save_tokenizer(directory.with_name(directory.name + "_assets"), end)
    checkpoint.save_params(
        directory, params, meta or {"config": {"text_encoder": T5}}, assets=assets
    )
    return model, params


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with vae21/, vae22/ and t5/ as the converters write them."""
    root = tmp_path_factory.mktemp("weights")
    save_vae(root / "vae21")
    save_vae(root / "vae22", "wan22")
    save_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def encoder(weights):
    return umt5.UMT5TextEncoder(weights / "t5", keep=True)


def clips(rows, frames=5, seed=0, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (rows, frames, *size, 3), np.uint8)


# ---- codec ---------------------------------------------------------------------------------------


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
    values = json.loads(meta.read_text().replace("latent_std", "tile_size"))
    meta.write_text(json.dumps(values | {"checksum": storage.meta_checksum(values)}))
    with pytest.raises(ValueError, match="WanVAE has no field tile_size; convert again"):
        wan.WanCodec(tmp_path / "later", "wan21", "float32")


# ---- text encoder --------------------------------------------------------------------------------


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


# ---- the whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """(config, workdir) of precomputed data and two checkpoints, the weights gone since."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(weights, root / "weights")
    config = synthetic.make_config(
        root,
        **{
            "data.codec": "wan21",
            "data.codec_weights": str(root / "weights" / "vae21"),
            "data.text_encoder": "umt5",
            "data.text_weights": str(root / "weights" / "t5"),
            "data.text_len": 12,
            "data.prompt_template": "{task}",
            "model.dtype": "float32",
            "model.num_layers": 2,
            "model.adapter_layers": (0, 1),
            "model.lora_layers": (0, 1),
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LARGE", 1000)
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(3), []))
        precompute.precompute(config, ("stats", "text", "latents"))
        stamp = lambda: (root / "cache" / "latents" / "cache.json").stat().st_mtime_ns
        before = stamp()
        precompute.precompute(config, ("stats", "text", "latents"))
        assert stamp() == before
        model = build.build_model(config.model)
        shapes = jax.eval_shape(lambda: build.init_params(model, jax.random.key(0), config.model))
        rng = np.random.default_rng(0)
        params = params_lib.canonical(
            jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes)
        )
        checkpoints = checkpoint.Checkpoints(
            root / "work", config, assets=assets_lib.assets_directory(config)
        )
        for step in (1, 2):
            checkpoints.save(step, {"params": params}, None, {"window": []})
        checkpoints.close()
    shutil.rmtree(root / "weights")
    return config, root / "work"


def observation(prompt):
    images = {camera: clips(1, 1, seed)[:, 0] for seed, camera in enumerate(("scene", "wrist"))}
    return images, np.zeros((1, 8), np.float32), [prompt]


def test_the_cache_holds_the_latents_of_its_codec(run):
    config, _ = run
    opened = latent_cache.open_cache(config)
    stored = assets_lib.load_assets(assets_lib.assets_directory(config), config)
    assert opened.meta["codec"] == stored.codec.id and stored.codec.id.startswith("wan21-float32-")
    record = opened.source("train")[0]
    episode = next(e for e in synthetic.make_episodes(3) if e.id == record["episode"].decode())
    window = windows_lib.window_at(episode.length, 0, 9, 2, 8)
    video = windows_lib.canvases(episode, window.frames, config)[None]
    np.testing.assert_allclose(
        record["latents"].astype(np.float32), stored.codec.encode(video)[0], atol=1e-3, rtol=1e-2
    )


def test_a_checkpoint_is_a_policy_by_itself(run):
    """Converted weights and cache may be gone; what is large lies on the disk once."""
    _, workdir = run
    codecs = [workdir / "checkpoints" / str(step) / "assets" / "codec" for step in (1, 2)]
    files = [
        [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size >= 1000]
        for folder in codecs
    ]
    assert files[0] and all(a.samefile(b) for a, b in zip(*map(sorted, files)))
    policy = Policy.load(workdir)
    actions = policy.act(*observation(synthetic.TASKS[0]))
    assert actions.shape == (1, 8, 7) and np.isfinite(actions).all()
    other = policy.act(*observation(synthetic.TASKS[1]))
    assert (actions != other).any()
    assert policy.predict_video(*observation(synthetic.TASKS[0]), steps=1).shape == (
        1,
        5,
        32,
        64,
        3,
    )


@pytest.mark.slow
def test_the_deployment_form_of_a_checkpoint_acts_the_same(run):
    _, workdir = run
    whole, small = (Policy.load(workdir, deploy=deploy) for deploy in (False, True))
    seen = observation(synthetic.TASKS[0])
    np.testing.assert_allclose(small.act(*seen), whole.act(*seen), atol=1e-5)
    with pytest.raises(ValueError, match="loaded with deploy=True and is not the whole model"):
        small.predict_video(*seen)
    assert set(small.assets.codec.arrays) == {"encoder", "conv1"}


def test_a_new_prompt_without_the_encoder_says_what_to_set(run, weights):
    config, workdir = run
    with pytest.raises(FileNotFoundError) as error:
        Policy.load(workdir).act(*observation("put the green cube on a plate"))
    message = str(error.value)
    assert config.data.text_weights in message and "text_weights=DIR" in message
    assert umt5.UMT5TextEncoder(weights / "t5").id in message
    policy = Policy.load(workdir, text_weights=str(weights / "t5"))
    assert np.isfinite(policy.act(*observation("put the green cube on a plate"))).all()


def test_precomputed_text_outlives_its_encoder(run, monkeypatch, capsys):
    config, _ = run
    monkeypatch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(3), []))
    capsys.readouterr()
    precompute.precompute(config, ("text",))
    assert "up to date, 2 prompts" in capsys.readouterr().out
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, codec_weights=""))
    precompute.precompute(without, ("latents",))
    assert "up to date" in capsys.readouterr().out
    other = dataclasses.replace(
        config, data=dataclasses.replace(config.data, prompt_template="do {task}")
    )
    with pytest.raises(FileNotFoundError, match="holds no converted weights"):
        precompute.precompute(other, ("text",))


def test_another_codec_takes_the_place_of_a_fitted_one(weights, tmp_path):
    pca.PcaCodec.fit(clips(4), 16).save(tmp_path / "codec")
    for dtype in ("float32", "bfloat16"):
        config = synthetic.make_config(
            tmp_path,
            **{
                "data.codec": "wan21",
                "data.codec_weights": str(weights / "vae21"),
                "model.dtype": dtype,
            },
        )
        done = [precompute._wan_codec(config, str(tmp_path / "codec")) for _ in range(2)]
        assert [note for _, note in done] == ["copied", "kept"]
        assert {made.dtype for made, _ in done} == {dtype}


def test_latent_channels_have_to_agree(run, weights, tmp_path):
    config = synthetic.make_config(
        tmp_path,
        **{
            "data.codec": "wan22",
            "data.codec_weights": str(weights / "vae22"),
            "model.latent_channels": 16,
        },
    )
    with pytest.raises(ValueError, match=r"48 latent channels, config.model.latent_channels is 16"):
        precompute._wan_codec(config, str(tmp_path / "codec"))
