"""One thread asks the policy: oldest first, one of each session, images of one size together."""

import threading
import time

import numpy as np
import pytest

from lightwam_jax.inference import batching
from tests.served import PROMPTS, StandIn, plan


def observation(seed, size=(8, 8)):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (*size, 3), np.uint8) for c in ("scene", "wrist")}
    state = rng.uniform(0.1, 1, 5).astype(np.float32)
    return batching.Observation(images, state, PROMPTS[seed % 2])


def own(observation_):
    return plan(observation_.images, observation_.state, observation_.prompt)


class Held:
    """A policy whose first call waits until `go`; what comes meanwhile waits together."""

    def __init__(self, **arguments):
        self.policy, self._go, self._begun = StandIn(), threading.Event(), threading.Event()
        self.policy.hook = lambda prompts: (self._begun.set(), self._go.wait(10))
        self.batcher = batching.Batcher(self.policy, **arguments)
        self.first = self.batcher.submit(observation(99))
        assert self._begun.wait(10)

    def go(self):
        self.policy.hook = None
        self._go.set()


def test_what_waits_goes_together_oldest_first_and_each_gets_its_own():
    held = Held(max_batch=4)
    futures = [held.batcher.submit(observation(n), session=n) for n in range(6)]
    assert held.batcher.depth == 6 and held.batcher.busy_s > 0
    held.go()
    planned = [future.result(10) for future in futures]
    for number, each in enumerate(planned):
        np.testing.assert_array_equal(each.actions, own(observation(number)))
        assert each.queue_s > 0 and each.infer_s > 0
    assert [each.batch for each in planned] == [4, 4, 4, 4, 2, 2]
    assert held.first.result(10).batch == 1
    held.batcher.close(5)
    assert held.batcher.busy_s == 0
    with pytest.raises(RuntimeError, match="closed"):
        held.batcher.submit(observation(0))


def test_a_session_has_one_request_in_a_batch_and_keeps_its_order():
    held = Held(max_batch=8)
    order = []
    futures = []
    for number, session in enumerate("aabab"):
        future = held.batcher.submit(observation(number), session=session)
        future.add_done_callback(lambda _, number=number: order.append(number))
        futures.append(future)
    held.go()
    assert [future.result(10).batch for future in futures] == [2, 2, 2, 1, 2]
    assert order == [0, 2, 1, 4, 3]


def test_images_of_another_size_wait_for_the_next_batch_and_are_not_passed_by():
    held = Held(max_batch=8)
    sizes = [(8, 8), (6, 6), (8, 8), (6, 6)]
    futures = [held.batcher.submit(observation(n, size), session=n) for n, size in enumerate(sizes)]
    held.go()
    for number, future in enumerate(futures):
        each = future.result(10)
        assert each.batch == 2
        np.testing.assert_array_equal(each.actions, own(observation(number, sizes[number])))


def test_exact_asks_for_the_largest_batch():
    batcher = batching.Batcher(StandIn(), max_batch=4, exact=True)
    batcher.submit(observation(1)).result(10)
    assert batcher.policy.calls[0][1] == 4


def test_a_cancelled_or_expired_request_is_not_asked():
    held = Held()
    cancelled = held.batcher.submit(observation(1))
    expired = held.batcher.submit(observation(2), expires=time.monotonic() - 1)
    kept = held.batcher.submit(observation(3), expires=time.monotonic() + 60)
    assert cancelled.cancel()
    held.go()
    with pytest.raises(batching.Expired):
        expired.result(10)
    assert kept.result(10).batch == 1 and len(held.policy.calls) == 2


def test_a_failure_is_of_its_batch_only():
    policy = StandIn()
    batcher = batching.Batcher(policy)
    policy.hook = lambda prompts: 1 / 0
    with pytest.raises(ZeroDivisionError):
        batcher.submit(observation(1)).result(10)
    policy.hook = None
    np.testing.assert_array_equal(
        batcher.submit(observation(2)).result(10).actions, own(observation(2))
    )
    policy.act = lambda *arguments: np.zeros((3, 8, 4))
    with pytest.raises(ValueError, match="3 chunks for 1 observations"):
        batcher.submit(observation(1)).result(10)


def test_a_full_queue_says_so():
    held = Held(max_batch=1)
    [held.batcher.submit(observation(n)) for n in range(4)]
    with pytest.raises(batching.Overloaded, match="4 requests wait"):
        held.batcher.submit(observation(4))
    held.go()


def test_it_waits_for_sessions_that_asked_lately_only_when_told(monkeypatch):
    monkeypatch.setattr(batching, "_LATELY_S", 30.0)
    held = Held(max_wait_s=20.0)
    both = [held.batcher.submit(observation(n), session=n) for n in range(2)]
    held.go()
    assert [future.result(10).batch for future in both] == [2, 2]
    later = held.batcher.submit(observation(2), session=0)
    time.sleep(0.1)
    assert not later.done(), "session 1 asked lately"
    held.batcher.submit(observation(3), session=1)
    assert later.result(10).batch == 2
    monkeypatch.setattr(batching, "_LATELY_S", 0.0)
    assert held.batcher.submit(observation(4), session=0).result(10).batch == 1
