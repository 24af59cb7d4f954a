"""What tells one dataset, or one config of it, from another; which clips a codec is fitted on."""

import dataclasses
import types

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from tests import synthetic


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded(episodes.ArrayEpisode):
    """Its instruction changes at a step."""

    turn: int = 3
    then: str = "go home"

    def task_at(self, step):
        return self.task if step < self.turn else self.then


def recorded(count=3):
    return [
        Recorded(**{field.name: getattr(e, field.name) for field in dataclasses.fields(e)})
        for e in synthetic.make_episodes(count)
    ]


def test_a_fingerprint_sees_everything_but_later_images():
    config = synthetic.make_config("")
    alone = latent_cache.fingerprint(recorded(), config)
    assert len(alone) == 16 and latent_cache.fingerprint(recorded(), config) == alone
    seen = {alone}

    def differs(number=1, **changes):
        found = recorded()
        found[number] = dataclasses.replace(found[number], **changes)
        before = len(seen)
        seen.add(latent_cache.fingerprint(found, config))
        return len(seen) == before + 1

    one, (first, *_) = recorded()[1], recorded()
    assert differs(id="another")
    assert differs(task="lift") and differs(turn=4) and differs(then="stop")
    assert differs(state=one.state + np.eye(len(one.state), 8)) and differs(action=one.action * 2)
    last = one.action.copy()
    last[-1, -1] += 1
    assert differs(action=last)
    for camera in ("scene", "wrist"):
        changed = {**first.images, camera: first.images[camera].copy()}
        changed[camera][0, 3, 3, 1] += 1
        assert differs(0, images=changed), camera
        changed[camera] = first.images[camera].copy()
        changed[camera][1:] += 1
        assert not differs(0, images=changed), "only the very first image is read"
    assert latent_cache.fingerprint(recorded()[::-1], config) not in seen
    assert latent_cache.fingerprint(recorded()[:2], config) not in seen
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, cameras=("scene",)))
    assert latent_cache.fingerprint(recorded(), single) not in seen


def test_instructions_are_those_of_every_step_in_the_order_of_use():
    first, second, third = recorded()
    never = dataclasses.replace(third, turn=99, task="lift")
    assert episodes.tasks([first, second, never]) == [
        synthetic.TASKS[0],
        "go home",
        synthetic.TASKS[1],
        "lift",
    ]
    at_the_end = dataclasses.replace(first, turn=first.length - 1)
    assert episodes.tasks([at_the_end]) == [synthetic.TASKS[0], "go home"]
    from_the_start = dataclasses.replace(first, turn=0)
    assert episodes.tasks([from_the_start]) == ["go home"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.source", "hdf5"),
        ("data.path", "elsewhere"),
        ("data.exclude", ("a",)),
        ("data.fields.state", ("pose",)),
        ("data.cameras", ("scene",)),
        ("data.orientation", ("", "rotate_180")),
        ("data.camera_size", (16, 16)),
        ("data.layout", "vertical"),
        ("data.canvas", (64, 64)),
        ("data.codec", "wan21"),
        ("data.num_frames", 17),
        ("data.frame_stride", 1),
        ("data.action_horizon", 16),
        ("data.val_fraction", 0.25),
        ("model.latent_channels", 8),
        ("data.state_dim", 6),
        ("data.action_dim", 5),
        ("model.proprio_dim", 6),
        ("model.action_dim", 5),
    ],
)
def test_every_key_that_shapes_a_record_makes_a_cache_stale(key, value):
    config = synthetic.make_config("")
    have = latent_cache.wanted(config)
    assert not latent_cache.differences(have, config)
    parts, changed = key.split("."), value
    for depth in range(len(parts) - 1, -1, -1):
        owner = config
        for part in parts[:depth]:
            owner = getattr(owner, part)
        changed = dataclasses.replace(owner, **{parts[depth]: changed})
    (line,) = latent_cache.differences(have, changed)
    assert key in line
    value = list(value) if isinstance(value, tuple) else value
    assert line.endswith(f"config {value!r}")


def test_records_are_as_wide_as_the_data():
    config = synthetic.make_config("", **{"model.proprio_dim": 12, "model.action_dim": 14})
    data = dataclasses.replace(config.data, state_dim=8, action_dim=7)
    features = latent_cache.features(dataclasses.replace(config, data=data))
    assert features["proprio"].shape == (8,) and features["actions"].shape == (8, 7)
    assert features["action_is_pad"].shape == (8,) and features["image_is_pad"].shape == (5,)
    assert features["latents"].shape == (2, 4, 8, config.model.latent_channels)


class Numbered:
    """An episode whose images say which episode and frame they are."""

    def __init__(self, number, length):
        self.id, self.number, self.length = f"episode {number}", number, length

    def frames(self, camera, indices):
        out = np.zeros((len(indices), 32, 32, 3), np.uint8)
        out[..., 0], out[..., 2] = self.number, camera == "wrist"
        out[..., 1] = np.asarray(indices)[:, None, None]
        return out


def test_clips_are_spread_over_episodes_and_over_their_steps():
    config = synthetic.make_config("")  # nine frames, every second one
    found = [Numbered(number, 20 + number) for number in range(5)]
    clips = windows_lib.clips(found, config, most_episodes=3, per_episode=4)
    assert clips.shape == (12, 5, 32, 64, 3)
    assert clips[:, 0, 0, 0, 0].tolist() == [0] * 4 + [2] * 4 + [4] * 4
    # 19 / 3, 21 / 3 and 23 / 3 apart; of five frames those past the end repeat the last
    starts = [0, 6, 12, 19, 0, 7, 14, 21, 0, 7, 15, 23]
    assert clips[:, 0, 0, 0, 1].tolist() == starts
    assert clips[2, :, 0, 0, 1].tolist() == [12, 14, 16, 18, 19]
    assert clips[3, :, 0, 0, 1].tolist() == [19] * 5
    assert clips[..., 2].max() == 1 and clips[:, :, :, :32, 2].max() == 0
    few = windows_lib.clips([Numbered(7, 2)], config, most_episodes=3, per_episode=4)
    assert few[:, :, 0, 0, :2].tolist() == [[[7, 0]] + [[7, 1]] * 4, [[7, 1]] * 5]


def test_a_cache_lies_with_its_member():
    config = types.SimpleNamespace(data=types.SimpleNamespace(cache="there", dataset=""))
    assert latent_cache.latents_directory(config) == "there/latents"
    config.data.dataset = "arm"
    assert latent_cache.latents_directory(config) == "there/latents_arm"
