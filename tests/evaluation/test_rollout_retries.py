"""How often an episode is tried, and what tells two simulators apart."""

import collections

import numpy as np

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import rollout, worker

EPISODE = envs_base.EpisodeSpec("goal", 2, 7)


class Env:
    """Shows what it is given."""

    def __init__(self, pixel=0, state=0.0, camera="scene"):
        image = np.full((2, 2, 3), pixel, np.uint8)
        self._seen = {
            "images": {camera: image},
            "state": np.float32([state, 1]),
            "prompt": "go",
        }

    def reset(self, episode):
        return self._seen


def fingerprint(**shown):
    spec = envs_base.EnvSpec("tests.evaluation.test_rollout_retries:Env", shown)
    return worker.describe(spec, EPISODE)["reset_frame"]


def test_a_crashing_episode_is_tried_twice():
    engine = object.__new__(rollout._Engine)
    engine._queue = collections.deque()
    slot = rollout._Slot(worker=None, index=0, episode=EPISODE, attempt=1, observation={})
    assert engine._failed(slot, "it broke") == []
    assert list(engine._queue) == [(EPISODE, 2)]
    assert slot.episode is None and slot.observation is None
    slot.episode, slot.attempt = engine._queue.popleft()
    (result,) = engine._failed(slot, "it broke again")
    assert (result.success, result.error) == (None, "it broke again") and not engine._queue


def test_the_fingerprint_of_a_simulator_covers_images_cameras_and_state():
    one = fingerprint()
    assert one == fingerprint() and one["episode"] == "goal/2/7"
    others = [fingerprint(pixel=1), fingerprint(state=0.5), fingerprint(camera="wrist")]
    assert len({other["sha256"] for other in (one, *others)}) == 4
