"""The embedded demo: its physics, images, expert and protocol."""

import hashlib
import os
import pathlib
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import expert as demo_expert
from lightwam_jax.envs.demo import render, tabletop
from lightwam_jax.envs.demo import scene as scene_lib

_ROOT = str(pathlib.Path(__file__).parents[2])


def episode(seed):
    return envs_base.EpisodeSpec("tabletop", 0, seed)


def _play(env, seed, policy):
    """Runs an episode without rendering; returns (success, steps, digest of the physics)."""
    env.observe = lambda: None
    env.reset(episode(seed))
    digest, done = hashlib.sha256(), False
    while not done:
        _, success, done = env.step(policy(env))
        digest.update(env.data.qpos.tobytes())
    return success, env.steps, digest.hexdigest()


def _same_bits(seed):
    """What must not depend on the process: physics and images of one episode."""
    env = tabletop.TabletopEnv(32)
    digest = _play(env, seed, demo_expert.act)[2]
    return digest + hashlib.sha256(env.image("wrist").tobytes()).hexdigest()


def test_same_seed_same_bits_in_another_process():
    code = "from tests.envs import test_demo as t; print(t._same_bits(5))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert other.stdout.strip() == _same_bits(5)


def test_episode_does_not_depend_on_the_one_before():
    env = tabletop.TabletopEnv(32)
    first = _play(env, 1, demo_expert.act)
    _play(env, 2, demo_expert.act)
    assert _play(env, 1, demo_expert.act) == first


def test_expert_solves_the_task():
    env = tabletop.TabletopEnv(32)
    results = [_play(env, seed, demo_expert.act) for seed in range(20)]
    assert all(success for success, _, _ in results)
    assert 15 < np.mean([steps for _, steps, _ in results]) < 35


def test_harder_tables_are_solved_too():
    hard = tabletop.Difficulty(objects=4, shapes=("cube", "cylinder", "ball"), yaw=0.4)
    env = tabletop.TabletopEnv(32, hard)
    assert sum(_play(env, seed, demo_expert.act)[0] for seed in range(8)) >= 7


def test_words_decide():
    """The same table with another word wants another object: the wrong one ends the episode."""
    env = tabletop.TabletopEnv(32)
    for seed in range(4):
        success, steps, _ = _play(
            env, seed, lambda e: demo_expert.act(e, (e.scene.target + 1) % len(e.scene.objects))
        )
        assert not success and steps < tabletop.MOST_STEPS


def test_doing_nothing_or_anything_fails():
    env = tabletop.TabletopEnv(32)
    rng = np.random.default_rng(0)
    assert not _play(env, 0, lambda e: np.zeros(4))[0]
    assert not any(_play(env, seed, lambda e: rng.uniform(-1, 1, 4))[0] for seed in range(4))


def test_scenes_shuffle_colours_over_places_and_name_each_object_equally():
    scenes = [tabletop.sample_scene(seed, tabletop.Difficulty()) for seed in range(600)]
    targets = np.bincount([scene.target for scene in scenes])
    assert targets.min() > 150  # of 200 expected
    leftmost = [
        min(scene.objects, key=lambda o: o[2]) == scene.objects[scene.target] for scene in scenes
    ]
    assert abs(np.mean(leftmost) - 1 / 3) < 0.07
    for scene in scenes:
        assert len({colour for colour, *_ in scene.objects}) == len(scene.objects)
        x, y = np.array([o[2:4] for o in scene.objects]).T
        assert np.hypot(x[0] - x[1], y[0] - y[1]) >= tabletop.Difficulty().spacing


def test_impossible_tables_and_bad_actions_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        tabletop.sample_scene(0, tabletop.Difficulty(spacing=0.5))
    with pytest.raises(ValueError, match="expected 1 to 4"):
        tabletop.sample_scene(0, tabletop.Difficulty(objects=5))
    env = tabletop.TabletopEnv(32)
    env.reset(episode(0))
    for action in (np.zeros(7), [0, 0, np.nan, 0]):
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(action)
    with pytest.raises(KeyError, match="scene, wrist"):
        env.image("ceiling")


def test_observation():
    env = tabletop.TabletopEnv(48)
    observation = env.reset(episode(0))
    assert set(observation["images"]) == set(tabletop.CAMERAS)
    for image in observation["images"].values():
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and image.std() > 10
    assert observation["state"].shape == (len(tabletop.STATE),)
    assert observation["state"].dtype == np.float32
    colour, shape = env.scene.objects[env.scene.target][:2]
    assert observation["prompt"] == f"put the {colour} {shape} in the tray"
    assert env.image("scene", 96).shape == (96, 96, 3)


def test_proprioception_feels_the_grasp():
    env = tabletop.TabletopEnv(32)
    states = []
    _play(env, 0, lambda e: (states.append(e.state), demo_expert.act(e))[1])
    states = np.array(states)
    held = states[:, 4] == 1
    assert not held[0] and held.sum() > 4
    assert abs(states[0, 3] - scene_lib.OPENING) < 1e-3
    assert (states[held, 3] < 0.06).all()  # an object is 4.4 cm wide


def test_named_object_can_be_located_in_the_scene_image():
    """The colour's centroid, mapped linearly, tells where the object is to better than 1 cm."""
    rows, places = [], []
    env = tabletop.TabletopEnv(64)
    env.difficulty = tabletop.Difficulty(  # clear of the hand's image
        object_y=(-0.10, 0.0), hand_x=(0, 0), hand_y=(0, 0), hand_z=(0.14, 0.14)
    )
    for seed in range(24):
        image = env.reset(episode(seed))["images"]["scene"] / 255.0
        colour = np.array(scene_lib.COLOURS[env.scene.objects[env.scene.target][0]])
        alike = (image @ colour) / np.linalg.norm(image, axis=-1) / np.linalg.norm(colour)
        weight = np.clip((alike - 0.955) / 0.03, 0, 1) * (np.ptp(image, axis=-1) > 0.25)
        v, u = np.mgrid[:64, :64] / 64
        centre = [(weight * axis).sum() / weight.sum() for axis in (u, v)]
        rows.append([1, *centre, centre[0] * centre[1]])
        places.append(env.place(env.scene.target)[:2].copy())
    solution = np.linalg.lstsq(np.array(rows), np.array(places), rcond=None)[0]
    error = np.linalg.norm(np.array(rows) @ solution - np.array(places), axis=1)
    assert np.median(error) < 0.005 and np.percentile(error, 90) < 0.01


def test_renderer_culls_no_ray_that_would_hit():
    env = tabletop.TabletopEnv(64)
    env.reset(episode(3))
    rng = np.random.default_rng(0)
    rays = rng.normal(size=(4000, 3)).astype(np.float32) * (0.4, 0.4, 0.1) - (0, 0, 1)
    rays = np.float32(rays / np.linalg.norm(rays, axis=1, keepdims=True))
    origin = np.float32([0.02, -0.1, 0.5])
    geom, distance = env._renderer._hits(env.data, origin, rays)
    all_geom, all_distance = render.cast(env.model, env.data, origin, rays)
    np.testing.assert_array_equal(geom, all_geom)
    np.testing.assert_allclose(distance, all_distance, rtol=1e-5)


def test_renderer_normals_agree_with_mujoco():
    shapes = '<geom type="box" size=".1 .05 .03" pos="-.2 0 .1" euler="20 30 40"/>'
    shapes += '<geom type="cylinder" size=".05 .08" pos="0 0 .1" euler="50 10 0"/>'
    shapes += '<geom type="sphere" size=".07" pos=".2 0 .1"/>'
    plane = '<geom type="plane" size="1 1 .1"/>'
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{plane}{shapes}</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    target = np.random.default_rng(0).uniform((-0.3, -0.1, 0), (0.3, 0.1, 0.2), (3000, 3))
    origin = np.array([0.1, -0.4, 0.6])
    rays = target - origin
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    geom, distance = render.cast(model, data, origin, rays)
    on = geom > 0
    point = origin + distance[on, None] * rays[on]
    normal = render.Renderer(model)._normals(data, geom[on], point.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-4)
    # A step along the normal leaves the shape; the ray back arrives after that step.
    for p, n, g in list(zip(point, normal, geom[on]))[::40]:
        back, gap = render.cast(model, data, p + 0.02 * n, -n[None])
        assert back[0] == g and abs(gap[0] - 0.02) < 1e-3


def test_renderer_refuses_what_it_cannot_draw():
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><geom type="plane" size="1 1 .1"/><geom type="capsule" size=".1 .1"/>'
        "</worldbody></mujoco>"
    )
    with pytest.raises(ValueError, match=r"geoms \[1\]"):
        render.Renderer(model)


def test_it_follows_the_rollout_protocol():
    env = tabletop.make(image_size=24, objects=2)
    observation = env.reset(episode(7))
    np.testing.assert_array_equal(observation["images"]["scene"], env.observe()["images"]["scene"])
    done, steps = False, 0
    while not done:
        nothing, success, done = env.step(env.expert_action())
        steps += 1
    assert nothing is None and success and steps < tabletop.MOST_STEPS
    assert env.image("wrist", 40).shape == (40, 40, 3)
