"""The queue of episodes and who gets which plan, with workers that are no processes."""

import collections
import types

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import rollout

EPISODES = [envs_base.EpisodeSpec("goal", 0, seed) for seed in range(6)]


class Worker:
    """A `rollout._Worker` without a process: `says` is what it answers next, an error to die."""

    def __init__(self, arguments):
        self.arguments, self.sent, self.says = arguments, [], collections.deque()
        self.pipe = self
        self.process = types.SimpleNamespace(join=lambda: None, exitcode=3)
        self.starts = 0
        self.start()

    def start(self):
        self.starts += 1
        self.pending = collections.deque([None])
        self.heard = rollout.time.monotonic()

    def send(self, kind, slot, payload):
        self.heard = rollout.time.monotonic()
        self.pending.append(slot)
        self.sent.append((kind, slot.index, payload))

    def recv(self):
        said = self.says.popleft()
        if isinstance(said, Exception):
            raise said
        return said

    def stop(self):
        self.says.clear()


@pytest.fixture
def clock(monkeypatch):
    found = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(rollout, "time", types.SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.fixture
def make(monkeypatch, clock):
    """A function: `_Engine` of so many episodes."""
    monkeypatch.setattr(rollout, "_Worker", Worker)
    monkeypatch.setattr(
        rollout.multiprocessing.connection,
        "wait",
        lambda pipes, timeout: [pipe for pipe in pipes if pipe.says],
    )

    def engine(episodes, workers, batch, timeout=120.0, tasks_at_once=None):
        config = types.SimpleNamespace(workers=workers, batch=batch, replan_steps=4, max_steps=9)
        if isinstance(episodes, int):
            episodes = EPISODES[:episodes]
        env = types.SimpleNamespace(tasks_at_once=lambda: tasks_at_once, name="env")
        return rollout._Engine(env, episodes, config, False, timeout)

    return engine


def begin(engine):
    """Starts every worker and has every slot wait for a plan."""
    for one in engine._workers:
        one.says.append(("ready", None, None))
    engine.collect()
    for slot in engine._slots:
        slot.worker.says.append(("observation", slot.index, {"of": slot.episode}))
    while any(one.says for one in engine._workers):
        engine.collect()


def queue(engine):
    return [(episode.seed, attempt) for episode, attempt in engine._queue]


@pytest.mark.parametrize(
    "episodes, workers, batch, used, slots",
    [(6, 2, 4, 2, 4), (6, 8, 4, 4, 4), (3, 2, 4, 2, 3), (1, 4, 4, 1, 1), (6, 0, 2, 1, 2)],
)
def test_no_more_environments_than_episodes_or_rows(make, episodes, workers, batch, used, slots):
    engine = make(episodes, workers, batch)
    assert len(engine._workers) == used and len(engine._slots) == slots
    assert [slot.index for slot in engine._slots] == list(range(slots))
    for slot in engine._slots:
        assert slot.worker is engine._workers[slot.index % used]
    env, *more = engine._workers[0].arguments
    assert env.name == "env" and more == [4, 9, False, None]


def test_a_plan_is_due_when_all_wait_and_each_gets_its_row(make):
    engine = make(6, 2, 3)
    assert engine.due() == []
    begin(engine)
    engine._slots[1].observation = None
    assert engine.due() == [], "one is still at work"
    engine._slots[1].observation = {}
    assert [slot.index for slot in engine.due()] == [0, 1, 2]
    engine._slots[0].episode = engine._slots[0].observation = None  # over, and none is left
    due = engine.due()
    assert [slot.index for slot in due] == [1, 2]
    actions = np.arange(3 * 4 * 2.0).reshape(3, 4, 2)
    engine.plan(due, actions)
    for slot, row in zip(due, (0, 1)):
        kind, index, chunk = slot.worker.sent[-1]
        assert (kind, index, slot.observation) == ("plan", slot.index, None)
        np.testing.assert_array_equal(chunk, actions[row])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_a_plan_stops_the_evaluation(make, value):
    engine = make(6, 2, 4)
    begin(engine)
    due, sent = engine.due(), [len(one.sent) for one in engine._workers]
    actions = np.zeros((4, 5, 2))
    actions[1, 4, 1] = actions[3, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"for episodes goal/0/1, goal/0/3; nothing"):
        engine.plan(due, actions)
    assert [len(one.sent) for one in engine._workers] == sent, "nothing was executed"
    engine = make(2, 2, 4)
    begin(engine)
    actions = np.zeros((4, 5, 2))
    actions[2:] = value  # rows that only fill the batch
    engine.plan(engine.due(), actions)


def test_only_the_episode_that_is_to_blame_loses_an_attempt(make):
    """Slots 0 and 2 share a worker that dies while it answers for slot 2."""
    engine = make(6, 2, 4)
    begin(engine)
    engine.plan(engine.due(), np.zeros((4, 5, 2)))
    first = engine._workers[0]
    first.says.append(("observation", 0, {}))
    assert engine.collect() == []
    first.says.append(EOFError())
    assert engine.collect() == []
    assert queue(engine) == [(4, 1), (5, 1), (0, 1), (2, 2)]
    assert [slot.episode for slot in engine._slots] == [None, EPISODES[1], None, EPISODES[3]]
    assert engine._slots[0].observation is None and first.starts == 2
    # The next to start are 4 and 5; the one that fails a second time is over, its neighbour not.
    engine._queue.rotate(2)
    first.says.append(("ready", None, None))
    engine.collect()
    assert [(s.episode.seed, s.attempt) for s in engine._slots] == [(0, 1), (1, 1), (2, 2), (3, 1)]
    first.says.extend([("observation", 0, {}), ("error", 2, "it broke")])
    assert engine.collect() == []
    (result,) = engine.collect()
    assert result.episode == EPISODES[2] and result.success is None and result.error == "it broke"
    assert queue(engine) == [(4, 1), (5, 1)]


def test_a_second_death_is_final_for_the_guilty_and_costs_the_neighbour_nothing(make):
    engine = make(2, 1, 2)
    begin(engine)
    engine._slots[0].attempt = engine._slots[1].attempt = 2
    engine.plan(engine.due(), np.zeros((2, 5, 2)))
    engine._workers[0].says.append(ConnectionResetError())
    (result,) = engine.collect()
    assert result.episode == EPISODES[0]
    assert result.error == "the simulator process died (exit code 3)"
    assert queue(engine) == [(1, 2)]


def test_patience_is_longer_for_a_start_and_begins_with_the_last_message(make, clock):
    engine = make(1, 1, 1, timeout=5.0)
    clock.now = 599.0
    engine.collect()  # which asks it to start the episode
    clock.now += 600.0
    assert engine.collect() == [], "it may still be importing"
    engine._workers[0].says.append(("ready", None, None))
    engine.collect()
    clock.now += 5.0
    assert engine.collect() == [] and queue(engine) == []
    clock.now += 0.5
    assert engine.collect() == [] and queue(engine) == [(0, 2)]
    assert engine._workers[0].starts == 2
    engine.collect()  # which asks it to start the episode
    clock.now += 600.5
    with pytest.raises(RuntimeError, match=r"could not be started: .* silent for 600 s"):
        engine.collect()


def test_observations_are_batched_in_order_and_filled_with_the_first():
    def seen(k):
        image = np.full((2, 3, 3), k, np.uint8)
        return {
            "images": {"scene": image, "wrist": image + 100},
            "state": np.float64([k, k + 0.5]),
            "prompt": f"task {k}",
        }

    images, state, prompts = rollout.stack([seen(1), seen(2)], 4)
    assert images["scene"].shape == (4, 2, 3, 3) and images["scene"].dtype == np.uint8
    assert images["scene"][:, 0, 0, 0].tolist() == [1, 2, 1, 1]
    assert images["wrist"][:, 1, 2, 2].tolist() == [101, 102, 101, 101]
    assert state.dtype == np.float32 and state.tolist() == [[1, 1.5], [2, 2.5], [1, 1.5], [1, 1.5]]
    assert prompts == ["task 1", "task 2", "task 1", "task 1"]


def test_progress_counts_what_ran_apart_from_what_could_not():
    with rollout._Progress("policy", 4) as progress:
        for success, said in (
            (True, "success 1/1"),
            (None, "success 1/1, 1 errors"),
            (False, "success 1/2, 1 errors"),
            (True, "success 2/3, 1 errors"),
        ):
            progress.add(types.SimpleNamespace(success=success))
            assert progress._bar.postfix == said
        assert progress._bar.n == progress._bar.total == 4


def of_tasks(tasks):
    return [envs_base.EpisodeSpec(task, 0, seed) for seed, task in enumerate(tasks)]


def finish(engine, index):
    """The episode in a slot ends."""
    slot = engine._slots[index]
    slot.worker.says.append(("result", slot.index, slot.episode))
    slot.worker.pending = collections.deque([slot])
    engine.collect()  # takes the result
    engine.collect()  # hands out the next episode


def running(engine):
    return "".join(slot.episode.task if slot.episode else "-" for slot in engine._slots)


def test_a_process_stays_on_its_task_and_takes_one_that_no_other_has(make):
    engine = make(of_tasks("aabbbcca"), workers=2, batch=4)  # slots 0 and 2 are of one process
    begin(engine)
    assert running(engine) == "abab"
    finish(engine, 1)
    assert running(engine) == "abab", "the last of b is for the process that has b"
    finish(engine, 1)
    assert running(engine) == "acab", "c is open nowhere, a in the other process"
    finish(engine, 3)
    finish(engine, 0)
    assert running(engine) == "acac"
    finish(engine, 2)
    assert running(engine) == "ac-c"


def test_no_more_tasks_are_open_in_a_process_than_the_environment_allows(make):
    engine = make(of_tasks("abcdd"), workers=1, batch=4, tasks_at_once=2)
    begin_some(engine)
    assert running(engine) == "ab--"
    finish(engine, 0)
    assert running(engine) == "cb--"
    finish(engine, 1)
    assert running(engine) == "cdd-"


def begin_some(engine):
    """Starts the only worker, some slots of which get no episode."""
    engine._workers[0].says.append(("ready", None, None))
    engine.collect()
