"""One set of demonstrations in five layouts: the same samples, trained on by the same commands."""

import json

import numpy as np
import pytest

from configs import demo
from lightwam_jax import config as config_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import lerobot_write
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs import record
from lightwam_jax.envs.demo import tabletop as demo_lib
from tests import test_end_to_end, writers

CAMERAS = ("scene", "wrist")
LAYOUTS = ("lerobot21", "lerobot30", "rlds", "robomimic", "robotwin")


@pytest.fixture(scope="module")
def demonstrations():
    """Four recordings of the demo environment, the last ones cut short."""
    env, found = demo_lib.make(), []
    for seed, most in enumerate((60, 60, 12, 5)):
        episode = envs_base.EpisodeSpec("tabletop", 0, seed)
        _, prompt, arrays = record.demonstrate(demo_lib, env, episode, 0.5, most)
        images = {camera: arrays[camera] for camera in CAMERAS}
        found.append(
            episodes.ArrayEpisode(
                f"seed_{seed}", demo_lib.FPS, prompt, arrays["state"], arrays["action"], images
            )
        )
    return found


@pytest.fixture(scope="module")
def written(demonstrations, tmp_path_factory):
    """{layout: config keys that read it}."""
    root = tmp_path_factory.mktemp("layouts")
    keys = {name: getattr(writers, name)(root, demonstrations, CAMERAS) for name in LAYOUTS[2:]}
    for name, version in (("lerobot21", "2.1"), ("lerobot30", "3.0")):
        lerobot_write.write(demonstrations, root / name, version, CAMERAS)
        keys[name] = {"data.source": "lerobot", "data.path": str(root / name)}
    return keys


def read(keys):
    c = demo.get_config()
    c.update_from_flattened_dict(keys)
    config = config_lib.from_config_dict(c)
    return config, episodes.load_episodes(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_reads_back_to_the_same_windows(layout, written, demonstrations):
    config, found = read(written[layout])
    assert len(found) == len(demonstrations)
    data = config.data
    for back, episode in zip(found, demonstrations):
        assert (back.length, back.fps, back.task) == (episode.length, episode.fps, episode.task)
        np.testing.assert_array_equal(back.state, episode.state)
        np.testing.assert_array_equal(back.action, episode.action)
        starts = (0, episode.length // 2, episode.length - 1)
        for start in starts:
            ours, theirs = (
                windows_lib.window_at(
                    e.length, start, data.num_frames, data.frame_stride, data.action_horizon
                )
                for e in (back, episode)
            )
            np.testing.assert_array_equal(back.action[ours.actions], episode.action[theirs.actions])
            np.testing.assert_array_equal(ours.action_is_pad, theirs.action_is_pad)
            np.testing.assert_array_equal(ours.image_is_pad, theirs.image_is_pad)
            got, want = (
                windows_lib.canvases(e, ours.frames, config).astype(np.float32)
                for e in (back, episode)
            )
            assert np.abs(got - want).mean() < (0.5 if layout == "robomimic" else 4)
    if layout == "robomimic":  # keeps images as they are
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_frame_is_nearest_to_itself(layout, written, demonstrations):
    """The codec's loss is far smaller than a step of the robot: one frame off would be found."""
    config, found = read(written[layout])
    episode = demonstrations[0]
    steps = np.arange(0, episode.length, 3)
    wanted = cameras_lib.canvas({c: episode.frames(c, steps) for c in CAMERAS}, config.data)
    got = windows_lib.canvases(found[0], steps, config)
    error = np.square(wanted[:, None].astype(np.float32) - got[None]).mean(axis=(2, 3, 4))
    assert (error.argmin(axis=0) == np.arange(len(steps))).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_needs_another_config_only(layout, written, demonstrations, tmp_path):
    small = {
        **test_end_to_end.SMALL,
        **written[layout],
        "data.cache": tmp_path / "cache",
        "data.val_fraction": 0.25,
        "train.steps": 2,
    }
    config = ["--config", "configs/demo.py", *(f"--config.{k}={v}" for k, v in small.items())]
    test_end_to_end.run("-m", "lightwam_jax.precompute", *config, "--what", "all")
    test_end_to_end.run("train.py", *config, "--workdir", str(tmp_path / "run"))
    meta = json.loads((tmp_path / "cache" / "latents" / "cache.json").read_text(encoding="utf-8"))
    lengths = sorted(episode.length for episode in demonstrations)
    assert sum(meta["records"].values()) == sum(lengths)
    assert meta["records"]["val"] in lengths, "one of the four is held out"
    assert sorted(meta["tasks"]) == sorted({episode.task for episode in demonstrations})
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")
    ]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses and np.isfinite(losses).all()
    stored = checkpoint.load_params(tmp_path / "run")
    assert stored.meta["step"] == 2 and stored.config.data.path == written[layout]["data.path"]
