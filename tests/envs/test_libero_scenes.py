"""Scenes that environments share: the same bits and pixels as LIBERO's own, and no more memory."""

import gc
import hashlib
import types

import numpy as np
import pytest

from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import scenes
from tests.envs.test_libero import DRAWER, MILK, episode, make

# Of the first task of each suite, by `worker.describe`'s rule: state and images of 128x128 at full
# quality. Pixels depend on what renders them.
RENDERER = "egl, llvmpipe (LLVM 15.0.6, 256 bits)"
MUJOCO = "3.8.1"
FRAMES = {
    "spatial": "36f8f13853d1476c",
    "object": "ae9f585f62dfa0a3",
    "goal": "17e396e351a8f458",
    "10": "208ca2663e56f73a",
    "90": "fa1dad4ebda1203c",
}


def eyes(**kwargs):
    """The cameras of a picture from the origin along x, 90 degrees wide and high."""
    frustum = dict(frustum_near=0.1, frustum_far=10, frustum_top=0.1, frustum_bottom=-0.1)
    look = {"forward": [1, 0, 0], "up": [0, 0, 1]} | frustum | kwargs
    return [types.SimpleNamespace(pos=[0, side, 0], **look) for side in (0.03, -0.03)]


@pytest.mark.parametrize(
    "centre, hidden",
    [
        ((1, 0, 0), False),
        ((-1, 0, 0), True),
        ((0.02, 0, 0), False),  # reaches over the near plane
        ((20, 0, 0), True),
        ((1, 1.2, 0), False),  # reaches over the left edge
        ((1, 1.4, 0), True),
        ((1, -1.4, 0), True),
        ((1, 0, 1.4), True),
        ((1, 0, -1.4), True),
        ((1, 0, -1.2), False),
    ],
)
def test_spheres_are_out_of_sight_when_no_point_of_them_is_in_it(centre, hidden):
    spheres = np.float64([centre, centre]), np.float64([0.2, 0])
    assert scenes.out_of_sight(eyes(), *spheres).tolist() == [hidden, False]


def test_a_description_without_textures_keeps_their_names():
    plain = scenes.without_textures(
        '<mujoco><asset><texture file="a/wood.png" type="2d" gridsize="3 4"/>'
        '<texture name="sky" builtin="gradient" width="9" height="54" type="skybox"/>'
        '<material name="m" texture="wood"/></asset></mujoco>'
    )
    assert plain.count("<texture") == 2 and "png" not in plain and "gradient" not in plain
    assert 'name="wood" type="2d"' in plain and 'name="sky" type="skybox"' in plain
    assert '<material name="m" texture="wood" />' in plain


# ---- with the package ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")


@pytest.mark.sim
def test_what_is_simulated_is_bit_for_bit_what_libero_compiles(installed):
    env = make()
    env.reset(episode(DRAWER))
    whole, bare = env._scene.complete_model(), env._scene.model()
    fields = [name for name in dir(whole) if name[0] != "_"]
    fields = [name for name in fields if isinstance(getattr(whole, name), np.ndarray)]
    unlike = [
        name for name in fields if not np.array_equal(getattr(whole, name), getattr(bare, name))
    ]
    assert len(fields) > 300
    assert unlike and all(name.startswith("tex_") for name in unlike)
    env.close()


@pytest.mark.sim
def test_a_scene_is_shared_and_goes_with_the_last_environment(installed):
    gc.collect()
    before = len(scenes._scenes)
    ours, theirs, other = make(), make(), make(rendering="full")
    for env in (ours, theirs, other):
        env.reset(episode(MILK))
    assert ours._scene is theirs._scene and ours._scene is not other._scene
    assert ours._env.sim.model._model is not theirs._env.sim.model._model
    for env in (other, ours):
        env.close()
    assert len(scenes._scenes) == before + 1
    first = theirs._scene
    theirs.reset(episode(MILK, 1))
    assert theirs._scene is first, "a reset compiles nothing"
    del first
    theirs.reset(episode(DRAWER))
    assert len(scenes._scenes) == before + 1
    theirs.close()
    assert len(scenes._scenes) == before


def pictures(env):
    """Both views along an episode, as they are and with everything drawn; and what was left out."""
    camera, found, gone = env._camera, [], 0
    none = env._modules.mujoco.mjtGeom.mjGEOM_NONE.value
    for step in range(12):
        env.step([0.3, -0.6, -0.7 + step / 10, 0.2, 0.5, 0.6, step % 2])
        for name in ("agentview", "robot0_eye_in_hand"):
            ours = camera.render(name, 96)
            gone += sum(camera._picture.geoms[i].type == none for i in range(camera._picture.ngeom))
            camera._culls = False
            found.append((ours, camera.render(name, 96)))
            camera._culls = True
    return found, gone


@pytest.mark.sim
@pytest.mark.parametrize("task", [MILK, DRAWER])
def test_leaving_out_what_is_out_of_sight_changes_no_pixel(installed, task):
    env = make()
    env.reset(episode(task, 2, 3))
    found, gone = pictures(env)
    assert gone > 100
    for ours, everything in found:
        np.testing.assert_array_equal(ours, everything)
    env.close()


@pytest.fixture(scope="module")
def genuine(installed):
    """An environment on LIBERO's own assets, or what is installed of them."""
    try:
        env = libero_lib.make(image_size=128)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield env
    env.close()


@pytest.mark.sim
@pytest.mark.parametrize("suite", libero_files.SUITES)
def test_suites_are_reset_and_rendered_on_their_own_assets(genuine, suite):
    """With the images that were recorded, where the same software renders."""
    seen = genuine.reset(episode(libero_files.tasks(suite)[0]))
    digest = hashlib.sha256()
    for camera in sorted(seen["images"]):
        image = seen["images"][camera]
        assert image.shape == (128, 128, 3) and image.std() > 20
        digest.update(camera.encode() + image.tobytes())
    digest.update(seen["state"].astype("<f4").tobytes())
    about = genuine.describe()
    assert about["assets"] == "LIBERO"
    if (about["renderer"], about["versions"]["mujoco"]) != (RENDERER, MUJOCO):
        pytest.skip(f"recorded with {RENDERER} and MuJoCo {MUJOCO}, here is {about['renderer']}")
    assert digest.hexdigest()[:16] == FRAMES[suite]
