"""Searches enter linked folders, each once, and say what they could not enter."""

import os
import shutil

import numpy as np
import pytest

from converters import locate
from lightwam_jax import folders
from lightwam_jax.checkpoint import storage
from lightwam_jax.data import episodes
from lightwam_jax.envs.libero import files as libero_files
from tests import synthetic, writers
from tests.data.formats.test_hdf5 import own, read_own, recording
from tests.data.formats.test_lerobot_meta import EVERY, configure, made, read, sets

__all__ = ["sets"]  # a fixture


def names(root):
    return [path.relative_to(root).as_posix() for path in folders.files_below(root)]


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_linked_folders_and_files_are_found(tmp_path):
    put(tmp_path / "set/day1/a")
    put(tmp_path / "disk/day2/deep/b")
    put(tmp_path / "disk/c")
    (tmp_path / "set/day2").symlink_to(tmp_path / "disk/day2")
    (tmp_path / "set/c").symlink_to(tmp_path / "disk/c")
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    assert names(tmp_path / "set") == ["c", "day1/a", "day2/deep/b"]
    assert names(tmp_path / "linked") == ["c", "day1/a", "day2/deep/b"]


def test_circles_end_and_nothing_is_found_twice(tmp_path):
    put(tmp_path / "set/day/a")
    put(tmp_path / "other/b")
    for name, target in {
        "set/aaa": "set/day",  # sorted before the folder it leads to
        "set/day/self": "set/day",
        "set/up": "set",
        "set/day/above": ".",
        "other/back": "set",
        "set/x1": "other",
        "set/x2": "other",
    }.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    found = names(tmp_path / "set")
    assert found[0] == "day/a" and len(found) == 2 and found[1].endswith("/b")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/one").symlink_to("two")
    (tmp_path / "loop/two").symlink_to("one")
    assert names(tmp_path / "loop") == []


def test_what_cannot_be_entered_is_told(tmp_path, monkeypatch):
    put(tmp_path / "set/a")
    put(tmp_path / "set/locked/b")
    (tmp_path / "set/gone").symlink_to(tmp_path / "unmounted")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = folders.search(tmp_path / "set")
    assert found.files == [tmp_path / "set/a"]
    assert {path.name: reason for path, reason in found.missed} == {
        "gone": f"a link to {tmp_path / 'unmounted'}, which is not there",
        "locked": "Permission denied",
    }


def test_recordings_of_several_disks(tmp_path):
    for number in range(2):
        recording(tmp_path / f"set/day1/e{number}.hdf5", **own())
    for number in range(3):
        recording(tmp_path / f"disk2/day2/e{number}.hdf5", **own())
    (tmp_path / "set/day2").symlink_to(tmp_path / "disk2/day2")
    (tmp_path / "set/day3").symlink_to(tmp_path / "disk3/day3")
    (tmp_path / "set/e.hdf5").symlink_to(tmp_path / "disk3/e.hdf5")
    found, problems = read_own(tmp_path / "set")
    assert [e.id for e in found] == ["day1/e0", "day1/e1", "day2/e0", "day2/e1", "day2/e2"]
    assert {(p.severity, p.kind, p.episode) for p in problems} == {
        ("warning", "broken link", "day3"),
        ("error", "unreadable file", "e"),
    }
    with pytest.raises(ValueError, match=r"no \*\.hdf5 .*broken link: gone is a link to"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/gone").symlink_to(tmp_path / "disk3")
        read_own(tmp_path / "empty")


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    recording(tmp_path / "a.hdf5", **own())
    (tmp_path / "locked").mkdir()
    missed = folders.Found([tmp_path / "a.hdf5"], [(tmp_path / "locked", "Permission denied")])
    monkeypatch.setattr(folders, "search", lambda root: missed)
    _, (problem,) = read_own(tmp_path)
    assert (problem.severity, problem.kind) == ("error", "unreadable folder")
    assert read_own(tmp_path, **{"data.exclude": ("locked",)})[1] == []


@pytest.mark.parametrize("version", ["2.1", "3.0"])
@pytest.mark.parametrize("folder", ["data", "data/chunk-000", "videos", "meta"])
def test_lerobot_sets_with_linked_folders(sets, tmp_path, version, folder):
    root = shutil.copytree(sets / version, tmp_path / "set")
    (root / folder).rename(tmp_path / "disk")
    (root / folder).symlink_to(tmp_path / "disk")
    assert read(root) == (EVERY, [], [])
    (tmp_path / "linked").symlink_to(root)
    assert episodes.load_episodes(configure(tmp_path / "linked"))[0].frames("scene", [0]).any()


def test_rlds_sets_with_linked_folders(tmp_path):
    keys = writers.rlds(tmp_path, made(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.0.0").symlink_to(keys["data.path"])
    found = episodes.load_episodes(
        synthetic.make_config("", **keys | {"data.path": f"{tmp_path}/set"})
    )
    assert len(found) == 2 and found[1].frames("scene", [0]).any()


def test_weights_in_linked_folders(tmp_path):
    """As the hub keeps them, and as disks are put together."""
    put(tmp_path / "disk/model.safetensors")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/text_encoder").symlink_to(tmp_path / "disk")
    (tmp_path / "weights/again").symlink_to(tmp_path / "weights")
    place, _ = locate.locate(tmp_path / "weights", "t5")
    assert place == tmp_path / "weights/text_encoder/model.safetensors"


def test_assets_in_linked_folders_are_copied_and_hashed(tmp_path):
    put(tmp_path / "disk/index.json")
    np.save(tmp_path / "disk/rows.npy", np.arange(3))
    put(tmp_path / "assets/stats.json")
    (tmp_path / "assets/text").symlink_to(tmp_path / "disk")
    storage.copy_files(tmp_path / "assets", tmp_path / "copied")
    assert names(tmp_path / "copied") == ["stats.json", "text/index.json", "text/rows.npy"]
    shutil.rmtree(tmp_path / "disk")
    assert np.load(tmp_path / "copied/text/rows.npy").tolist() == [0, 1, 2]
    before = libero_files.describe_assets(tmp_path / "copied")
    (tmp_path / "copied/text").rename(tmp_path / "disk")
    (tmp_path / "copied/text").symlink_to(tmp_path / "disk")
    assert libero_files.describe_assets(tmp_path / "copied") == before
