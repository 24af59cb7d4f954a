"""Raw windows as records, for the cache and for pixels: row by row, against the episodes."""

import collections

import numpy as np
import pytest
import synthetic

from lightwam_jax.data import cache_build, episodes, pixels
from tests.test_fingerprint import recorded

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
    windows = pixels.Windows(found, TASKS, synthetic.make_config(""))
    assert len(windows) == sum(episode.length for episode in found)
    for row, (episode, start) in enumerate(places(found)):
        record = windows[row]
        frames = check(record, episode, start)
        wanted = [episode.images[camera][frames] for camera in ("scene", "wrist")]
        np.testing.assert_array_equal(record["video"], np.concatenate(wanted, axis=2))
    assert len(pixels.Windows([], TASKS, synthetic.make_config(""))) == 0


@pytest.mark.parametrize("begin", [0, 2])
def test_records_of_a_batch_are_numbered_from_its_start(begin):
    Batch = collections.namedtuple("Batch", "episode start windows")
    number = {task: i for i, task in enumerate(TASKS)}
    for episode in recorded():
        windows = [
            episodes.window(episode.length, start, 9, 2, 8)
            for start in range(begin, episode.length)
        ]
        latents = np.arange(len(windows))
        made = list(cache_build._records(Batch(episode, begin, windows), latents, number))
        assert [record["start"] for record in made] == list(range(begin, episode.length))
        assert [record["latents"] for record in made] == latents.tolist()
        for record in made:
            check(record, episode, record["start"])
            assert record["episode"] == episode.id


def test_a_picture_is_laid_out_once_and_lands_in_every_window_that_shows_it(monkeypatch):
    config, (episode, *_) = synthetic.make_config(""), recorded()
    windows = [episodes.window(episode.length, start, 9, 2, 8) for start in range(episode.length)]
    seen, lay_out = [], cache_build.cache.lay_out

    def counting(images, *arguments):
        seen.append(len(images["scene"]))
        return lay_out(images, *arguments)

    monkeypatch.setattr(cache_build.cache, "lay_out", counting)
    videos = np.concatenate(list(cache_build._videos(episode, [windows[:2], windows[2:]], config)))
    assert sum(seen) == episode.length
    both = np.concatenate([episode.images["scene"], episode.images["wrist"]], axis=2)
    for start, video in enumerate(videos):
        np.testing.assert_array_equal(video, both[window(episode.length, start)[0]])
