"""Raw windows as records, for the cache and for pixels: row by row, against the episodes."""

import collections
import types

import numpy as np
import pytest

from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import build_latents
from lightwam_jax.data.caches import latents as latent_cache
from tests import synthetic
from tests.data.caches.test_fingerprint import recorded

TASKS = ["go home", *synthetic.TASKS]  # not in the order of use


def window(length, start):
    """Five frames two steps apart and eight actions, clamped to the last step."""
    frames, actions = start + np.arange(0, 9, 2), start + np.arange(8)
    return np.minimum(frames, length - 1), np.minimum(actions, length - 1), frames, actions


def places(found):
    return [(episode, start) for episode in found for start in range(episode.length)]


def check(record, episode, start):
    frames, actions, unclamped, steps = window(episode.length, start)
    assert record["proprio"].dtype == record["actions"].dtype == np.float32
    np.testing.assert_array_equal(record["proprio"], episode.state[start])
    np.testing.assert_array_equal(record["actions"], episode.action[actions])
    np.testing.assert_array_equal(record["image_is_pad"], unclamped >= episode.length)
    np.testing.assert_array_equal(record["action_is_pad"], steps >= episode.length)
    changed = start >= 3  # its instruction changes then
    assert TASKS[record["task"]] == ("go home" if changed else episode.task)
    return frames


def test_pixels_are_windows_of_every_step_of_every_episode():
    found = recorded()
    windows = windows_lib.Windows(found, TASKS, synthetic.make_config(""))
    assert len(windows) == sum(episode.length for episode in found)
    for row, (episode, start) in enumerate(places(found)):
        record = windows[row]
        frames = check(record, episode, start)
        wanted = [episode.images[camera][frames] for camera in ("scene", "wrist")]
        np.testing.assert_array_equal(record["video"], np.concatenate(wanted, axis=2))
    assert len(windows_lib.Windows([], TASKS, synthetic.make_config(""))) == 0


@pytest.mark.parametrize("begin", [0, 2])
def test_records_of_a_batch_are_numbered_from_its_start(begin):
    Batch = collections.namedtuple("Batch", "episode start windows")
    number = {task: i for i, task in enumerate(TASKS)}
    for episode in recorded():
        windows = [
            windows_lib.window_at(episode.length, start, 9, 2, 8)
            for start in range(begin, episode.length)
        ]
        latents = np.arange(len(windows))
        made = list(build_latents._records(Batch(episode, begin, windows), latents, number))
        assert [record["start"] for record in made] == list(range(begin, episode.length))
        assert [record["latents"] for record in made] == latents.tolist()
        for record in made:
            check(record, episode, record["start"])
            assert record["episode"] == episode.id


def plan(splits, **imported):
    codec = types.SimpleNamespace(id="its id")
    return build_latents._plan(synthetic.make_config(""), splits, codec, imported)


def test_a_plan_tells_training_from_validation():
    a, b, c = recorded()
    config = synthetic.make_config("")
    got = plan({"train": [b, a], "val": [c]}, val="note")
    assert got["records"] == {"train": a.length + b.length, "val": c.length}
    assert got["episodes"] == {"train": [b.id, a.id], "val": [c.id]}
    assert got["tasks"] == [b.task, "go home", a.task]
    assert got["data"] == latent_cache.fingerprint([b, a, c], config)
    assert got["train_data"] == latent_cache.fingerprint([b, a], config)
    assert (got["codec"], got["imported"]) == ("its id", {"val": "note"})
    assert [shard["split"] for shard in got["shards"]] == ["train", "val"]


@pytest.mark.parametrize(
    "most, ends", [(100, [[0, 4]]), (12, [[0, 2], [2, 4]]), (11, [[0, 1], [1, 3], [3, 4]])]
)
def test_a_shard_is_as_many_whole_episodes_as_fit(monkeypatch, most, ends):
    """Episodes of 7, 5, 6 and 6 steps; at least one in each."""
    found = [types.SimpleNamespace(length=n) for n in (7, 5, 6, 6)]
    monkeypatch.setattr(build_latents, "SHARD_BYTES", most * 10 + 9)
    shards = build_latents._shards("val", found, 10)
    assert [shard["episodes"] for shard in shards] == ends
    lengths = [sum(e.length for e in found[first:last]) for first, last in ends]
    assert [shard["records"] for shard in shards] == lengths
    assert len({shard["file"] for shard in shards}) == len(ends)
    monkeypatch.setattr(build_latents, "_MOST_SHARDS", 1)
    assert [shard["episodes"] for shard in build_latents._shards("val", found, 10)] == [[0, 4]]
    monkeypatch.setattr(build_latents, "_MOST_SHARDS", 512)
    monkeypatch.setattr(build_latents, "SHARD_BYTES", 1)
    assert len(build_latents._shards("val", found, 10)) == 4


def test_the_codec_is_judged_on_held_out_images_frame_kind_by_frame_kind(monkeypatch):
    asked = []

    def clips(found, config, most, each):
        asked.append((found, most, each))
        return np.full((2, 5, 32, 64, 3), 100, np.uint8)

    class Codec:
        def encode(self, video):
            return video

        def decode(self, latents):
            out = latents.copy()
            out[:, 0] += 1
            out[:, 1:] += 10
            return out

    monkeypatch.setattr(windows_lib, "clips", clips)
    got = build_latents._quality("config", {"train": ["t"], "val": ["v"]}, Codec())
    # 10 log10(255^2 / 1) and / 100
    assert got == {"first": 48.13, "later": 28.13, "frames": "held-out"}
    without = build_latents._quality("config", {"train": ["t"], "val": []}, Codec())
    assert without["frames"] == "training"
    assert [found for found, *_ in asked] == [["v"], ["t"]]


def test_a_image_is_laid_out_once_and_lands_in_every_window_that_shows_it(monkeypatch):
    config, (episode, *_) = synthetic.make_config(""), recorded()
    windows = [
        windows_lib.window_at(episode.length, start, 9, 2, 8) for start in range(episode.length)
    ]
    seen, lay_out = [], windows_lib.lay_out

    def counting(images, *arguments):
        seen.append(len(images["scene"]))
        return lay_out(images, *arguments)

    monkeypatch.setattr(windows_lib, "lay_out", counting)
    videos = np.concatenate(
        list(build_latents._videos(episode, [windows[:2], windows[2:]], config))
    )
    assert sum(seen) == episode.length
    both = np.concatenate([episode.images["scene"], episode.images["wrist"]], axis=2)
    for start, video in enumerate(videos):
        np.testing.assert_array_equal(video, both[window(episode.length, start)[0]])
