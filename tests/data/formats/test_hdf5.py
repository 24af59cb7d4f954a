"""HDF5 recordings read back as they were written."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import operator
import os

import h5py
import numpy as np
import pytest

from configs import hdf5_robot
from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import hdf5
from lightwam_jax.data.formats import keys as keys_lib
from tests import synthetic, writers

RED, BLUE = (220, 20, 20), (20, 20, 220)


@pytest.mark.parametrize("write", [writers.robomimic, writers.robotwin])
def test_what_was_written_is_read_back(write, tmp_path):
    written = synthetic.make_episodes(12)
    config = synthetic.make_config(tmp_path, **write(tmp_path, written))
    read = episodes.load_episodes(config)
    assert len(read) == len(written)  # in order: the eleventh does not come second
    for ours, theirs in zip(read, written):
        assert (ours.length, ours.fps, ours.task) == (theirs.length, theirs.fps, theirs.task)
        assert ours.timestamps is None and ours.state.dtype == np.float32
        np.testing.assert_array_equal(ours.state, theirs.state)
        np.testing.assert_array_equal(ours.action, theirs.action)
        window = windows_lib.window_at(ours.length, 2, 9, 2, 8)
        for camera in ("scene", "wrist"):
            got, want = (e.frames(camera, window.frames) for e in (ours, theirs))
            assert got.dtype == np.uint8 and got.shape == want.shape
            if write is writers.robomimic:
                np.testing.assert_array_equal(got, want)
            else:
                assert np.abs(got.astype(int) - want).mean() < 4  # JPEG
    with pytest.raises(KeyError, match="no camera 'front'; it has scene, wrist"):
        read[0].frames("front", [0])


def recording(path, **contents):
    """Writes one file; attributes are named "@name" or "group@name"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in contents.items():
            place, at, attribute = name.partition("@")
            if at:
                file.require_group(place or "/").attrs[attribute] = value
            else:
                file[place] = value


def own(n=6, **changes):
    """What a user's own file holds: `read_own` reads it."""
    contents = {
        "qpos": np.arange(n * 8.0).reshape(n, 8),
        "action": np.ones((n, 7)),
        "front": np.arange(n, dtype=np.uint8)[:, None, None, None]
        * np.ones((n, 4, 6, 3), np.uint8),
    }
    return {key: value for key, value in {**contents, **changes}.items() if value is not None}


def read_own(tmp_path, **overrides):
    return episodes.read(
        synthetic.make_config(
            tmp_path,
            **{
                "data.source": "hdf5",
                "data.path": str(tmp_path),
                "data.cameras": ("front",),
                "data.fields.state": ("qpos",),
                "data.fields.action": ("action",),
                "data.fields.image": "{camera}",
                "data.fields.task": "text:stack",
                "data.fields.fps": 5.0,
                **overrides,
            },
        )
    )


def test_frames_are_the_ones_asked_for(tmp_path):
    recording(tmp_path / "a.h5", **own(40))
    (episode,), _ = read_own(tmp_path)
    wanted = [7, 3, 39, 3, 0]
    assert episode.frames("front", wanted)[:, 0, 0, 0].tolist() == wanted
    (halved,), _ = read_own(
        tmp_path,
        **{
            "data.fields.state": ("qpos[1::2]",),
            "data.fields.action": ("action[1::2]",),
            "data.fields.image": "{camera}[1::2]",
        },
    )
    assert halved.length == 20 and halved.state[1, 0] == 24
    assert halved.frames("front", [0, 4, 19])[:, 0, 0, 0].tolist() == [1, 9, 39]


def test_parts_and_dimensions_of_datasets(tmp_path):
    recording(tmp_path / "a.h5", **own(arm=np.arange(54).reshape(6, 9), grip=np.arange(6.0)))
    (episode,), problems = read_own(
        tmp_path,
        **{
            "data.fields.state": ("arm[:, 1:8]", "grip"),
            "data.fields.action": ("arm[:, -1]", "action[:, :6]"),
        },
    )
    assert not problems
    np.testing.assert_array_equal(episode.state[2], [19, 20, 21, 22, 23, 24, 25, 2])
    assert episode.action[2].tolist() == [26, 1, 1, 1, 1, 1, 1]
    for wrong in ("a[3]", "a[", "a[::-1]", "a[1:2:3:4]", "a[:, x]", ""):
        with pytest.raises(ValueError, match="expected PATH, PATH"):
            keys_lib.parse(wrong)


def encodings(images):
    """The ways in which encoded images lie in HDF5 files."""
    longest = max(map(len, images))
    variable = np.empty(len(images), object)
    variable[:] = [np.frombuffer(p, np.uint8) for p in images]
    return {
        "fixed": np.array(images),  # RoboTwin
        "padded": np.array([np.frombuffer(p.ljust(longest, b"\0"), np.uint8) for p in images]),
        "opaque": np.array([np.void(p.ljust(longest, b"\0")) for p in images]),
        "variable": variable,
    }


@pytest.mark.parametrize("kind", ["fixed", "padded", "opaque", "variable"])
def test_encoded_images(kind, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), np.uint8)
    stored = encodings([writers.encoded(frame, "png") for frame in frames])[kind]
    recording(tmp_path / "a.h5", **own(front=None))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        dtype = h5py.vlen_dtype(np.uint8) if kind == "variable" else stored.dtype
        file.create_dataset("front", data=stored, dtype=dtype)
    (episode,), _ = read_own(tmp_path)
    np.testing.assert_array_equal(episode.frames("front", [5, 0]), frames[[5, 0]])


def test_red_and_blue(tmp_path):
    """RoboTwin's JPEGs have them swapped, and only "bgr" puts that right; arrays likewise."""
    (red,) = written = synthetic.make_episodes(1)
    square = (red.images["scene"][0] == RED).all(-1)
    overrides = writers.robotwin(tmp_path, written)

    def colour(**changes):
        (episode,), _ = episodes.read(synthetic.make_config(tmp_path, **{**overrides, **changes}))
        return np.median(episode.frames("scene", [0])[0][square], 0)

    np.testing.assert_allclose(colour(), RED, atol=30)
    np.testing.assert_allclose(colour(**{"data.fields.channel_order": "rgb"}), BLUE, atol=30)
    overrides = writers.robomimic(tmp_path, written)
    np.testing.assert_array_equal(colour(), RED)
    np.testing.assert_array_equal(colour(**{"data.fields.channel_order": "bgr"}), BLUE)


@pytest.mark.parametrize(
    "key, text",
    [
        ("text:fold it", "fold it"),
        ("@task", "one"),
        ("/notes@info#/language_instruction", "two"),
        ("/notes@list#/0/text", "three"),
        ("/notes@letters#/t", "four"),
        ("words", "five"),
        ("steps[:-1]", "six"),
        ("file:note.txt", "seven"),
        ("file:{name}.json#/seen/1", "eight"),
        ("file:all.json#/{name}", "nine"),
    ],
)
def test_where_the_instruction_may_be(key, text, tmp_path):
    steps = ["six"] * 5 + ["last", "beyond"]
    recording(
        tmp_path / "a.h5",
        **own(
            **{
                "@task": "one",
                "notes@info": json.dumps({"language_instruction": "two"}),
                "notes@list": json.dumps([{"text": "three"}]),
                "words": "five",
                "steps": steps,
                "notes@letters": np.bytes_(json.dumps({"t": list("four")})),
            }
        ),
    )
    (tmp_path / "note.txt").write_text("seven\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"seen": ["x", "eight"]}), encoding="utf-8")
    (tmp_path / "all.json").write_text(json.dumps({"a": "nine"}), encoding="utf-8")
    (episode,), problems = read_own(tmp_path, **{"data.fields.task": key})
    assert not problems and episode.task == text
    assert episode.task_at(5) == ("last" if text == "six" else text)


def test_fps_in_the_file(tmp_path):
    recording(
        tmp_path / "a.h5",
        **{f"data/demo_{i}/{k}": v for i in (10, 2) for k, v in (own().items())},
        **{"data@fps": 12.5},
    )
    read, _ = read_own(tmp_path, **{"data.fields.episodes": "data/demo_*", "data.fields.fps": 0.0})
    assert [(e.id, e.fps) for e in read] == [("a/data/demo_2", 12.5), ("a/data/demo_10", 12.5)]


def layouts():
    """What the layouts of configs/hdf5_robot.py promise to read, eight steps each."""
    n, rng = 8, np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 12, 16, 3), np.uint8)
    jpegs = [writers.encoded(p) for p in images]
    padded = np.array([np.frombuffer(j.ljust(5000, b"\0"), np.uint8) for j in jpegs])
    demo = {
        "actions": rng.random((n, 7)),
        "obs/ee_states": rng.random((n, 6)),
        "obs/gripper_states": rng.random((n, 2)),
        "obs/agentview_rgb": images,
        "obs/eye_in_hand_rgb": images,
    }
    libero = {f"data/demo_{i}/{k}": v for i in range(2) for k, v in demo.items()}
    qpos = {"observations/qpos": rng.random((n, 14)), "action": rng.random((n, 14))}
    return {
        "own": {
            "observations/qpos": rng.random((n, 7)),
            "action": rng.random((n, 7)),
            **{f"observations/images/{c}": images for c in ("front", "wrist")},
        },
        "libero": {**libero, "data@problem_info": json.dumps({"language_instruction": "open it"})},
        "libero_replayed": libero,
        "robotwin": {
            "joint_action/vector": rng.random((n, 14)),
            **{
                f"observation/{side}_camera/rgb": np.array(jpegs)
                for side in ("head", "left", "right")
            },
        },
        "aloha": {
            **qpos,
            **{
                f"observations/images/cam_{c}": padded
                for c in ("high", "left_wrist", "right_wrist")
            },
        },
    }


@pytest.mark.parametrize("name", hdf5_robot.LAYOUTS)
def test_the_layouts_of_the_config(name, tmp_path):
    contents = layouts()["own" if name == "tiny" else name]
    recording(tmp_path / "data" / "open_it.hdf5", **contents)
    (tmp_path / "data" / "open_it.txt").write_text("open it", encoding="utf-8")
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions" / "open_it.json").write_text(
        '{"seen": ["open it"]}', encoding="utf-8"
    )
    config = config_lib.from_config_dict(hdf5_robot.get_config(name))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=str(tmp_path / "data"))
    )
    read = episodes.load_episodes(config)
    assert len(read) == (2 if "libero" in name else 1)
    if name not in ("own", "tiny", "aloha"):
        assert read[0].task == "open it"
    shift = name in ("libero", "robotwin")  # there, the action of a row is in the next one
    assert read[0].length == 8 - shift
    action = next(v for k, v in contents.items() if "action" in k)
    np.testing.assert_array_equal(read[0].action, action[shift:].astype(np.float32))
    if name == "libero":
        np.testing.assert_array_equal(
            read[1].state[:, :6], contents["data/demo_1/obs/ee_states"][:-1].astype(np.float32)
        )
    for camera in config.data.cameras:
        assert read[0].frames(camera, [0, read[0].length - 1]).shape == (2, 12, 16, 3)
    with pytest.raises(ValueError, match="expected one of own, tiny, libero"):
        hdf5_robot.get_config("droid")


def test_other_threads_and_processes(tmp_path):
    for i in range(hdf5._OPEN_FILES + 3):
        recording(tmp_path / f"{i}.h5", **own(i + 1))
    read, _ = read_own(tmp_path)
    last = [episode.frames("front", [-1])[0, 0, 0, 0] for episode in read]
    assert last == list(range(len(read))) and len(hdf5._OPEN.files) == hdf5._OPEN_FILES
    look = operator.methodcaller("frames", "front", [-1])
    pools = (
        concurrent.futures.ThreadPoolExecutor(4),
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")),
    )
    for pool in pools:
        with pool:
            assert [frames[0, 0, 0, 0] for frames in pool.map(look, read)] == last


def test_every_thread_and_every_process_has_its_own_files(tmp_path, monkeypatch):
    recording(tmp_path / "a.h5", **own())
    path = str(tmp_path / "a.h5")
    mine = hdf5._opened(path)
    assert hdf5._opened(path) is mine
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(hdf5._opened, path).result() is not mine
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)  # as after a fork
    assert hdf5._opened(path) is not mine
