"""From pretrained weights through precompute and a checkpoint to a policy: tiny random weights."""

import contextlib
import dataclasses
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from lightwam_jax import build, precompute
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import pca, umt5
from lightwam_jax.inference.policy import Policy
from tests import synthetic
from tests.pretrained import clips, save_t5, save_vae


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with vae21/, vae22/ and t5/ as the converters write them."""
    root = tmp_path_factory.mktemp("weights")
    save_vae(root / "vae21")
    save_vae(root / "vae22", "wan22")
    save_t5(root / "t5")
    return root


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


def of_process_0(config, directory):
    """What `make_codec` needs of a `precompute.Data`."""
    assets = lambda name: str(directory / name)
    return types.SimpleNamespace(config=config, index=0, assets=assets)


@pytest.mark.parametrize(
    "steps, there, named",
    [
        (["all"], "", "data.codec_weights='nowhere/vae' .*converters vae --in"),
        (["text"], "", "data.text_weights='nowhere/t5' .*converters t5 --in"),
        (["text"], "text", None),
        (["stats"], "", None),
    ],
)
def test_weights_that_are_not_there_are_named_before_any_work(steps, there, named, tmp_path):
    weights = {"data.codec_weights": "nowhere/vae", "data.text_weights": "nowhere/t5"}
    config = synthetic.make_config(
        tmp_path, **weights, **{"data.codec": "wan21", "data.text_encoder": "umt5"}
    )
    assets, begun = pathlib.Path(config.data.cache, "assets"), []
    (assets / there).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(3), []))
        for step in ("_statistics", "_text", "_latents"):
            patch.setattr(precompute, step, lambda data: begun.append(data))
        with pytest.raises(FileNotFoundError, match=named) if named else contextlib.nullcontext():
            precompute.precompute(config, steps)
    assert bool(begun) == (named is None)


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
        done = [precompute.make_codec(of_process_0(config, tmp_path)) for _ in range(2)]
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
        precompute.make_codec(of_process_0(config, tmp_path))
