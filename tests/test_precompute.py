"""Precompute, the latent cache and the assets, end to end on made-up episodes."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lightwam_jax import atomic, precompute
from lightwam_jax.data import assets, normalize
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.doctor import report as doctor_report
from lightwam_jax.encoders import text as text_lib
from tests import synthetic

STEPS = ("stats", "text", "latents")


@pytest.fixture
def members(monkeypatch):
    """Six episodes that every config of this file finds at its data.path."""
    found = synthetic.make_episodes()

    def read(config):
        return list(found), [p for episode in found for p in episodes_lib.check(episode, config)]

    monkeypatch.setattr(episodes_lib, "read", read)
    monkeypatch.setattr(doctor_report, "write", lambda report, directory: [directory])  # slow
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished cache; tests get copies."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_lib, "read", lambda config: (synthetic.make_episodes(), []))
        patch.setattr(doctor_report, "write", lambda report, directory: [directory])  # slow
        precompute.precompute(synthetic.make_config(root), STEPS)
    return root


@pytest.fixture
def config(made, tmp_path, members):
    shutil.copytree(made / "cache", tmp_path / "cache")
    return synthetic.make_config(tmp_path, **{"data.path": f"{made}/episodes"})


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def test_records_are_the_raw_windows(config, members):
    opened = latent_cache.open_cache(config)
    codec = assets.load_assets(assets.assets_directory(config), config).codec
    train, val = episodes_lib.split(members, config.data.val_fraction)
    for split, chosen in (("train", train), ("val", val)):
        source = opened.source(split)
        assert len(source) == opened.size(split) == sum(episode.length for episode in chosen)
        places = [(episode, start) for episode in chosen for start in range(episode.length)]
        for row in (0, len(places) // 2, len(places) - 1):
            record, (episode, start) = source[row], places[row]
            window = windows_lib.window_at(episode.length, start, 9, 2, 8)
            assert (record["episode"].decode(), record["start"]) == (episode.id, start)
            assert opened.meta["tasks"][record["task"]] == episode.task
            np.testing.assert_array_equal(record["proprio"], episode.state[start])
            np.testing.assert_array_equal(record["actions"], episode.action[window.actions])
            np.testing.assert_array_equal(record["action_is_pad"], window.action_is_pad)
            np.testing.assert_array_equal(record["image_is_pad"], window.image_is_pad)
            video = windows_lib.canvases(episode, window.frames, config)[None]
            assert record["latents"].dtype == ml_dtypes.bfloat16
            np.testing.assert_allclose(
                record["latents"].astype(np.float32), codec.encode(video)[0], atol=1e-3, rtol=1e-2
            )


def test_tensorflow_is_not_needed(config):
    latent_cache.open_cache(config).source("train")[0]
    assert "tensorflow" not in sys.modules


def test_second_run_changes_nothing(config, capsys):
    def stamps():
        return {
            os.path.join(where, name): os.stat(os.path.join(where, name)).st_mtime_ns
            for where, _, names in os.walk(config.data.cache)
            for name in names
        }

    before = stamps()
    capsys.readouterr()
    precompute.precompute(config, STEPS)
    assert stamps() == before
    out = capsys.readouterr().out
    assert out.count("up to date") == 4  # the report, and each of the three steps
    assert not [name for name in before if "partial" in name or name.endswith(".old")]


def test_statistics_are_of_the_training_episodes_and_printed(config, members, capsys):
    train, _ = episodes_lib.split(members, config.data.val_fraction)
    want = normalize.fit_statistics(train, 8)
    path = os.path.join(assets.assets_directory(config), "dataset_stats.json")
    got = normalize.read_statistics(path, 8, 7)
    assert got["action"] == want["action"] and got["num_episodes"] == len(train)
    os.remove(path)
    precompute.precompute(config, ("stats",))
    out = capsys.readouterr().out
    assert "state[7]" in out and "action[6]" in out and "q99" in out


def test_the_data_are_examined_first_and_again_when_asked_more(config, members, capsys):
    def examined(config, what=("stats",)):
        precompute.precompute(config, what)
        return "No error, 4 warnings in 6 episodes" in capsys.readouterr().out

    capsys.readouterr()
    assert not examined(config)
    assert examined(changed(config, "data", check_frames="all"))
    assert not examined(changed(config, "data", check_frames="none"), ("text", "latents"))
    members[1].action[2, 0] = np.nan
    for what, times in (("stats", 1), ("text", 0)):  # named once: printed, or in the message
        with pytest.raises(ValueError, match="1 error in the episodes") as refused:
            precompute.precompute(config, (what,))
        printed = capsys.readouterr().out
        assert printed.count("ERROR not finite (1)") == printed.count("frame 2): ") == times
        assert str(refused.value).count("frame 2): not finite") == 1 - times


def test_with_pixels_only_the_codec_is_made(config, capsys):
    shutil.rmtree(latent_cache.latents_directory(config))
    precompute.precompute(changed(config, "data", encode_online=True), ("latents",))
    assert "config.data.encode_online encodes during training" in capsys.readouterr().out
    assert not os.path.exists(latent_cache.latents_directory(config))


def test_given_statistics_are_kept(config, capsys):
    path = os.path.join(assets.assets_directory(config), "dataset_stats.json")
    with open(path, encoding="utf-8") as f:
        statistics = json.load(f)
    del statistics["made_from"]
    statistics["action"]["default"]["global_max"][2] = 8.5  # not of these data
    atomic.write_json(path, statistics)
    given = pathlib.Path(path).read_bytes()
    precompute.precompute(config, ("stats",))
    assert "kept as given" in capsys.readouterr().out
    assert pathlib.Path(path).read_bytes() == given
    latent_cache.open_cache(config)
    _, _, action = assets.load_normalizers(assets.assets_directory(config), config)
    np.testing.assert_allclose(action.inverse(np.ones(7))[2], 8.5)
    statistics["action"]["default"]["global_max"][2] = None
    atomic.write_json(path, statistics)
    with pytest.raises(
        ValueError, match=r"global_max of .action. holds no number in dimensions \[2\]"
    ):
        precompute.precompute(config, ("stats",))


def test_z_score_of_a_constant_dimension_warns(config, members, capsys):
    for episode in members:
        episode.action[:, 6] = 1
    precompute.precompute(changed(config, "data", normalization="z_score_reference"), ("stats",))
    captured = capsys.readouterr()
    assert "constant" in captured.out
    assert "action dimensions [6] never move" in captured.err


def test_a_stale_cache_lists_every_difference(config):
    fields = dataclasses.replace(config.data.fields, channel_order="bgr")
    other = changed(
        changed(
            config,
            "data",
            canvas=(32, 32),
            frame_stride=4,
            fields=fields,
            orientation=("", "rotate_180"),
            camera_size=(32, 16),
        ),
        "model",
        action_dim=6,
    )
    with pytest.raises(ValueError) as error:
        latent_cache.open_cache(other)
    message = str(error.value)
    assert "config.data.canvas: cache [32, 64], config [32, 32]" in message
    assert "config.data.frame_stride: cache 2, config 4" in message
    assert "config.data.action_dim, or else model.action_dim: cache 7, config 6" in message
    assert "config.data.fields.channel_order: cache 'rgb', config 'bgr'" in message
    assert "config.data.orientation: cache [], config ['', 'rotate_180']" in message
    assert "config.data.camera_size: cache [], config [32, 16]" in message
    assert "--what stats,text,latents" in message


def test_other_data_makes_the_cache_stale_and_rebuilds_it(config, members):
    before = latent_cache.open_cache(config).meta
    members.append(dataclasses.replace(members[0], id="new"))
    precompute.precompute(config, ("stats",))
    with pytest.raises(ValueError, match=r"training data: cache \w+, statistics \w+"):
        latent_cache.open_cache(config)
    precompute.precompute(config, STEPS)
    after = latent_cache.open_cache(config).meta
    assert after["data"] != before["data"] and after["codec"] != before["codec"]
    assert sum(after["records"].values()) == sum(e.length for e in members)


def test_moved_data_keep_their_latents(config, capsys):
    moved = changed(config, "data", path="elsewhere")
    with pytest.raises(ValueError, match=r"config.data.path: cache .*, config 'elsewhere'"):
        latent_cache.open_cache(moved)
    precompute.precompute(moved, ("latents",))
    assert "up to date" in capsys.readouterr().out
    latent_cache.open_cache(moved)


def test_keys_that_only_normalise_or_pad_need_no_new_cache(config):
    wider = changed(
        changed(config, "data", action_dim=7, normalization="quantile"), "model", action_dim=14
    )
    latent_cache.open_cache(wider)


def test_an_interrupted_build_leaves_the_old_cache(config, members):
    before = latent_cache.open_cache(config).meta
    members[0].action[0] += 1
    members[5].images["scene"] = members[5].images["scene"].astype(np.float32)
    with pytest.raises(ValueError, match=r"episode episode_005: camera 'scene' gives float32"):
        precompute.precompute(config, ("latents",))
    assert latent_cache.read_meta(config) == before
    assert (
        len(latent_cache.Cache(before, latent_cache.latents_directory(config)).source("train")) > 0
    )


def test_other_images_of_the_same_motion_are_noticed(config, members):
    train, _ = episodes_lib.split(members, config.data.val_fraction)
    train[0].images["wrist"] = train[0].images["wrist"] // 2
    before = latent_cache.read_meta(config)["data"]
    precompute.precompute(config, ("latents",))
    assert latent_cache.read_meta(config)["data"] != before


def test_no_validation_split(tmp_path, members):
    config = synthetic.make_config(tmp_path / "other", **{"data.val_fraction": 0.0})
    precompute.precompute(config, STEPS)
    assert latent_cache.open_cache(config).size("val") == 0
    assert latent_cache.open_cache(config).meta["psnr"]["frames"] == "training"


def test_assets_are_all_a_policy_needs(config, tmp_path):
    directory = assets.assets_directory(config)
    os.rename(directory, tmp_path / "elsewhere")  # as inside a checkpoint, without the cache
    loaded = assets.load_assets(str(tmp_path / "elsewhere"), config)
    assert loaded.codec.latent_channels == config.model.latent_channels
    assert loaded.state.scale.shape == (8,) and loaded.action.scale.shape == (7,)
    prompts = [
        text_lib.prompt(task, config.data.prompt_template)
        for task in (synthetic.TASKS[0], "put the green cube in the bowl")
    ]
    context, mask = loaded.text_encoder.encode(prompts, 24)
    assert context.shape == (2, 24, 32) and mask.sum() == 2 * 20


def test_assets_of_another_config_are_refused(config):
    directory = assets.assets_directory(config)
    with pytest.raises(ValueError, match=r"data.prompt_template: cache .*, config 'do {task}'"):
        assets.load_assets(directory, changed(config, "data", prompt_template="do {task}"))
    with pytest.raises(ValueError, match=r"16 channels, config.model.latent_channels is 8"):
        assets.load_assets(directory, changed(config, "model", latent_channels=8))
    with pytest.raises(ValueError, match=r"has 7 dimensions, config.model.action_dim is 14"):
        assets.load_assets(directory, changed(config, "model", action_dim=14))


def test_new_template_remakes_the_text(config):
    other = changed(config, "data", prompt_template="do {task}")
    precompute.precompute(other, ("text",))
    stored = assets.load_text(assets.assets_directory(other), other)
    assert sorted(stored.prompts) == sorted(f"do {task}" for task in synthetic.TASKS)


def test_steps_and_sources(config, capsys):
    with pytest.raises(ValueError, match=r"--what=latent: latent is not a step; expected some of"):
        precompute.precompute(config, ("latent",))
    with pytest.raises(ValueError, match=r"config.data.cache is empty"):
        precompute.precompute(changed(config, "data", cache=""), ("stats",))
    precompute.precompute(changed(config, "data", source="fake"), ("all",))
    assert "nothing to precompute" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"config.data.codec is 'wan23'; known codecs: 'pca'"):
        precompute.precompute(changed(config, "data", codec="wan23"), ("latents",))

    precompute.precompute(config, ("all",))
    assert capsys.readouterr().out.count("up to date") == 4


def test_wrong_action_width_says_both_numbers(tmp_path, members, capsys):
    config = synthetic.make_config(tmp_path, **{"model.action_dim": 14})
    with pytest.raises(ValueError, match="1 error in the episodes"):
        precompute.precompute(config, ("stats",))
    printed = capsys.readouterr().out  # of the whole set: once
    assert printed.count("action has 7 dimensions, the config says 14") == 1
    assert f"in all {len(members)} episodes" in printed


def test_command_line():
    """A mistake in a flag ends before anything is read, with the advice as the last line."""
    command = [
        sys.executable,
        "-m",
        "lightwam_jax.precompute",
        "--config",
        "configs/base.py",
        "--config.data.source=lerobot",
        "--config.data.cache=unused",
        "--what=stats",
    ]
    done = subprocess.run(
        command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: config.data.path='' is not a directory of episodes; correct it")


def test_missing_cache_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished latent cache; make it with: .*all"):
        latent_cache.open_cache(synthetic.make_config(tmp_path))
