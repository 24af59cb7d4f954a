"""What runs inside a simulator process, run here: episodes step by step, and their repetition."""

import types
import zlib

import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import worker

EPISODE = envs_base.EpisodeSpec("count", 3, 11)


class Counter:
    """Its state is the number of steps. `ends`: {step: (success, done)} of that step."""

    def __init__(self, ends=None, clock=None):
        self.ends, self.clock = ends or {}, clock
        self.actions, self.observed = [], 0

    def reset(self, episode):
        self.actions, self.seed = [], episode.seed
        return {**self.observe(), "prompt": f"count to {episode.seed}"}

    def observe(self):
        self.observed += 1
        image = np.full((2, 2, 3), len(self.actions), np.uint8)
        return {
            "images": {"wrist": image + 100, "scene": image},
            "state": np.float32([len(self.actions), 0.5]),
            "prompt": "of a later step",
        }

    def expert_action(self):
        return np.float64([len(self.actions), -1])

    def step(self, action):
        assert action.dtype == np.float32
        self.actions.append(action.tolist())
        if self.clock:
            self.clock.now += 1
        success, done = self.ends.get(len(self.actions), (False, False))
        return None, success, done

    def image(self, camera, size):
        return np.full((size, size, 3), len(self.actions) + 100 * (camera == "wrist"), np.uint8)


def play(env, replan_steps=4, max_steps=10, chunk=6, between=lambda: None):
    """Returns (result, what each plan was made from); the k-th plan is 10 k, 10 k + 1, ..."""
    episode, seen = worker.play(env, EPISODE, replan_steps, max_steps), []
    plan = None
    try:
        while True:
            seen.append(episode.send(plan))
            between()
            rows = 10 * len(seen) + np.arange(chunk)
            plan = np.stack([rows, -rows], axis=1)
    except StopIteration as end:
        return end.value, seen


def test_an_episode_that_never_ends_takes_exactly_max_steps():
    env = Counter()
    result, seen = play(env)
    want = [10, 11, 12, 13, 20, 21, 22, 23, 30, 31]
    assert env.actions == [[x, -x] for x in want]
    assert (result.success, result.steps, result.error) == (False, 10, None)
    assert [plan["state"][0] for plan in seen] == [0, 4, 8]
    assert env.observed == 3, "only what the policy sees is rendered"
    assert (result.episode, result.prompt) == (EPISODE, "count to 11")
    assert result.actions.dtype == np.float32 and result.actions.tolist() == env.actions
    assert result.checksum == zlib.crc32(np.float32(env.actions).tobytes())


@pytest.mark.parametrize(
    "ends, steps, success",
    [
        ({6: (True, True)}, 6, True),
        ({6: (False, True)}, 6, False),  # it may give up
        ({3: (True, False)}, 10, False),  # solved on the way and lost again
        ({10: (True, True)}, 10, True),  # with the last step it has
        ({10: (True, False)}, 10, True),
        ({11: (True, True)}, 10, False),
    ],
)
def test_an_episode_ends_when_the_environment_says_so(ends, steps, success):
    result, _ = play(Counter(ends))
    assert (result.steps, result.success) == (steps, success)


def test_seconds_are_those_of_the_simulator(monkeypatch):
    clock = types.SimpleNamespace(now=50.0)
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock.now)

    def plan():
        clock.now += 1000

    result, _ = play(Counter(clock=clock), between=plan)
    assert result.seconds == 10
    assert result.times == {"reset": 0, "steps": 10, "images": 0, "plans": 3000}


def test_the_expert_acts_without_plans():
    result = None
    env = Counter({3: (True, True)})
    try:
        next(worker.play(env, EPISODE, 4, 10, expert=True))
    except StopIteration as end:
        result = end.value
    assert env.actions == [[0, -1], [1, -1], [2, -1]] and env.observed == 1
    assert result.success is True and result.steps == 3


def test_results_survive_json_and_damage_is_noticed():
    result, _ = play(Counter({6: (True, True)}))
    failed = worker.failed_to_run(EPISODE, "it broke")
    assert (failed.success, failed.steps, failed.error) == (None, 0, "it broke")
    for one in (result, failed):
        written = one.to_json()
        assert (written["task"], written["init"], written["seed"]) == ("count", 3, 11)
        back = worker.EpisodeResult.from_json(written)
        assert back == one and back.times == one.times
        np.testing.assert_array_equal(back.actions, one.actions)
    with pytest.raises(ValueError, match=r"episode count/3/11 do not fit their checksum"):
        worker.EpisodeResult.from_json(result.to_json() | {"checksum": result.checksum + 1})
    with pytest.raises(ValueError, match="no result of an episode: 'steps'"):
        worker.EpisodeResult.from_json({k: v for k, v in result.to_json().items() if k != "steps"})


def test_a_repetition_shows_every_step_that_was_asked_for(monkeypatch):
    result, seen = play(Counter({9: (True, True)}))
    env = Counter({9: (True, True)})
    spec = types.SimpleNamespace(make=lambda: env)
    video = worker.replay(spec, result, every=5, size=6, replan_steps=4)
    assert env.actions == result.actions.tolist()
    assert video["frame_steps"] == [0, 5, 9] and video["plan_steps"] == [0, 4, 8]
    assert video["frames"]["scene"].shape == (3, 6, 6, 3)
    assert video["frames"]["scene"][:, 0, 0, 0].tolist() == [0, 5, 9]
    assert video["frames"]["wrist"][:, 0, 0, 0].tolist() == [100, 105, 109]
    assert [o["state"][0] for o in video["observations"]] == [o["state"][0] for o in seen]
    env.ends = {9: (False, True)}
    with pytest.raises(RuntimeError, match=r"count/3/11 ended with success=True .* with False"):
        worker.replay(spec, result, every=4, size=5, replan_steps=4)


def described(change=lambda seen: seen, **own):
    class Environment(Counter):
        def reset(self, episode):
            return change(super().reset(episode))

    if own:
        Environment.describe = lambda self: own
    spec = types.SimpleNamespace(make=Environment)
    return worker.describe(spec, EPISODE)


def test_the_first_frame_tells_environments_apart():
    known = described(renderer="osmesa")
    assert known["renderer"] == "osmesa" and known["reset_frame"]["episode"] == "count/3/11"
    assert described() == {"reset_frame": known["reset_frame"]}
    assert len(known["reset_frame"]["sha256"]) == 16

    def turned(seen):
        return {**seen, "images": dict(reversed(seen["images"].items()))}

    def swapped(seen):
        images = seen["images"]
        return {**seen, "images": {"scene": images["wrist"], "wrist": images["scene"]}}

    def brighter(camera):
        return lambda seen: {
            **seen,
            "images": {**seen["images"], camera: seen["images"][camera] + 1},
        }

    def renamed(seen):
        images = seen["images"]
        return {**seen, "images": {"front": images["scene"], "wrist": images["wrist"]}}

    def moved(seen):
        return {**seen, "state": seen["state"] + np.float32([0, 1])}

    assert described(turned) == described(), "the order of cameras does not matter"
    others = [
        described(change)
        for change in (swapped, renamed, brighter("scene"), brighter("wrist"), moved)
    ]
    digests = {one["reset_frame"]["sha256"] for one in (described(), *others)}
    assert len(digests) == 6


class Pipe:
    """Hands out messages and keeps the answers."""

    def __init__(self, *messages):
        self.messages, self.sent = list(messages), []

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        self.sent.append(message)


def test_a_process_answers_every_message_and_renews_a_broken_environment():
    made = []

    def make():
        made.append(Counter({2: (True, True)}))
        return made[-1]

    chunk = np.zeros((4, 2))
    pipe = Pipe(
        ("start", 0, EPISODE),
        ("start", 1, EPISODE),
        ("plan", 0, chunk),  # solves it
        ("start", 0, EPISODE),  # the same environment again
        ("plan", 1, chunk * np.nan),  # breaks that one
        ("start", 1, EPISODE),  # a new one
        ("plan", 1, chunk),
    )
    worker.serve(pipe, types.SimpleNamespace(make=make), 4, 10, False)
    kinds = ["ready", "observation", "observation", "result", "observation", "error"]
    assert [kind for kind, _, _ in pipe.sent] == [*kinds, "observation", "result"]
    assert [slot for _, slot, _ in pipe.sent] == [None, 0, 1, 0, 0, 1, 1, 1]
    assert pipe.sent[3][2].steps == 2 and pipe.sent[3][2].success
    assert "NaN" in pipe.sent[5][2]
    assert len(made) == 3
