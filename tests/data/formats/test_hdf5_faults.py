"""Broken HDF5 recordings and keys that fit nothing: every fault has a name."""

import json

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.formats import hdf5
from tests import writers
from tests.data.formats.test_hdf5 import own, read_own, recording


@pytest.mark.parametrize(
    "key, words",
    [
        ("@task", "@task is not there; there are @colour, action"),
        ("speech", "speech is not there"),
        ("file:{name}.txt", r"b\.txt cannot be read"),
        ("/@colour#/x", "leads nowhere"),
        ("@colour", "of step 0 is empty"),
        ("qpos", "expected text"),
    ],
)
def test_an_instruction_that_is_missing(key, words, tmp_path):
    recording(tmp_path / "b.h5", **own(**{"@colour": ""}))
    with pytest.raises(ValueError, match=f"fits no episode(.|\n)*missing(.|\n)*{words}"):
        read_own(tmp_path, **{"data.fields.task": key})


def test_several_instructions_need_a_choice(tmp_path):
    recording(tmp_path / "a.h5", **own(**{"@info": json.dumps({"seen": ["one", "two"]})}))
    with pytest.raises(ValueError, match="expected one text: point to it"):
        read_own(tmp_path, **{"data.fields.task": "@info#/seen"})


FAULTS = {
    "missing dataset": own(action=None),
    "wrong length": own(front=np.zeros((5, 4, 6, 3), np.uint8)),
    "wrong type": own(front=np.zeros((6, 4, 6, 3), np.float32)),
    "wrong fps": own(**{"@fps": 30.0}),
    "not finite": own(qpos=np.full((6, 8), np.nan)),
    "wrong width": own(qpos=np.zeros((6, 9))),
    "empty episode": own(0),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_have_names(kind, tmp_path):
    recording(tmp_path / "good.hdf5", **own())
    recording(tmp_path / "sub" / "bad.hdf5", **FAULTS[kind])
    read, problems = read_own(tmp_path)
    assert [(p.kind, p.episode, p.severity) for p in problems] == [(kind, "sub/bad", "error")]
    assert problems[0].file == str(tmp_path / "sub" / "bad.hdf5")
    assert "good" in [e.id for e in read]
    read, problems = read_own(tmp_path, **{"data.exclude": ("sub/bad",)})
    assert ([e.id for e in read], problems) == (["good"], [])


def test_lengths_that_differ_are_told_apart(tmp_path):
    recording(tmp_path / "a.h5", **own())
    recording(tmp_path / "b.h5", **own(qpos=np.zeros((7, 8))))
    recording(tmp_path / "c.h5", **own(extra=np.zeros(5)))
    recording(tmp_path / "d.h5", **own(extra=np.zeros(6)))
    _, (state,) = read_own(tmp_path)
    assert "state has 7 rows and action has 6" in state.message
    _, problems = read_own(tmp_path, **{"data.fields.state": ("qpos[:, 1:]", "extra")})
    assert "qpos[:, 1:] has 6, extra has 5" in problems[2].message


def test_files_that_do_not_open(tmp_path):
    recording(tmp_path / "good.hdf5", **own())
    whole = (tmp_path / "good.hdf5").read_bytes()
    (tmp_path / "short.hdf5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("no HDF5", encoding="utf-8")
    read, problems = read_own(tmp_path)
    assert [e.id for e in read] == ["good"]
    assert [(p.kind, p.episode) for p in problems] == [
        ("unreadable file", "short"),
        ("unreadable file", "text"),
    ]


def test_a_damaged_image_is_named_by_its_frame(tmp_path):
    stored = [writers.encoded(np.full((4, 6, 3), i, np.uint8), "png") for i in range(6)]
    stored[4] = stored[4][:40]
    recording(tmp_path / "a.h5", **own(front=np.array(stored)))
    larger = [writers.encoded(np.zeros((4 + (i == 2), 6, 3), np.uint8)) for i in range(6)]
    recording(tmp_path / "b.h5", **own(front=np.array(larger)))
    (cut, mixed), problems = read_own(tmp_path)
    assert not problems and cut.frames("front", [3]).shape == (1, 4, 6, 3)
    with pytest.raises(episodes.FrameError, match=r"a.h5, frame 4: .*40 bytes do not decode"):
        cut.frames("front", [3, 4, 5])
    with pytest.raises(episodes.FrameError, match=r"frame 2: .*\[5, 6, 3\] here and \[4, 6, 3\]"):
        mixed.frames("front", [0, 2])
    (tmp_path / "a.h5").unlink()
    hdf5._OPEN.files.clear()
    with pytest.raises(episodes.FrameError, match=r"a\.h5: a /front: "):
        cut.frames("front", [0])


def test_keys_that_fit_nothing_list_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.hdf5 or \*\.h5 file below"):
        read_own(tmp_path)
    recording(tmp_path / "a.h5", **own(**{"data/demo_0/obs/image": np.zeros((3, 4)), "@note": "x"}))
    listing = r"holds:\n  @note\n  action \(float64 \[6, 7\]\)\n  data/demo_0/obs/image"
    for overrides, words in (
        ({"data.fields.state": ("joints",)}, "joints is not there; there are"),
        ({"data.fields.episodes": "data/episode_*"}, r"no group 'data/episode_\*'"),
        ({"data.fields.fps": 0.0}, "set config.data.fields.fps"),
        ({"data.cameras": ("wrist",)}, "wrist is not there"),
    ):
        with pytest.raises(ValueError, match=f"fits no episode(.|\n)*{words}(.|\n)*{listing}"):
            read_own(tmp_path, **overrides)
    with pytest.raises(ValueError, match=f"state, task must say where(.|\n)*{listing}"):
        read_own(tmp_path, **{"data.fields.state": (), "data.fields.task": ""})
