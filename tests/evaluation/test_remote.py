"""A policy behind a server gives the episodes that it gives here."""

import threading
import time

import numpy as np
import pytest

from lightwam_jax.evaluation import remote, rollout
from tests import served
from tests.evaluation.test_rollout import episodes, evaluation, spec

HASH, BATCH = "0badcafe", 4


def walk(images, state, prompts):
    """f32 [B,12,2], from every input."""
    shade = images["scene"].mean((1, 2, 3)) / 255 + images["wrist"][:, 0, 0, 0] / 255
    word = np.array([int(prompt.split()[-1]) for prompt in prompts])
    step = (0.02 + 0.02 * shade + 0.01 * word)[:, None, None]
    toward = np.clip(state[:, None, 2:] - state[:, None, :2], -1, 1)
    return np.repeat(toward * step, 12, axis=1).astype(np.float32)


class Walker(served.StandIn):
    def __init__(self):
        known = [f"goal {number}" for number in range(3)]
        super().__init__(served.config(state=4, action=2, action_horizon=12), known=known)

    def act(self, images, state, prompts, return_taps=False, rows=None):
        self.calls.append((list(prompts), rows))
        return walk(images, state, prompts)


@pytest.fixture(scope="module")
def server():
    options = {"exact": True, "max_batch": BATCH, "weights_hash": HASH, "key": "secret"}
    with served.serving(Walker(), **options) as running:
        yield running


def connected(server, **changes):
    given = {"url": server.url, "checksum": HASH, "batch": BATCH, "key": "secret"}
    return remote.RemotePolicy(**given | changes)


def test_episodes_are_those_of_the_policy_here(server):
    config, five = evaluation(batch=BATCH, episodes=5, workers=1), episodes(*range(5))
    here = rollout.run(walk, spec(), five, config)
    with connected(server) as policy:
        there = rollout.run(policy.act, spec(), five, config)
    assert [e.checksum for e in here] == [e.checksum for e in there]
    assert len({e.checksum for e in here}) == 5 and any(e.success for e in here)
    assert "p50" in policy.line() and "4 connections" in policy.line()
    assert "secret" not in str(policy.describe()) and policy.describe()["batching"]["exact"]
    assert policy.guarded == {"clamped": 0, "limited": 0, "snapped": 0}


def test_rows_come_back_in_order_and_padding_is_asked_for_once(server):
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (9, 4, 4, 3), np.uint8) for c in served.CAMERAS}
    state, prompts = rng.normal(size=(9, 4)).astype(np.float32), [f"goal {i % 3}" for i in range(9)]
    for array in (*images.values(), state):
        array[7:] = array[0]
    prompts[7:] = prompts[:1] * 2
    with connected(server) as policy:
        server.policy.calls.clear()
        plans = policy.act(images, state, prompts)
    np.testing.assert_array_equal(plans, walk(images, state, prompts))
    assert sum(len(asked) for asked, _ in server.policy.calls) == 7
    assert {rows for _, rows in server.policy.calls} == {BATCH}


def test_another_checkpoint_is_refused(server):
    with pytest.raises(
        ValueError, match=r"serves the checkpoint 0badcafe, --workdir holds 00000001"
    ):
        connected(server, checksum="00000001")
    unnamed, refused = (
        served.serving(Walker(), metadata="short"),
        pytest.raises(ValueError, match=r"it does not say"),
    )
    with unnamed as silent, refused:
        connected(silent, key="")
    with pytest.raises(PermissionError, match="401"):
        connected(server, key="wrong")


def test_an_address_is_told_without_what_stands_before_the_host():
    assert remote._place("wss://user:word@gpu.example:8000/?key=1") == "wss://gpu.example:8000"


def waiting_threads(before):
    """Threads that are there now and were not; those that end are waited for."""
    end = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def test_closed_it_keeps_neither_threads_nor_connections(server, monkeypatch):
    before = set(threading.enumerate())
    with connected(server) as policy:
        images = {c: np.zeros((BATCH, 4, 4, 3), np.uint8) for c in served.CAMERAS}
        state = np.arange(4 * BATCH, dtype=np.float32).reshape(BATCH, 4)
        policy.act(images, state, ["goal 1"] * BATCH)
        assert any(thread.name.startswith("remote") for thread in threading.enumerate())
    assert not waiting_threads(before)
    with pytest.raises(RuntimeError, match="shutdown"):
        policy.act(images, state, ["goal 1"] * BATCH)
    opened, open_ = [], remote.client_lib.Client

    def second_fails(*arguments, **more):
        if opened:
            raise ConnectionError("too many clients")
        opened.append(open_(*arguments, **more))
        return opened[0]

    monkeypatch.setattr(remote.client_lib, "Client", second_fails)
    with pytest.raises(ConnectionError, match="too many clients"):
        connected(server)
    assert opened[0]._socket is None and not waiting_threads(before)


def test_a_server_that_changed_is_noticed(server):
    with connected(server) as policy:
        images = {c: np.zeros((1, 4, 4, 3), np.uint8) for c in served.CAMERAS}
        asked = images, np.zeros((1, 4), np.float32), ["goal 1"]
        policy.act(*asked)
        last = policy._clients[-1]
        last.metadata = last.metadata | {"weights_hash": "deadbeef"}
        with pytest.raises(ValueError, match="restarted with another checkpoint"):
            policy.act(*asked)
