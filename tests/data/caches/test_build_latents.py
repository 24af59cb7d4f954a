"""Parts of the latent cache: imported latents, the quality of the codec, the fingerprint."""

import dataclasses

import numpy as np
import pytest

from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import build_latents
from lightwam_jax.data.caches import latents as latent_cache
from tests import synthetic

CONFIG = synthetic.make_config()


@pytest.fixture(scope="module")
def episodes():
    return synthetic.make_episodes(3)


def test_imported_latents_are_counted_through_all_episodes_of_a_split(episodes):
    total = sum(episode.length for episode in episodes)
    latents = np.arange(total, dtype=np.float32).reshape(total, 1, 1, 1, 1)
    shards = [{"split": "train", "file": "x", "episodes": [0, 3], "records": total}]
    imported = {"train": (latents, None)}
    batches = list(build_latents._batches(shards, {"train": episodes}, CONFIG, imported))
    seen = np.concatenate([batch.latents.ravel() for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(total))
    assert [batch.episode.id for batch in batches if not batch.start] == [e.id for e in episodes]


def test_the_quality_is_measured_on_held_out_images_where_there_are_any(monkeypatch, episodes):
    class Copies:
        encode = decode = staticmethod(lambda clips: clips)

    measured = []

    def clips(episodes, config, most, each):
        measured.append([episode.id for episode in episodes])
        return np.zeros((1, 5, 8, 8, 3), np.uint8)

    monkeypatch.setattr(windows_lib, "clips", clips)
    train, val = episodes[:2], episodes[2:]
    held_out = build_latents._quality(CONFIG, {"train": train, "val": val}, Copies())
    without = build_latents._quality(CONFIG, {"train": train, "val": []}, Copies())
    assert measured == [[e.id for e in val], [e.id for e in train]]
    assert (held_out["frames"], without["frames"]) == ("held-out", "training")


def test_the_fingerprint_covers_ids_states_actions_and_the_first_image(episodes):
    first = episodes[0]
    images = {camera: frames.copy() for camera, frames in first.images.items()}
    images["wrist"][0, 0, 0, 0] ^= 1
    action, state = first.action.copy(), first.state.copy()
    action[-1, 0] += 1
    state[-1, 0] += 1
    changes = (
        {},
        {"id": "another"},
        {"task": "another"},
        {"action": action},
        {"state": state},
        {"images": images},
    )
    found = [
        latent_cache.fingerprint([dataclasses.replace(first, **change), *episodes[1:]], CONFIG)
        for change in changes
    ]
    assert len(set(found)) == len(changes)
    assert (
        latent_cache.fingerprint(episodes[:2], CONFIG)
        != found[0]
        == latent_cache.fingerprint(episodes, CONFIG)
    )
