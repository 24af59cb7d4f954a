"""Training from pixels: the windows of the latent cache, the same latents, the same losses."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightwam_jax import precompute, sharding
from lightwam_jax.data import assets, loader, spec
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.evaluation import open_loop
from lightwam_jax.training import encode_video, loop
from lightwam_jax.training import metrics as metrics_lib
from tests import synthetic

OVERRIDES = {
    "model.num_layers": 1,
    "model.adapter_layers": (0,),
    "model.lora_layers": (0,),
    "model.dtype": "float32",
    "train.steps": 4,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.eval_batches": 2,
    "train.checkpoint_every": 0,
    "optimizer.warmup_steps": 1,
    "evaluation.suite": "demo",  # whose gripper is action 3
}


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run from a cache; from pixels: `changed(config, "data", encode_online=True)`."""
    made = synthetic.make_config(tmp_path_factory.mktemp("data"), **OVERRIDES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(), []))
        precompute.precompute(made, ("stats", "text", "latents"))
        yield made


def test_batches_are_those_of_the_cache_with_video_in_place_of_latents(config):
    of_pixels = changed(config, "data", encode_online=True)
    pairs = zip(loader.train_loader(config), loader.train_loader(of_pixels))
    pairs = [
        *itertools.islice(pairs, 2),
        *zip(loader.val_batches(config), loader.val_batches(of_pixels), strict=True),
    ]
    for cached, batch in pairs:
        spec.check_batch(batch, of_pixels)
        np.testing.assert_array_equal(
            encode_video.load_codec(config)
            .encode(batch.pop("video"))
            .astype(cached["latents"].dtype),
            cached.pop("latents"),
        )
        for name in cached:
            np.testing.assert_array_equal(batch[name], cached[name], err_msg=name)


def test_a_frame_that_cannot_be_read_stops_training_with_its_name(config):
    class Broken(episodes_lib.ArrayEpisode):
        def frames(self, camera, indices):
            raise episodes_lib.FrameError("wrist.mp4", 17, "it ends there")

    fields = [dataclasses.asdict(episode) for episode in synthetic.make_episodes()]
    broken = [Broken(**episode) for episode in fields]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_lib, "_episodes", lambda text: ({"train": broken}, synthetic.TASKS))
        batches = loader.train_loader(changed(config, "data", encode_online=True))
        with pytest.raises(episodes_lib.FrameError, match=r"wrist.mp4, frame 17: it ends there"):
            next(batches)
        batches.close()


def encoded(config, batch, devices, key=None):
    """A batch after `Encoder.first`, or `Encoder.train` with a key, on that many devices."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    made = encode_video.make_encoder(config, mesh)
    batch = sharding.put_batch({k: x for k, x in batch.items() if k != "index"}, mesh)
    function, rest = (made.first, ()) if key is None else (made.train, (jax.random.key(key),))
    return jax.device_get(jax.jit(function)(made.arrays, batch, *rest))


def test_latents_are_those_of_the_cache_on_any_devices(config):
    run = changed(changed(config, "data", encode_online=True), "train", batch_size=8)
    cached, batch = (
        next(loader.train_loader(c)) for c in (changed(config, "train", batch_size=8), run)
    )
    for devices in (1, 4):
        out = encoded(run, batch, devices, key=0)
        assert out.keys() == cached.keys() - {"index"}
        assert out["latents"].dtype == jnp.bfloat16
        # Another order of summation now and then rounds to the neighbouring bfloat16.
        got, want = (x["latents"].astype(np.float32) for x in (out, cached))
        np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-5)
        assert (got == want).mean() > 0.99
        first = encoded(run, batch, devices)["latents"].astype(np.float32)
        np.testing.assert_array_equal(first, got[:, :1])


def test_augmentation_depends_on_key_and_row_alone(config):
    run = changed(changed(config, "data", encode_online=True), "train", batch_size=8)
    augmented = changed(
        run, "data", augment=dataclasses.replace(run.data.augment, crop=0.7, brightness=0.2)
    )
    batch = next(loader.train_loader(run))
    plain = encoded(run, batch, 1, key=0)["latents"]
    one, four = (encoded(augmented, batch, n, key=0)["latents"] for n in (1, 4))
    np.testing.assert_allclose(*(x.astype(np.float32) for x in (one, four)), rtol=2**-7, atol=1e-5)
    assert ((one != plain).mean((1, 2, 3, 4)) > 0.5).all()
    assert (encoded(augmented, batch, 1, key=1)["latents"] != one).mean() > 0.5
    np.testing.assert_array_equal(encoded(augmented, batch, 1)["latents"], plain[:, :1])


class Looks:
    """Actions are what the first frame, the state and the text sum up to."""

    def apply(self, params, latents, context, proprio, steps, mask, method):
        assert method == "act"
        seen = latents.sum((1, 2, 3, 4)) + proprio.sum(-1) + context.sum((1, 2), jnp.float32)
        return jnp.broadcast_to(seen[:, None, None], (len(seen), steps, 7)), {}


def test_open_loop_errors_are_those_of_the_cache(config):
    directory = assets.assets_directory(config)
    errors = []
    for run in (config, changed(config, "data", encode_online=True)):
        policy = types.SimpleNamespace(
            model=Looks(), params={}, config=run, assets=assets.load_assets(directory, run)
        )
        errors.append(open_loop.evaluate(policy, loader.val_batches(run)))
    grippers = [each.pop("grippers") for each in errors]
    assert list(grippers[0]) == ["3"] and grippers[0]["3"] == pytest.approx(grippers[1]["3"])
    assert grippers[0]["3"]["found"] == 0, "these actions do not change within a chunk"
    for name in errors[0]:
        np.testing.assert_allclose(errors[0][name], errors[1][name], rtol=1e-6)


def test_random_data_have_video_and_a_codec(tmp_path):
    config = synthetic.make_config(tmp_path, **{"data.source": "fake", "data.encode_online": True})
    batch = next(loader.train_loader(config))
    spec.check_batch(batch, config)
    spec.check_batch(spec.fake_batch(config, 3), config)
    assert encoded(config, batch, 1)["latents"].shape == (4, 1, *spec.latents_shape(config)[1:])


def test_another_codec_than_the_configs_is_refused(config):
    with pytest.raises(ValueError, match="is 'pca' with 16 channels"):
        encode_video.load_codec(changed(config, "data", encode_online=True, codec="wan21"))


@pytest.mark.slow
def test_worker_processes_read_the_same_pixels(config):
    run = changed(config, "data", encode_online=True)
    single, workers = (loader.train_loader(c) for c in (run, changed(run, "data", workers=2)))
    for a, b in itertools.islice(zip(single, workers), 4):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    workers.close()


@pytest.mark.slow
def test_losses_are_those_of_training_from_the_cache(config, tmp_path, monkeypatch):
    """Up to the rounding of another matrix product: on two devices, with two micro-batches."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda c: make_mesh(c, jax.devices()[:2]))
    two = changed(config, "optimizer", accum_steps=2)
    assert loop.train(two, tmp_path / "cache").step == 4
    assert loop.train(changed(two, "data", encode_online=True), tmp_path / "pixels").step == 4
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith(("ms_", "samples"))}
            for row in metrics_lib.read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("cache", "pixels")
    ]
    assert [row["kind"] for row in rows[0]] == ["train"] * 4 + ["eval"]
    for cached, row in zip(*rows, strict=True):
        for name in set(row) - {"kind"}:
            np.testing.assert_allclose(row[name], cached[name], rtol=1e-4, err_msg=name)
