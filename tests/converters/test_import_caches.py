"""The reference's caches: read as they are, and made ours."""

import dataclasses
import os
import re

import ml_dtypes
import numpy as np
import pytest

from converters import __main__, caches, import_caches, umt5
from lightwam_jax import precompute
from lightwam_jax.data import assets
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.encoders import umt5 as umt5_lib
from lightwam_jax.encoders import wan
from tests import pretrained, synthetic

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


# ---- reading -------------------------------------------------------------------------------------


def test_single_files(tmp_path):
    latents = np.random.default_rng(0).standard_normal((7, 2, 4, 4, 16)).astype(ml_dtypes.bfloat16)
    for index in (0, 3, 6):
        torch.save({"video_latents": as_torch(latents[index])}, tmp_path / f"{index:08d}.pt")
    found = caches.read_latent_cache(tmp_path)
    assert len(found) == 7 and [i for i in range(7) if i in found] == [0, 3, 6]
    for index in (6, 0, 3):
        assert found[index].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[index], latents[index])
    with pytest.raises(KeyError, match="lacks the latents of window 1; finish it with"):
        found[1]
    with pytest.raises(IndexError, match="window 7 of the 7"):
        found[7]


def test_texts_end_in_zeros_and_are_told_apart(reference):
    files = caches.read_text_cache(reference / "texts")
    context, mask = files.table(synthetic.TASKS)
    assert context.shape == (2, 12, 32) and context.dtype == ml_dtypes.bfloat16
    assert mask.dtype == bool and 0 < mask.sum() < mask.size
    assert not context[~mask].any() and context[mask].any()
    raw = torch.load(files.path(synthetic.TASKS[0]), weights_only=True)["context"]
    assert raw[~torch.from_numpy(mask[0])].any(), "the file itself is not zeroed"
    with pytest.raises(KeyError, match="has no embedding of 'jump'"):
        files.table(["jump"])
    with pytest.raises(FileNotFoundError, match="holds no text embeddings of 13 rows"):
        caches.read_text_cache(reference / "texts", 13)


def write_sharded(directory, latents, shards, storage_format="sharded_v1", missing=()):
    """Writes an index and shards: shards is a list of lists of windows."""
    folder = {"sharded_v1": "shards", "episode_packed_v1": "episodes"}[storage_format]
    (directory / folder).mkdir(parents=True)
    shard_of, offset_of = (np.full(len(latents), -1, np.int32) for _ in range(2))
    paths = []
    for number, windows in enumerate(shards):
        paths.append(f"{folder}/rank000_{number:06d}.pt")
        shard_of[windows], offset_of[windows] = number, range(len(windows))
        torch.save(
            {"sample_indices": torch.tensor(windows), "video_latents": as_torch(latents[windows])},
            directory / paths[-1],
        )
    shard_of[list(missing)] = offset_of[list(missing)] = -1
    torch.save(
        {
            "format": "lightwam_video_latent_cache_index_v1",
            "storage_format": storage_format,
            "num_samples": len(latents),
            "sample_to_shard": torch.from_numpy(shard_of),
            "sample_to_offset": torch.from_numpy(offset_of),
            "shard_paths": paths,
        },
        directory / "index.pt",
    )


def as_torch(latents):
    """[..., F, H, W, C] -> bfloat16 tensor [..., C, F, H, W]."""
    return torch.from_numpy(np.moveaxis(latents, -1, -4).astype(np.float32).copy()).bfloat16()


@pytest.mark.parametrize("storage_format", ["sharded_v1", "episode_packed_v1"])
def test_shards_by_count_and_by_episode(storage_format, tmp_path):
    latents = np.random.default_rng(0).standard_normal((7, 2, 4, 4, 16)).astype(ml_dtypes.bfloat16)
    write_sharded(tmp_path / "c", latents, [[0, 2, 4], [1, 3, 5, 6]], storage_format, missing=[3])
    found = caches.read_latent_cache(tmp_path / "c")
    assert [i for i in range(7) if i not in found] == [3]
    for index in (6, 0, 5, 2):
        np.testing.assert_array_equal(found[index], latents[index])


def test_damaged_and_foreign_caches(tmp_path):
    latents = np.zeros((4, 2, 4, 4, 16), np.float32)
    with pytest.raises(FileNotFoundError, match=r"holds no latent cache; expected index.pt and"):
        caches.read_latent_cache(tmp_path)
    write_sharded(tmp_path / "c", latents, [[0, 1], [2, 3]])
    index = torch.load(tmp_path / "c" / "index.pt", weights_only=True)

    def damaged(**change):
        torch.save({**index, **change}, tmp_path / "c" / "index.pt")
        return caches.read_latent_cache(tmp_path / "c")

    with pytest.raises(ValueError, match="does not hold window 0 at place 1"):
        damaged(sample_to_offset=torch.tensor([1, 0, 0, 1], dtype=torch.int32))[0]
    with pytest.raises(ValueError, match="speaks of 5 windows, places 4 and 4"):
        damaged(num_samples=5)
    with pytest.raises(ValueError, match="'v9'; expected one of sharded_v1, episode_packed_v1"):
        damaged(storage_format="v9")
    with pytest.raises(ValueError, match="expected paths inside"):
        damaged(shard_paths=["../x.pt", "shards/y.pt"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        damaged(shard_paths=["shards/x.pt", "shards/y.pt"])[0]


# ---- importing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    pretrained.save_vae(root / "vae")
    pretrained.save_vae(root / "other", seed=1)
    pretrained.save_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def reference(weights, tmp_path_factory):
    """A directory with the caches that the reference would have made of the episodes."""
    root = tmp_path_factory.mktemp("reference")
    config = make_config(root, weights)
    codec = wan.WanCodec(weights / "vae", "wan21", "float32")
    found = synthetic.make_episodes(4)
    for split, part in zip(("train", "val"), episodes_lib.split(found, config.data.val_fraction)):
        videos = []
        for episode in part:
            for start in range(episode.length):
                window = windows_lib.window_at(episode.length, start, 9, 2, 8)
                videos.append(windows_lib.canvases(episode, window.frames, config))
        latents, rng = codec.encode(np.stack(videos)), np.random.default_rng(0)
        order = rng.permutation(len(latents)).tolist()
        write_sharded(root / split, latents, [order[:9], order[9:]])
    (root / "texts").mkdir()
    encoder = umt5_lib.UMT5TextEncoder(weights / "t5")
    for task in synthetic.TASKS:
        prompt = text_lib.prompt(task, config.data.prompt_template)
        context, mask = encoder.encode([prompt], config.data.text_len)
        context = torch.from_numpy(context[0]).bfloat16()
        context[~torch.from_numpy(mask[0])] = 7  # the reference does not zero them
        name = umt5.cache_name(prompt, config.data.text_len, "Wan-AI/Wan2.1-T2V-1.3B")
        torch.save({"context": context, "mask": torch.from_numpy(mask[0])}, root / "texts" / name)
    return root


def make_config(directory, weights, **overrides):
    return synthetic.make_config(
        directory,
        **{
            "data.codec": "wan21",
            "data.codec_weights": str(weights / "vae"),
            "data.path": "episodes",
            "data.text_encoder": "umt5",
            "data.text_weights": str(weights / "t5"),
            "data.text_len": 12,
            "data.prompt_template": "{task}",
            "model.dtype": "float32",
            **overrides,
        },
    )


@pytest.fixture(autouse=True)
def episodes(monkeypatch):
    found = synthetic.make_episodes(4)
    monkeypatch.setattr(episodes_lib, "read", lambda config: (list(found), []))
    monkeypatch.setattr(doctor_report, "write", lambda report, directory: [directory])
    return found


def test_an_imported_cache_is_the_one_precompute_makes(reference, weights, tmp_path, capsys):
    own = make_config(tmp_path / "own", weights)
    config = make_config(tmp_path / "imported", weights)
    precompute.precompute(own, ("stats", "text", "latents"))
    import_caches.import_latents(reference / "train", config, reference / "val")
    import_caches.import_texts(reference / "texts", config)
    precompute.precompute(config, ("stats", "text", "latents"))
    assert capsys.readouterr().out.count("up to date") == 2
    opened, made = latent_cache.open_cache(config), latent_cache.open_cache(own)
    assert opened.meta["imported"]["train"]["from"] == str(reference / "train")
    assert len(opened.meta["imported"]["val"]["checked"]) > 1
    assert made.meta["imported"] == {}
    for split in ("train", "val"):
        assert opened.size(split) == made.size(split) > 0
        for got, want in zip(opened.source(split), made.source(split)):
            assert got.keys() == want.keys()
            for name in want:
                np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    tables = [assets.load_text(assets.assets_directory(c), c) for c in (config, own)]
    assert tables[0].encoder_id == tables[1].encoder_id
    for got, want in zip(*(table.table(synthetic.TASKS, 12) for table in tables)):
        np.testing.assert_array_equal(got, want)


def test_another_vae_or_other_images_are_refused_unless_trusted(
    reference, weights, tmp_path, episodes
):
    other = make_config(tmp_path, weights, **{"data.codec_weights": str(weights / "other")})
    with pytest.raises(ValueError, match=r"window \d+ \(episode .*\) are \d+% from what .* 5% is"):
        import_caches.import_latents(reference / "train", other)
    config = make_config(tmp_path, weights)
    mirrored = make_config(tmp_path, weights, **{"data.cameras": ("wrist", "scene")})
    for place, wrong in ((reference / "train", mirrored), (reference / "val", config)):
        with pytest.raises(ValueError, match=r"from each other's. .* --trust takes them"):
            import_caches.import_latents(place, wrong)
    later = [
        dataclasses.replace(
            e,
            images={
                k: v[np.minimum(np.arange(len(v)) + 1, len(v) - 1)] for k, v in e.images.items()
            },
        )
        for e in episodes
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (later, []))
        with pytest.raises(ValueError, match="from the images a step before and after"):
            import_caches.import_latents(reference / "train", config)
    assert not os.path.exists(tmp_path / "cache" / "latents.partial")
    import_caches.import_latents(reference / "train", mirrored, reference / "val", trust=True)
    assert latent_cache.read_meta(mirrored)["imported"]["train"]["checked"] == []


def test_what_does_not_fit_is_refused(reference, weights, tmp_path, episodes):
    config = make_config(tmp_path, weights)
    every = make_config(tmp_path, weights, **{"data.val_fraction": 0.0})
    with pytest.raises(ValueError, match=r"has 16 windows, the train split of .* has 32 in 4 ep"):
        import_caches.import_latents(reference / "val", every)
    wide = make_config(tmp_path, weights, **{"data.canvas": (32, 32)})
    with pytest.raises(ValueError, match=r"latents \[2, 4, 8, 16\], the config wants \[2, 4, 4,"):
        import_caches.import_latents(reference / "train", wide)
    with pytest.raises(ValueError, match=r"config.data.codec is 'pca', which is fitted here"):
        import_caches.import_latents(reference / "train", synthetic.make_config(tmp_path))
    template = dataclasses.replace(
        config, data=dataclasses.replace(config.data, prompt_template="do {task}")
    )
    with pytest.raises(ValueError, match=r"lacks 2 of 2 prompts, such as 'do put the .* cube"):
        import_caches.import_texts(reference / "texts", template)


def test_a_missing_window_is_named(weights, tmp_path):
    config = make_config(tmp_path, weights, **{"data.val_fraction": 0.0})
    count = sum(episode.length for episode in synthetic.make_episodes(4))
    write_sharded(
        tmp_path / "c",
        np.zeros((count, 2, 4, 8, 16), np.float32),
        [list(range(count))],
        missing=[3, 4],
    )
    with pytest.raises(ValueError, match=r"lacks 2 of its .* windows, the first is 3; finish it"):
        import_caches.import_latents(tmp_path / "c", config)


def test_validation_without_a_cache_is_encoded(reference, weights, tmp_path, capsys):
    config = make_config(tmp_path, weights)
    import_caches.import_latents(reference / "train", config)
    assert re.search(r"val windows \(encoded by wan21-", capsys.readouterr().out)
    assert sorted(latent_cache.read_meta(config)["imported"]) == ["train"]


def test_texts_without_weights_know_these_prompts_only(reference, weights, tmp_path):
    config = make_config(tmp_path, weights, **{"data.text_weights": ""})
    import_caches.import_texts(reference / "texts", config)
    assert assets.load_text(assets.assets_directory(config), config).encoder_id == (
        "umt5-reference-wan21t2v13b"
    )
    taken = import_caches._TextFiles(
        caches.read_text_cache(reference / "texts"), config, synthetic.TASKS
    )
    with pytest.raises(ValueError, match=r"is not what config.data.text_weights makes of it"):
        taken.check(text_lib.HashedTextEncoder(config.model.text_dim), synthetic.TASKS[0])


def test_command_line(reference, weights, tmp_path, capsys):
    config = tmp_path / "config.py"
    tree = dataclasses.asdict(make_config(tmp_path, weights, **{"data.codec_weights": ""}))
    config.write_text(
        "import ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({tree!r})\n",
        encoding="utf-8",
    )
    flags = [
        "--config",
        str(config),
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.path=episodes",
        f"--config.data.codec_weights={weights / 'vae'}",
    ]
    assert (
        __main__.main(
            [
                "latents",
                "--in",
                str(reference / "train"),
                "--val_in",
                str(reference / "val"),
                *flags,
            ]
        )
        == 0
    )
    assert __main__.main(["texts", "--in", str(reference / "texts"), *flags]) == 0
    out = capsys.readouterr().out
    assert "train windows" in out and "2 prompts of" in out
    assert __main__.main(["latents", "--in", str(tmp_path), *flags]) == 2
    assert "holds no latent cache" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["inspect", "x", "--config.data.path=y"])
