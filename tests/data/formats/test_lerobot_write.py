"""LeRobot datasets: written, and read back frame by frame and field by field."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import lerobot_stats, lerobot_write, video
from tests import synthetic
from tests.data.formats.test_video import counted, numbers

LENGTHS = (12, 5, 9, 33, 7, 20)
SETS = ("2.1 video", "2.1 images", "3.0 video", "3.0 images")


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded(episodes.ArrayEpisode):
    """Its instruction changes after three steps."""

    def task_at(self, step):
        return self.task if step < 3 else "go home"


def record():
    """Episodes whose images carry their frame number; one of the cameras is hard to compress."""
    rng, out = np.random.default_rng(0), []
    for i, n in enumerate(LENGTHS):
        wrist = counted(n + 10 * i, 48, 64)[10 * i :]  # frame k of episode i says 10 i + k
        wrist[:, 24:] = rng.integers(0, 256, (n, 24, 64, 3))
        out.append(
            Recorded(
                f"recording {i}",
                20.0,
                synthetic.TASKS[i % 2],
                rng.standard_normal((n, 8)).astype(np.float32),
                rng.uniform(-1, 1, (n, 7)).astype(np.float32),
                {"scene": counted(n + 10 * i)[10 * i :], "wrist": wrist},
            )
        )
    return out


def write(found, path, name, **options):
    """Writes a set that is one of SETS, packed ones in several files."""
    version, how = name.split()
    if how == "video":
        options = {"video_mb": 0.004, "tune": "zerolatency"} | options
    lerobot_write.write(
        found,
        path,
        version,
        ("scene", "wrist"),
        videos=how == "video",
        data_mb=0.006 if how == "video" else 0.1,
        robot_type="arm",
        **options,
    )


def configure(path, **overrides):
    return synthetic.make_config(
        "", **{"data.source": "lerobot", "data.path": str(path)} | overrides
    )


@pytest.fixture(scope="module")
def recorded():
    return record()


@pytest.fixture(scope="module")
def written(recorded, tmp_path_factory):
    """{name: directory} of all SETS."""
    root = tmp_path_factory.mktemp("lerobot")
    for name in SETS:
        write(recorded, root / name, name)
    return {name: root / name for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_a_written_set_reads_back(written, recorded, name):
    found, problems = episodes.read(configure(written[name]))
    assert not problems and [e.id for e in found] == [f"episode_{i:06d}" for i in range(6)]
    for back, episode in zip(found, recorded):
        assert (back.length, back.fps) == (episode.length, 20.0)
        np.testing.assert_array_equal(back.state, episode.state)
        np.testing.assert_array_equal(back.action, episode.action)
        assert back.state.dtype == back.action.dtype == np.float32
        np.testing.assert_array_equal(
            back.timestamps, (np.arange(back.length) / 20).astype(np.float32)
        )
        assert back.timestamps.dtype == np.float64
        assert back.task == episode.task
        assert [back.task_at(i) for i in range(back.length)] == (
            [episode.task] * 3 + ["go home"] * (back.length - 3)
        )
    assert episodes.tasks(found) == [synthetic.TASKS[0], "go home", synthetic.TASKS[1]]


@pytest.mark.parametrize("name", SETS)
def test_every_image_is_the_right_one(written, recorded, name):
    for number, back in enumerate(episodes.load_episodes(configure(written[name]))):
        for camera, images in recorded[number].images.items():
            everything = back.frames(camera, np.arange(back.length))
            assert numbers(everything) == [10 * number + i for i in range(back.length)]
            if "images" in name:
                np.testing.assert_array_equal(everything, images)
            for start in (0, 4, back.length - 1):
                window = windows_lib.window_at(back.length, start, 9, 2, 8)
                np.testing.assert_array_equal(
                    back.frames(camera, window.frames), everything[window.frames]
                )
            np.testing.assert_array_equal(
                back.frames(camera, [2, 0, 2, -1]), everything[[2, 0, 2, -1]]
            )
        # Of the other camera only noise is lost: the codec was told to keep what eyes see.
        assert (
            np.abs(
                back.frames("scene", [1]).astype(int) - recorded[number].images["scene"][1]
            ).mean()
            < 4
        )


def test_cameras_are_packed_differently(written):
    table = pq.read_table(written["3.0 video"] / "meta/episodes/chunk-000/file-000.parquet")
    files = {
        camera: table[f"videos/observation.images.{camera}/file_index"].to_pylist()
        for camera in ("scene", "wrist")
    }
    assert files["scene"] != files["wrist"]
    assert max(files["scene"]) > 0 and len(set(files["scene"])) < len(LENGTHS)  # several in one
    assert 0 < max(table["data/file_index"].to_pylist()) < len(LENGTHS) - 1
    for name in ("2.1 video", "3.0 video"):
        for episode in episodes.load_episodes(configure(written[name])):
            file, first = episode.video("wrist")
            assert first + episode.length <= video.probe(file).frames
    assert episodes.load_episodes(configure(written["2.1 images"]))[0].video("wrist") is None


def test_fields_of_the_format(written):
    """Compared field by field with LeRobot's dataset_metadata.py, utils.py (v0.3.3, v0.4.4)."""
    for name, own in (
        ("2.1 video", {"total_videos": 12, "total_chunks": 1}),
        ("3.0 video", {"data_files_size_in_mb": 1, "video_files_size_in_mb": 1}),
    ):
        info = json.loads((written[name] / "meta/info.json").read_text(encoding="utf-8"))
        features = info.pop("features")
        paths = info.pop("data_path"), info.pop("video_path")
        assert info == {
            "codebase_version": f"v{name[:3]}",
            "robot_type": "arm",
            "total_episodes": 6,
            "total_frames": sum(LENGTHS),
            "total_tasks": 3,
            "chunks_size": 1000,
            "fps": 20,
            "splits": {"train": "0:6"},
            **own,
        }
        assert (
            paths
            == {
                "2.1": (
                    "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                    "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
                ),
                "3.0": (
                    "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                    "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
                ),
            }[name[:3]]
        )
        assert {k: (v["dtype"], v["shape"]) for k, v in features.items()} == {
            "observation.state": ("float32", [8]),
            "action": ("float32", [7]),
            "timestamp": ("float32", [1]),
            "frame_index": ("int64", [1]),
            "episode_index": ("int64", [1]),
            "index": ("int64", [1]),
            "task_index": ("int64", [1]),
            "observation.images.scene": ("video", [64, 96, 3]),
            "observation.images.wrist": ("video", [48, 64, 3]),
        }
        assert features["observation.images.wrist"]["info"] == {
            "video.height": 48,
            "video.width": 64,
            "video.codec": "h264",
            "video.fps": 20,
            "video.pix_fmt": "yuv420p",
            "video.channels": 3,
            "video.is_depth_map": False,
            "has_audio": False,
        }


def test_fields_of_an_episode(written):
    lines = (written["2.1 video"] / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {
        "episode_index": 1,
        "tasks": [synthetic.TASKS[1], "go home"],
        "length": 5,
    }
    file = written["3.0 video"] / "meta/episodes/chunk-000/file-000.parquet"
    row = pq.read_table(file).to_pylist()[1]
    assert {key: row[key] for key in row if not key.startswith(("stats/", "videos/"))} == {
        "episode_index": 1,
        "tasks": [synthetic.TASKS[1], "go home"],
        "length": 5,
        "dataset_from_index": 12,
        "dataset_to_index": 17,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    assert {key for key in row if key.startswith("videos/")} == {
        f"videos/observation.images.{camera}/{part}"
        for camera in ("scene", "wrist")
        for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    }
    data = pq.read_table(written["3.0 video"] / "data/chunk-000/file-000.parquet")
    assert data["index"].to_pylist() == list(range(len(data)))
    assert data.schema.field("action").type == pa.list_(pa.float32(), 7)


def test_statistics_of_meta(written, recorded):
    state = np.concatenate([e.state for e in recorded])
    scene = np.concatenate([e.images["scene"] for e in recorded]) / 255
    stats = json.loads((written["3.0 images"] / "meta/stats.json").read_text(encoding="utf-8"))
    for key, values, axes in (
        ("observation.state", state, 0),
        ("observation.images.scene", scene, (0, 1, 2)),
    ):
        found = {name: np.array(value) for name, value in stats[key].items()}
        assert found["mean"].shape == ((8,) if axes == 0 else (3, 1, 1))
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(found[name].ravel(), getattr(values, name)(axes), atol=1e-6)
        assert found["count"].tolist() == [sum(LENGTHS)]
        parts = np.split(values, np.cumsum(LENGTHS)[:-1])
        lower = [np.quantile(part, 0.1, axis=axes) for part in parts]
        np.testing.assert_allclose(found["q10"].ravel(), np.min(lower, 0), atol=1 / 255)
    lines = (
        (written["2.1 video"] / "meta/episodes_stats.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    line = json.loads(lines[3])
    assert line["episode_index"] == 3 and len(line["stats"]) == 9
    assert set(line["stats"]["action"]) == {"min", "max", "mean", "std", "count"}
    np.testing.assert_allclose(line["stats"]["action"]["std"], recorded[3].action.std(0), rtol=1e-5)
    assert line["stats"]["index"]["min"] == [26.0]
    image = np.full((1, 4, 4, 3), 51, np.uint8)
    image[..., 0, 1] = 255
    found = lerobot_stats.images(lerobot_stats.histogram(image), 1)
    assert found["max"].ravel().tolist() == [0.2, 1.0, 0.2]
    assert found["q90"].ravel().tolist() == [0.2, 1.0, 0.2]
    assert found["q50"].ravel().tolist() == [0.2, 0.2, 0.2]


# ---- writing -----------------------------------------------------------------------------------


def test_an_interrupted_writing_is_recognised(recorded, tmp_path):
    def breaks_off():
        yield from recorded[:2]
        raise KeyboardInterrupt

    for name in ("2.1 video", "3.0 video"):
        with pytest.raises(KeyboardInterrupt):
            write(breaks_off(), tmp_path / name, name)
        assert not (tmp_path / name).exists()
        with pytest.raises(ValueError, match="writing was interrupted"):
            episodes.read(configure(tmp_path / f"{name}.partial"))
        with pytest.raises(FileExistsError, match="partial exists; delete it"):
            write(recorded, tmp_path / name, name)


def test_what_cannot_be_written(recorded, written, tmp_path):
    first, change = recorded[0], lambda **parts: dataclasses.replace(recorded[1], **parts)
    drifting = change()
    object.__setattr__(drifting, "timestamps", np.arange(5) / 10)
    for found, reason in (
        ([], "no episode"),
        ([change(state=first.state[:0], action=first.action[:0])], "no step"),
        ([first, change(fps=10.0)], "10 frames per second, the first 20"),
        ([first, change(action=recorded[1].action[:, :6])], r"action of shape \[5, 6\]"),
        ([first, change(state=recorded[1].state[1:])], "state of shape"),
        ([drifting], "timestamps up to 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            lerobot_write.write(found, tmp_path / f"{reason[:4]}{len(found)}")
    for videos in (True, False):
        smaller = change(images={"scene": counted(5, 32, 96)})
        with pytest.raises(ValueError, match=r"\[32, 96, 3\] of camera 'scene', the first \[64"):
            lerobot_write.write(
                [first, smaller], tmp_path / f"{videos}", cameras=("scene",), videos=videos
            )
    with pytest.raises(ValueError, match=r"expected one of 2\.1, 3\.0"):
        lerobot_write.write(recorded, tmp_path / "set", "v2.1")
    with pytest.raises(FileExistsError):
        lerobot_write.write(recorded, written["2.1 video"])


@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_columns_alone(recorded, tmp_path, version):
    lerobot_write.write(
        iter(recorded),
        tmp_path / "set",
        version,
        names={"action": [f"joint {i}" for i in range(7)]},
    )
    found = episodes.load_episodes(configure(tmp_path / "set", **{"data.cameras": ()}))
    assert [e.length for e in found] == list(LENGTHS)
    info = json.loads((tmp_path / "set/meta/info.json").read_text(encoding="utf-8"))
    assert info["video_path"] is None and info["features"]["action"]["names"][6] == "joint 6"
    assert not list(tmp_path.rglob("*.mp4"))
