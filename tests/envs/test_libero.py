"""LIBERO: what is read without it, and (marked sim) episodes on the stand-in assets."""

import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from configs import libero
from lightwam_jax import config as config_lib
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.evaluation import suites as suites_lib

STANDINS = pathlib.Path(__file__).parents[1] / "libero_standins"
ROOT = STANDINS.parents[1]


# ---- without the package ---------------------------------------------------------------------


def write_states(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


def test_initial_states_are_read_and_code_is_not_run(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 7))
    old = pickle.dumps(states, protocol=2).replace(b"numpy._core", b"numpy.core")
    for content in (pickle.dumps(states, protocol=2), old):
        read = libero_files.read_states(write_states(tmp_path / "good.pruned_init", content))
        np.testing.assert_array_equal(read, states)

    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    for evil in (Evil(), [Evil()], {"states": states, "more": Evil()}):
        path = write_states(tmp_path / "evil.pruned_init", pickle.dumps(evil, protocol=2))
        with pytest.raises(ValueError, match=r"asks for posix\.mkdir\); nothing of it was"):
            libero_files.read_states(path)
    pickle.loads(pickle.dumps(Evil(), protocol=2))
    assert mark.exists(), "the file would have done nothing anyway: the test proves nothing"


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy.f2py.crackfortran\nmyeval\n(S'1'\ntR.",
        b"\x80\x02}q\x00.",
        b"not a pickle",
        b"\x80\x02X\x01\x00\x00\x000Q.",
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"bad\.pruned_init"):
        libero_files.read_states(write_states(tmp_path / "bad.pruned_init", content))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "bad").write_bytes(b"\x80\x02}.")
    with pytest.raises(ValueError, match="not a file of initial states"):
        libero_files.read_states(tmp_path / "bad")


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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up package: two tasks in libero_spatial, no assets; `plus` turns it into Plus."""
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "bddl_files" / "libero_spatial").mkdir(parents=True)
    names = ["pick_up_the_bowl_from_table_center", "KITCHEN_SCENE10_close_the_drawer"]

    def fill(names):
        table = {f"libero_{suite}": [] for suite in libero_files.SUITES}
        table["libero_spatial"] = names
        (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text(
            f"raise RuntimeError('executed')\nlibero_task_map = {table!r}\n", encoding="utf-8"
        )
        libero_files.tasks.cache_clear()

    fill(names)
    monkeypatch.setattr(libero_files, "package", lambda: tmp_path)
    yield types.SimpleNamespace(path=tmp_path, fill=fill)
    libero_files.tasks.cache_clear()


def test_tasks_are_listed_without_running_the_package(package, monkeypatch):
    monkeypatch.setattr(envs_base, "EpisodeSpec", lambda *args: args, raising=False)
    bowl, drawer = libero_files.tasks("spatial")
    assert libero_files.instruction(bowl) == "pick up the bowl from table center"
    assert libero_files.instruction(drawer) == "close the drawer"
    assert libero_lib.episodes(("spatial",), 2, 100) == [
        (bowl, 0, 100),
        (bowl, 1, 101),
        (drawer, 0, 100),
        (drawer, 1, 101),
    ]
    assert libero_lib.episodes((drawer, drawer), 1, 0) == [(drawer, 0, 0)]
    assert libero_lib.demonstrations((bowl,), 2, 5) == [
        (bowl, libero_lib.DRAWN, 5),
        (bowl, libero_lib.DRAWN, 6),
    ]
    with pytest.raises(ValueError, match="has no task 'fly'"):
        libero_lib.episodes(("fly",), 1, 0)
    with pytest.raises(ValueError, match="stores 50 initial states"):
        libero_lib.episodes(("spatial",), 51, 0)


def test_without_assets_the_error_says_how_to_get_them(package, tmp_path):
    for directory in (None, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"git clone https://github.com/Lifelong"):
            libero_lib.make(assets=directory)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(libero_files.importlib.util, "find_spec", lambda name: None)
    libero_files.package.cache_clear()
    libero_files.tasks.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"docs/libero\.md"):
        libero_files.tasks("spatial")


def test_libero_plus_has_suites_and_rules_of_its_own(package):
    with pytest.raises(ModuleNotFoundError, match="'plus_spatial' belongs to LIBERO-Plus"):
        libero_files.tasks("plus_spatial")
    (package.path / "benchmark" / "task_classification.json").write_text("{}", encoding="utf-8")
    base = "pick_up_the_bowl_from_table_center"
    files = {
        f"{base}_table_3": f"libero_spatial/{base}",
        f"{base}_view_0_0_100_0_0_initstate_7": f"libero_spatial/{base}",
        f"{base}_light_2": f"libero_spatial/{base}",
        f"{base}_tb_4": f"libero_spatial/{base}",
        f"{base}_add_5": f"libero_newobj/libero_spatial/{base}_add_5",
        f"{base}_language_1": f"libero_spatial/{base}",
    }
    package.fill([*files])
    with pytest.raises(ModuleNotFoundError, match="'spatial' belongs to LIBERO, and"):
        libero_files.tasks("spatial")
    for task, file in files.items():
        assert libero_files._states_file(task) == f"{file}.pruned_init"
    wording = package.path / "bddl_files" / "libero_spatial" / f"{base}_language_1.bddl"
    wording.write_text(
        "(define (problem P)\n (:language Grab that bowl )\n (:regions))", encoding="utf-8"
    )
    assert libero_files.instruction(f"{base}_language_1") == "Grab that bowl"
    assert {libero_files.instruction(t) for t in files if "_language_" not in t} == {
        "pick up the bowl from table center"
    }


def test_a_suite_of_libero_plus_is_evaluated_by_its_name(package):
    config = libero.get_config("spatial")
    config.evaluation.tasks = ("plus_spatial",)
    config = config_lib.from_config_dict(config)
    with pytest.raises(
        ModuleNotFoundError,
        match="'plus_spatial' belongs to LIBERO-Plus, and .* "
        r"each needs an environment of its own \(docs/libero\.md\)",
    ):
        suites_lib.of_config(config, "libero")
    tasks = [f"pick_up_the_bowl_{kind}" for kind in ("table_3", "tb_4", "light_2")]
    package.fill(tasks)
    kinds = {
        "libero_spatial": [
            {"id": i, "name": task, "category": category, "difficulty_level": 1}
            for i, (task, category) in enumerate(zip(tasks, ["Background Textures"] * 2))
        ]
    }
    (package.path / "benchmark" / "task_classification.json").write_text(
        json.dumps(kinds), encoding="utf-8"
    )
    found = suites_lib.of_config(config, "libero")
    assert [(e.task, e.init) for e in found.episodes] == [(task, 0) for task in tasks]
    assert found.expert_tasks == ()
    assert found.groups == {
        "plus_spatial": tasks,
        "Background Textures": tasks[:2],
        "not classified": tasks[2:],
    }


def test_standins_are_called_standins(tmp_path):
    assert libero_files.describe_assets(STANDINS)["assets"] == "stand-in"
    before = libero_files.describe_assets(STANDINS)["assets_hash"]
    (tmp_path / "bowl.obj").write_text("v 0 0 0", encoding="utf-8")
    real = libero_files.describe_assets(tmp_path)
    assert real["assets"] == "LIBERO" and real["assets_hash"] != before


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
@pytest.mark.parametrize(
    "suite, experts",
    [("object", ["object"]), ("goal", []), ("10", []), ("all", ["spatial", "object"])],
)
def test_suites_are_set_up_with_and_without_an_expert(suite, experts):
    config = config_lib.from_config_dict(libero.get_config(suite))
    found = suites_lib.of_config(config, "libero")
    assert len(found.tasks) == (40 if suite == "all" else 10)
    assert len(found.episodes) == 50 * len(found.tasks)
    assert found.expert_tasks == tuple(
        task for expert in experts for task in libero_files.tasks(expert)
    )
    assert list(found.groups) == (["spatial", "object", "goal", "10"] if suite == "all" else [])
    if len(found.expert_tasks) < len(found.tasks):
        with pytest.raises(ValueError, match=r"no scripted expert for suite .*, only for spatial"):
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


@pytest.mark.sim
def test_all_that_the_package_holds_can_be_read():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    names = [name for suite in libero_files.SUITES for name in libero_files.tasks(suite)]
    assert len(names) == len(set(names)) == 130
    for name in names:
        assert len(libero_files.initial_states(name)) == libero_lib.STORED
        assert libero_files.bddl_file(name).exists()
        assert "_" not in libero_files.instruction(name)
        assert not libero_files.instruction(name)[0].isupper()
