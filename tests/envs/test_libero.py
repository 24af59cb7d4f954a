"""LIBERO's protocols, and (marked sim) episodes on the stand-in assets."""

import hashlib
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import libero
from lightwam_jax import config as config_lib
from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.evaluation import suites as suites_lib

STANDINS = pathlib.Path(__file__).parents[1] / "libero_standins"
ROOT = STANDINS.parents[1]


def test_protocols_are_the_published_ones():
    ours, openpi = libero_lib.PROTOCOLS["lightwam"], libero_lib.PROTOCOLS["openpi"]
    suites = libero_files.SUITES
    assert [ours.max_steps[s] for s in suites] == [400, 400, 400, 700, 400]
    assert [openpi.max_steps[s] for s in suites] == [220, 280, 300, 520, 400]
    assert (ours.settle, ours.replan_steps, openpi.settle, openpi.replan_steps) == (30, 10, 10, 5)


def test_rotations_are_an_axis_times_an_angle():
    np.testing.assert_allclose(libero_lib.axis_angle([0, 0, 0, 1]), [0, 0, 0])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(libero_lib.axis_angle([0, half, 0, half]), [0, np.pi / 2, 0])
    np.testing.assert_allclose(libero_lib.axis_angle([0, 0, 0, 1 + 1e-12]), [0, 0, 0])


# ---- with the package, on the stand-in assets ------------------------------------------------

MILK = "pick_up_the_milk_and_place_it_in_the_basket"
DRAWER = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
SIZE = 64


def make(**kwargs):
    return libero_lib.make(
        **{
            "assets": str(STANDINS),
            "image_size": SIZE,
            "rendering": "fast",
            "protocol": "openpi",
            **kwargs,
        }
    )


def episode(task, init=0, seed=0):
    return types.SimpleNamespace(task=task, init=init, seed=seed)


def play(env, episode, steps=6):
    """Yields once; then returns a digest of all that is observed in some steps of an episode."""
    seen = [env.reset(episode)]
    yield
    for step in range(steps):
        env.step([0.4, -0.3, -0.5, 0, 0, 0.2, (-1) ** step])
        seen.append(env.observe())
    digest = hashlib.sha256()
    for observation in seen:
        digest.update(observation["state"].tobytes() + observation["prompt"].encode())
        for image in observation["images"].values():
            digest.update(image.tobytes())
    return digest.hexdigest()


def finish(playing):
    try:
        while True:
            next(playing)
    except StopIteration as end:
        return end.value


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    made = make()
    yield made
    made.close()


@pytest.mark.sim
@pytest.mark.parametrize("suite, known", [("object", 10), ("goal", 10), ("10", 5), ("all", 35)])
def test_suites_are_set_up_with_and_without_an_expert(suite, known):
    config = config_lib.from_config_dict(libero.get_config(suite))
    found = suites_lib.of_config(config, "libero")
    assert len(found.tasks) == (40 if suite == "all" else 10)
    assert len(found.episodes) == 50 * len(found.tasks)
    assert len(found.expert_tasks) == known
    rooms = [task for task in found.tasks if task.startswith(("KITCHEN", "STUDY"))]
    assert set(found.tasks) - set(found.expert_tasks) == set(rooms)
    assert list(found.groups) == (["spatial", "object", "goal", "10"] if suite == "all" else [])
    if rooms:
        with pytest.raises(
            ValueError, match=f"no scripted expert for {rooms[0]}, .*; there is one"
        ):
            libero_lib.demonstrations(found.tasks, 1, 0)


@pytest.mark.sim
def test_an_episode_is_the_same_in_any_process_and_the_home_stays_clean(env, tmp_path):
    first = finish(play(env, episode(DRAWER, 3, 8)))
    # Elsewhere after other episodes, beside another environment, with nobody to answer questions.
    code = """
import sys
from tests.envs import test_libero as t
env, other = t.make(), t.make()
t.finish(t.play(env, t.episode(t.DRAWER, 4, 1), 2))
t.finish(t.play(env, t.episode(t.MILK, 0, 2), 0))
ours, theirs = t.play(env, t.episode(t.DRAWER, 3, 8)), t.play(other, t.episode(t.MILK, 1, 1), 1)
next(ours), next(theirs), t.finish(theirs)
other.close()
print(t.finish(ours), sorted({"torch", "jax"} & set(sys.modules)))
env.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines()[-1:] == [f"{first} []"], done.stderr
    assert not list(tmp_path.iterdir())
    assert finish(play(env, episode(DRAWER, 3, 9))) != first, "the seed places the furniture"


@pytest.mark.sim
def test_images_and_states_are_those_of_the_package(env):
    """With the package's own cameras, which it renders at every step, and at full quality."""
    full = make(rendering="full")
    first = full.reset(episode(MILK, 2, 5))
    theirs = env._modules.env_wrapper.OffScreenRenderEnv(
        bddl_file_name=str(libero_files.bddl_file(MILK)), camera_heights=SIZE, camera_widths=SIZE
    )
    theirs.env.object_property_initializers.clear()
    theirs.seed(5)
    theirs.reset()
    raw = theirs.set_init_state(libero_files.initial_states(MILK)[2])
    for _ in range(10):
        raw = theirs.step([0.0] * 6 + [-1.0])[0]
    for step in range(4):
        seen = full.observe() if step else first
        np.testing.assert_array_equal(seen["state"][:3], np.float32(raw["robot0_eef_pos"]))
        np.testing.assert_array_equal(seen["state"][6:], np.float32(raw["robot0_gripper_qpos"]))
        for ours, name in (("image", "agentview"), ("wrist_image", "robot0_eye_in_hand")):
            np.testing.assert_array_equal(seen["images"][ours], raw[f"{name}_image"][::-1, ::-1])
        action = [0.9, 0.5, -0.9, 0, 0, 0.3, 1]
        full.step(action)
        theirs.sim._render_context_offscreen.gl_ctx.make_current()  # they draw into any
        raw = theirs.step(action)[0]
    theirs.close()
    full.close()


@pytest.mark.sim
@pytest.mark.parametrize(
    "task, init, protocol",
    [(MILK, 1, "lightwam"), (DRAWER, 0, "openpi"), (MILK, libero_lib.DRAWN, "openpi")],
)
def test_the_expert_solves(task, init, protocol):
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    env = make(protocol=protocol, image_size=16)
    observation = env.reset(episode(task, init, 11))
    assert observation["prompt"] == libero_files.instruction(task)
    actions, success, done = [], False, False
    while not done:
        actions.append(env.expert_action())
        _, success, done = env.step(actions[-1])
    grippers = {0.0, 1.0} if protocol == "lightwam" else {-1.0, 1.0}
    assert success and {float(action[6]) for action in actions} == grippers
    assert len(actions) <= env._max_steps
    env.close()


@pytest.mark.sim
def test_what_it_says_of_itself_and_refuses(env):
    env.reset(episode(MILK))
    about = env.describe()
    assert about["assets"] == "stand-in" and about["protocol"]["settle"] == 10
    assert about["versions"]["mujoco"] and "egl" in about["renderer"].lower()
    assert env.image("image", 100).shape == (100, 100, 3)
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match="there are 0 to 49"):
        env.reset(episode(MILK, 50))
    with pytest.raises(ValueError, match="has no task 'juggle'"):
        env.reset(episode("juggle"))
    with pytest.raises(KeyError, match="the cameras are image, wrist_image"):
        env.image("ceiling", 32)
