"""RLDS data read back as they were written, without TensorFlow, and every fault has a name."""

import concurrent.futures
import json
import multiprocessing
import operator
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import rlds
from tests import synthetic, writers

ROOT = Path(__file__).parents[3]


class Changing(episodes.ArrayEpisode):
    """The instruction changes with every step."""

    def task_at(self, step):
        return f"{self.task}, part {step}"


@pytest.fixture(scope="module")
def written():
    first, *rest = synthetic.make_episodes(7)
    return [Changing(**vars(first)), *rest]


@pytest.fixture
def data(tmp_path, written):
    """Reads the seven episodes, in shards of 3, 3 and 1; keyword arguments change the config."""
    overrides = writers.rlds(tmp_path, written, image="png")

    def read(**changes):
        return episodes.read(
            synthetic.make_config(
                tmp_path,
                **{
                    **overrides,
                    **{key.replace("__", "."): value for key, value in changes.items()},
                },
            )
        )

    read.shards = sorted(Path(overrides["data.path"]).glob("*tfrecord*"))
    read.path = Path(overrides["data.path"])
    return read


@pytest.mark.parametrize(
    "image, file_format", [("png", "tfrecord"), ("jpeg", "tfrecord"), ("png", "array_record")]
)
def test_what_was_written_is_read_back(image, file_format, written, tmp_path):
    overrides = writers.rlds(tmp_path, written, image=image, file_format=file_format)
    read = episodes.load_episodes(synthetic.make_config(tmp_path, **overrides))
    assert [e.id for e in read] == [f"train/{i:06d}" for i in range(7)]
    for ours, theirs in zip(read, written):
        assert (ours.length, ours.fps) == (theirs.length, theirs.fps)
        assert [ours.task_at(i) for i in range(ours.length)] == [
            theirs.task_at(i) for i in range(theirs.length)
        ]
        assert ours.timestamps is None and ours.state.dtype == np.float32
        np.testing.assert_array_equal(ours.state, theirs.state)
        np.testing.assert_array_equal(ours.action, theirs.action)
        window = windows_lib.window_at(ours.length, 2, 9, 2, 8)
        for camera in ("scene", "wrist"):
            got, want = (e.frames(camera, window.frames) for e in (ours, theirs))
            assert got.dtype == np.uint8 and got.shape == want.shape
            if image == "png":
                np.testing.assert_array_equal(got, want)
            else:
                assert np.abs(got.astype(int) - want).mean() < 4
    assert read[0].task == read[0].task_at(0) != read[0].task_at(1)
    with pytest.raises(KeyError, match="no camera 'front'; it has scene, wrist"):
        read[0].frames("front", [0])


def test_tensorflow_is_not_imported(data, written, tmp_path):
    """Even where it is installed; here it would stop the program."""
    for name in ("tensorflow", "torch"):
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / "installed" / name / "__init__.py").write_text(
            "import sys; sys.exit('stop')", encoding="utf-8"
        )
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "installed")!r}, {str(ROOT / "tests")!r}]
from tests import synthetic
from lightwam_jax.data import episodes
config = synthetic.make_config("", **{{"data.source": "rlds", "data.path": {str(data.path)!r},
                                      "data.fields.fps": 10.0}})
read = episodes.load_episodes(config)
assert len(read) == {len(written)} and read[3].frames("wrist", [1, 0]).shape[0] == 2
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_frames_are_the_ones_asked_for(data, written):
    read, _ = data()
    wanted = [4, 0, 4, 2]
    np.testing.assert_array_equal(
        read[5].frames("scene", wanted), written[5].images["scene"][wanted]
    )
    swapped, _ = data(data__fields__channel_order="bgr")
    np.testing.assert_array_equal(
        swapped[5].frames("scene", wanted), written[5].images["scene"][wanted][..., ::-1]
    )


def test_keys(data, written):
    read, problems = data(
        data__fields__state=("observation/state[:-1, 2:]", "is_last[:-1]", "action[:-1, 0]"),
        data__fields__action=("action[1:]",),
        data__fields__image="observation/{camera}[1:]",
        data__fields__task="/episode_metadata/file_path",
    )
    assert not problems and read[2].task == "somewhere.hdf5"
    np.testing.assert_array_equal(read[2].state[:, :6], written[2].state[:-1, 2:])
    np.testing.assert_array_equal(read[2].state[:, 7], written[2].action[:-1, 0])
    np.testing.assert_array_equal(read[2].action, written[2].action[1:])
    np.testing.assert_array_equal(read[2].frames("wrist", [1]), written[2].images["wrist"][[2]])
    assert data(data__fields__task="text:tidy up")[0][0].task == "tidy up"
    _, problems = data(data__fields__action=("action[1:]",))
    assert "state has" in problems[0].message and problems[0].kind == "wrong length"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data__fields__state": ("proprio",)}, "features.json has no 'proprio'; it has"),
        ({"data__fields__state": ("language_instruction",)}, "expected numbers"),
        ({"data__fields__task": "action"}, "expected text"),
        ({"data__fields__task": "instruction"}, "no 'instruction'; it has"),
        ({"data__fields__image": "observation/state"}, "expected a tfds.features.Image"),
        ({"data__fields__state": ("/episode_metadata/file_path",)}, "not in the steps"),
        ({"data__cameras": ("front",)}, "no 'observation/front'; it has"),
        ({"data__fields__fps": 0.0}, "config.data.fields.fps is 0"),
    ],
)
def test_keys_that_fit_nothing_list_what_there_is(changes, words, data):
    with pytest.raises(ValueError, match=words) as error:
        data(**changes)
    if "they have" in words:
        assert "\n  observation/state: Tensor(shape=(8,)" in str(error.value)
        assert "\n  /episode_metadata/file_path: Text" in str(error.value)


def test_where_the_data_set_is(data, tmp_path):
    above = str(data.path.parent)
    assert len(data(data__path=above)[0]) == 7
    (data.path.parent / "2.0.0").mkdir()
    (data.path.parent / "2.0.0" / "features.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no features.json and 1.0.0, 2.0.0 below it"):
        data(data__path=above)
    with pytest.raises(ValueError, match="no version of a dataset below it"):
        data(data__path=str(tmp_path))


def found(problems):
    return [(p.kind, p.episode, Path(p.file).name[-14:]) for p in problems]


def test_a_flipped_bit(data):
    content = bytearray(data.shards[0].read_bytes())
    content[len(content) // 2] ^= 1
    data.shards[0].write_bytes(content)
    read, problems = data()
    assert found(problems) == [("bad checksum", "train/000001", "00000-of-00003")]
    assert "record 1: the" in problems[0].message
    assert [e.id[-1] for e in read] == list("023456")
    left, problems = data(data__exclude=("train/000001",))
    assert len(left) == 6 and not problems


def test_a_flipped_bit_after_opening(data):
    read, _ = data()
    content = bytearray(data.shards[2].read_bytes())
    content[-100] ^= 1
    data.shards[2].write_bytes(content)
    with pytest.raises(episodes.FrameError, match=r"train/000006 .*do not match their checksum"):
        read[6].frames("scene", [0])


def test_a_flipped_bit_in_a_length(data):
    content = bytearray(data.shards[1].read_bytes())
    content[0] ^= 1
    data.shards[1].write_bytes(content)
    _, problems = data()
    assert found(problems) == [
        ("damaged file", f"train/00000{i}", "00001-of-00003") for i in (3, 4, 5)
    ]
    assert "length at byte 0 does not match" in problems[0].message


@pytest.mark.parametrize("keep, lost", [(-1, [5]), (5, [3, 4, 5]), (0, [3, 4, 5])])
def test_a_truncated_file(keep, lost, data):
    content = data.shards[1].read_bytes()
    data.shards[1].write_bytes(content[:keep])
    read, problems = data()
    assert [int(p.episode[-1]) for p in problems] == lost and len(read) == 7 - len(lost)
    assert {p.kind for p in problems} == {"truncated file" if keep else "missing record"}
    assert {p.file for p in problems} == {str(data.shards[1])}


def test_a_missing_shard(data):
    data.shards[0].unlink()
    read, problems = data()
    assert found(problems) == [
        ("missing file", f"train/00000{i}", "00000-of-00003") for i in range(3)
    ]
    assert read[0].id == "train/000003"  # ids do not shift


def test_records_that_are_not_announced(data):
    data.shards[2].write_bytes(data.shards[2].read_bytes() * 2)
    read, problems = data()
    assert len(read) == 7 and [p.kind for p in problems] == ["too many records"]
    assert "speaks of 1 records, 2 are there" in problems[0].message


def test_a_record_of_something_else(data):
    data.shards[2].write_bytes(writers.tfrecord(b"no example"))
    _, problems = data()
    assert found(problems) == [("unreadable record", "train/000006", "00002-of-00003")]
    data.shards[2].write_bytes(writers.tfrecord(b""))  # an example without features
    assert found(data()[1]) == found(problems)


def test_a_damaged_array_record(written, tmp_path):
    overrides = writers.rlds(tmp_path, written, file_format="array_record")
    shard = next(Path(overrides["data.path"]).glob("*array_record-00001*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    _, problems = episodes.read(synthetic.make_config(tmp_path, **overrides))
    assert found(problems) == [
        ("damaged file", f"train/00000{i}", "00001-of-00003") for i in (3, 4, 5)
    ]


def test_a_damaged_image_is_named_by_its_frame(tmp_path, monkeypatch):
    whole, made = writers.encoded, []

    def encoded(pixels, image):
        made.append(whole(pixels, image))
        return made[-1][:50] if len(made) == 4 else made[-1]

    monkeypatch.setattr(writers, "encoded", encoded)
    overrides = writers.rlds(tmp_path, synthetic.make_episodes(1))
    (episode,), problems = episodes.read(synthetic.make_config(tmp_path, **overrides))
    assert not problems and len(episode.frames("scene", [0, 1, 2])) == 3
    with pytest.raises(episodes.FrameError, match=r"frame 1: .*wrist: 50 bytes do not decode"):
        episode.frames("wrist", [0, 1])


def test_a_data_set_without_steps(data):
    path = data.path / "features.json"
    features = json.loads(path.read_text(encoding="utf-8"))
    del features["featuresDict"]["features"]["steps"]
    path.write_text(json.dumps(features), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no nested steps, so it is not RLDS; .*episode_metadata"):
        data()


def test_other_threads_and_processes(data, written):
    read, _ = data()
    look = operator.methodcaller("frames", "scene", [-1])
    for pool in (
        concurrent.futures.ThreadPoolExecutor(4),
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")),
    ):
        with pool:
            for frames, episode in zip(pool.map(look, read), written):
                np.testing.assert_array_equal(frames, episode.images["scene"][-1:])
    assert rlds.RldsEpisode.__module__ in str(type(read[0]))


@pytest.mark.parametrize(
    "name, change",
    [
        ("features.json", lambda text: text[:50]),
        ("features.json", lambda text: ""),
        ("features.json", lambda text: "null"),
        ("features.json", lambda text: text.replace("{", "[", 1)),
        ("features.json", lambda text: "\udcff"),
        ("features.json", lambda text: text.replace("featuresDict", "other")),
        ("dataset_info.json", lambda text: text[:50]),
        ("dataset_info.json", lambda text: "[]"),
        ("dataset_info.json", lambda text: text.replace('"robot"', "3")),
        ("dataset_info.json", lambda text: text.replace('"robot"', "null")),
        ("dataset_info.json", lambda text: text.replace('"tfrecord"', '"parchment"')),
        (
            "dataset_info.json",
            lambda text: text.replace('"shardLengths": [', '"shardLengths": ["x",'),
        ),
        ("dataset_info.json", lambda text: text.replace('"1.0.0"', "1.0")),
    ],
)
def test_metadata_that_cannot_be_read_are_named(tmp_path, name, change):
    keys = writers.rlds(tmp_path, synthetic.make_episodes(2))
    file = Path(keys["data.path"]) / name
    text = change(file.read_text(encoding="utf-8"))
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        episodes.read(synthetic.make_config("", **keys))
    assert "\n" not in str(error.value)
