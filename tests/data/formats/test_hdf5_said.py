"""HDF5's own messages, and attributes as other programs write them."""

import h5py
import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.formats import hdf5
from tests.data.formats.test_hdf5 import own, read_own, recording

BLOSC, ZSTD = 32001, 32015  # filters that h5py alone does not have


def compress(path, name, code, called=b""):
    """Stores a dataset as if a filter had compressed it."""
    with h5py.File(path, "r+") as file:
        values = file[name][()]
        del file[name]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk(values.shape)
        plan.set_filter(code, h5py.h5z.FLAG_OPTIONAL)  # else HDF5 wants to have it
        space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
        made = h5py.h5d.create(file.id, name.encode(), kind, space, plan)
        made.write_direct_chunk((0,) * values.ndim, b"as the filter left it")


@pytest.mark.parametrize("code", [BLOSC, ZSTD])
@pytest.mark.parametrize("name", ["action", "qpos", "front"])
def test_a_missing_filter_has_its_name(tmp_path, name, code):
    recording(tmp_path / "good.hdf5", **own())
    recording(tmp_path / "bad.hdf5", **own())
    compress(tmp_path / "bad.hdf5", name, code)
    found, (problem,) = read_own(tmp_path)
    assert [e.id for e in found] == ["good"]
    assert (problem.kind, problem.episode) == ("missing filter", "bad")
    assert f"/{name} is compressed with filter {code}" in problem.message
    assert "pip install hdf5plugin" in problem.message
    assert read_own(tmp_path, **{"data.exclude": ("bad",)})[1] == []


def test_a_whole_set_that_is_compressed_is_no_fault_of_the_config(tmp_path):
    for number in range(2):
        recording(tmp_path / f"{number}.hdf5", **own())
        compress(tmp_path / f"{number}.hdf5", "action", BLOSC)
    found, problems = read_own(tmp_path)
    assert not found and [p.kind for p in problems] == ["missing filter"] * 2


def test_filters_that_are_there_are_used(tmp_path):
    recording(tmp_path / "a.hdf5", **own())
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        for name in ("action", "front"):
            values = file[name][()]
            del file[name]
            file.create_dataset(name, data=values, compression="gzip", shuffle=True)
    (found,), problems = read_own(tmp_path)
    assert not problems and found.frames("front", [0]).shape == (1, 4, 6, 3)


@pytest.mark.parametrize(
    "content, says",
    [
        (lambda whole: b"no HDF5 at all" * 100, "it is no HDF5 file (Unable to"),
        (lambda whole: b"", "it is no HDF5 file"),
        (lambda whole: whole[: len(whole) // 2], "the file is cut off; copy it again"),
    ],
)
def test_what_hdf5_says_is_explained(tmp_path, content, says):
    recording(tmp_path / "good.hdf5", **own())
    (tmp_path / "bad.h5").write_bytes(content((tmp_path / "good.hdf5").read_bytes()))
    found, (problem,) = read_own(tmp_path)
    assert [e.id for e in found] == ["good"] and problem.episode == "bad"
    assert says in problem.message


def test_a_recording_that_another_program_has_open(tmp_path):
    recording(tmp_path / "good.hdf5", **own())
    recording(tmp_path / "open.hdf5", **own())
    with h5py.File(tmp_path / "open.hdf5", "r+"):
        _, problems = read_own(tmp_path)
    # h5py refuses to open in another mode what the same program has open; others meet the lock.
    assert {p.episode for p in problems} <= {"open"}
    assert "another program writes it" in hdf5._said(OSError("unable to lock file, errno = 11"))
    assert "h5clear" in hdf5._said(OSError("file is already open for write"))


@pytest.mark.parametrize("link", ["soft", "external"])
def test_links_inside_a_file_that_lead_nowhere(tmp_path, link):
    recording(tmp_path / "good.hdf5", **own())
    recording(tmp_path / "bad.hdf5", **own(action=None))
    target = h5py.SoftLink("/gone") if link == "soft" else h5py.ExternalLink("gone.h5", "/a")
    with h5py.File(tmp_path / "bad.hdf5", "r+") as file:
        file["action"] = target
    _, (problem,) = read_own(tmp_path)
    assert problem.kind == "missing dataset" and "action is a link to /" in problem.message
    assert ("in gone.h5" in problem.message) == (link == "external")


GOOD = [10, 10.0, "10", " 10.0 ", np.bytes_("10"), b"10", np.array([10.0]), np.array([[10]])]
GOOD += [np.float32(10), np.array(["10"], object), np.array([b"10"]), np.uint8(10)]


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_a_rate_is_a_number_however_it_is_written(tmp_path, value):
    recording(tmp_path / "a.hdf5", **own(**{"@fps": value}))
    for fps in (0.0, 10.0):
        (found,), problems = read_own(tmp_path, **{"data.fields.fps": fps})
        assert found.fps == 10.0 and not problems
    _, (problem,) = read_own(tmp_path, **{"data.fields.fps": 20.0})
    assert "the file says 10, config.data.fields.fps is 20" in problem.message


@pytest.mark.parametrize("fps", [29.97, 30000 / 1001, 59.94])
def test_a_rate_of_single_precision_agrees(tmp_path, fps):
    recording(tmp_path / "a.hdf5", **own(**{"@fps": np.float32(fps)}))
    (found,), problems = read_own(tmp_path, **{"data.fields.fps": fps})
    assert not problems and found.fps == pytest.approx(fps)


BAD = [0, -5, np.nan, np.inf, "ten", "", b"\xff", np.array([10, 20]), np.array([]), True, 1j]


@pytest.mark.parametrize("value", [*BAD, h5py.Empty("f")], ids=repr)
def test_a_rate_that_is_none_gives_way_to_the_config(tmp_path, value):
    """What the message advises works."""
    recording(tmp_path / "good.hdf5", **own(**{"@fps": 10.0}))
    recording(tmp_path / "bad.hdf5", **own(**{"@fps": value}))
    _, (problem,) = read_own(tmp_path, **{"data.fields.fps": 0.0})
    assert (problem.kind, problem.episode) == ("wrong fps", "bad")
    assert "attribute fps of / is" in problem.message
    assert "set config.data.fields.fps, which counts then" in problem.message
    found, problems = read_own(tmp_path, **{"data.fields.fps": 10.0})
    assert [e.fps for e in found] == [10.0, 10.0] and not problems


@pytest.mark.parametrize(
    "value",
    ["fold", b"fold", np.bytes_("fold"), np.array(["fold"], object), np.array([b"fold"]), " fold "],
    ids=repr,
)
def test_an_instruction_however_it_is_written(tmp_path, value):
    recording(tmp_path / "a.hdf5", **own(**{"@words": value}))
    (found,), problems = read_own(tmp_path, **{"data.fields.task": "@words"})
    assert found.task == "fold" and not problems


@pytest.mark.parametrize("kind", [str, bytes, "array"])
def test_json_in_an_attribute_however_it_is_written(tmp_path, kind):
    text = '{"lang": "fold"}'
    value = {str: text, bytes: text.encode(), "array": np.array([text], object)}[kind]
    recording(tmp_path / "a.hdf5", **own(**{"@about": value}))
    (found,), problems = read_own(tmp_path, **{"data.fields.task": "@about#/lang"})
    assert found.task == "fold" and not problems


def test_pictures_of_a_type_that_nobody_expects(tmp_path):
    recording(tmp_path / "a.hdf5", **own())
    (found,), _ = read_own(tmp_path)
    (tmp_path / "a.hdf5").write_bytes(b"gone")
    hdf5._OPEN.files.clear()
    with pytest.raises(episodes.FrameError, match="it is no HDF5 file"):
        found.frames("front", [0])


@pytest.mark.parametrize("count, warns", [(6, 0), (np.array([6]), 0), ("6", 0), (7, 1), ("six", 0)])
def test_the_number_of_steps_that_robomimic_keeps(tmp_path, count, warns):
    recording(tmp_path / "a.hdf5", **own(**{"@num_samples": count}))
    (found,), problems = read_own(tmp_path)
    assert found.length == 6 and len(problems) == warns
    assert all(p.severity == "warning" and "num_samples is 7" in p.message for p in problems)
