"""Where the rows and images of one LeRobot episode lie, by hand and without files."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from lightwam_jax.data.formats import lerobot, lerobot_checks, lerobot_listed, lerobot_rows


def episode(begin, fps, length=6):
    file = pathlib.Path("top.mp4")
    return lerobot.LeRobotEpisode(
        id="episode_000001",
        fps=fps,
        state=np.zeros((length, 2), np.float32),
        action=np.zeros((length, 3), np.float32),
        tasks=("reach", "reach", "lift", "lift", "reach", "lift"),
        images={
            "top": lerobot_listed.Video(file, begin),
            "side": lerobot_listed.Video(pathlib.Path("side.mp4"), 5.0),
            "single": lerobot.Images(file, "single", ("single",), 10, 16, file),
        },
        timestamps=np.arange(length) / fps,
        file="data.parquet",
    )


@pytest.mark.parametrize(
    "begin, fps, frame",
    [
        (0.0, 30, 0),
        (float(np.float32(0.7)), 30, 21),  # 0.69999999 s
        (float(np.float32(0.1)), 30, 3),  # 0.10000000149 s
        (4.1, 30, 123),  # 4.1 * 30 is 122.99999999999999
        (1.16, 25, 29),
        (8.2, 15, 123),
        (2 / 3, 15, 10),
    ],
)
def test_a_video_begins_at_the_nearest_frame(begin, fps, frame):
    one = episode(begin, fps)
    assert one.video("top") == (pathlib.Path("top.mp4"), frame)
    assert one.video("side") == (pathlib.Path("side.mp4"), 5 * fps)
    assert one.video("single") is None and one.video("behind") is None


def test_frames_are_asked_for_by_time_in_the_file(monkeypatch):
    asked = []
    monkeypatch.setattr(
        lerobot.video_lib, "frames", lambda *a, tolerance: asked.append((*a, tolerance))
    )
    monkeypatch.setattr(lerobot, "_images", lambda *arguments: asked.append(arguments))
    one = episode(0.7, 10.0)
    one = dataclasses.replace(one, timestamps=one.timestamps + 0.01 * (np.arange(6) == 3))
    one.frames("top", [3, 0, -1])
    ((file, times, numbers, tolerance),) = asked
    assert tolerance == 0.025  # a quarter of a frame
    assert file == pathlib.Path("top.mp4") and numbers.tolist() == [3, 0, 5]
    np.testing.assert_allclose(times, [0.7 + 0.31, 0.7, 0.7 + 0.5])
    dataclasses.replace(one, tolerance_s=1e-4).frames("top", [0])
    assert asked.pop()[3] == 1e-4
    one.frames("single", [2, 2])
    assert asked[1][0] is one.images["single"] and asked[1][1].tolist() == [2, 2]
    with pytest.raises(IndexError):
        one.frames("top", [6])
    with pytest.raises(KeyError, match="no camera 'behind'; it has side, single, top"):
        one.frames("behind", [0])


def test_every_step_has_its_own_instruction():
    one = episode(0.0, 10.0)
    said = [one.task_at(step) for step in range(one.length)]
    assert said == ["reach", "reach", "lift", "lift", "reach", "lift"]


def test_instructions_are_found_by_their_numbers():
    def tasks(*index):
        zeros = np.zeros((len(index), 1), np.float32)
        rows = lerobot_rows.Rows(zeros, zeros, zeros[:, 0], *3 * [np.array(index, int)])
        data = types.SimpleNamespace(
            info={"fps": 10},
            needed=(),
            cameras={},
            tasks={4: "reach", 7: "lift"},
            tolerance_s=0.0,
        )
        entry = lerobot_listed.Listed(1, len(index), pathlib.Path("data.parquet"), {}, {})
        one = lerobot._episode(data, entry, entry.data, 0, rows)
        return one.task, [one.task_at(step) for step in range(one.length)]

    assert tasks(4, 7, 4) == ("reach", ["reach", "lift", "reach"])
    assert tasks(7, 7) == ("lift", ["lift", "lift"])
    assert tasks() == ("", [])


@pytest.mark.parametrize(
    "index, runs",
    [
        ([], []),
        ([5], [(5, 0, 1)]),
        ([0, 0, 2, 1, 1, 1], [(0, 0, 2), (2, 2, 3), (1, 3, 6)]),
        ([3, 0, 3], [(3, 0, 1), (0, 1, 2), (3, 2, 3)]),
    ],
)
def test_rows_that_belong_together(index, runs):
    assert list(lerobot_rows.runs(np.array(index, np.int64))) == runs


@pytest.mark.parametrize(
    "seconds, missing", [(None, None), (0.6, None), (0.5601, None), (0.54, "0.060"), (9.0, None)]
)
def test_a_video_may_end_half_a_frame_early(tmp_path, seconds, missing):
    """Six rows at ten frames per second last 0.6 s."""
    (tmp_path / "top.mp4").touch()
    listed = lerobot_listed.Listed(
        1,
        6,
        tmp_path / "data.parquet",
        {"top": lerobot_listed.Video(tmp_path / "top.mp4", 0.0)},
        {} if seconds is None else {"top": seconds, "side": 0.1},
    )
    data = types.SimpleNamespace(info={"fps": 10})
    found = list(lerobot_checks.video_faults(data, listed, "top", 6))
    assert [fault.kind for fault in found] == (["wrong length"] if missing else [])
    if missing:
        assert f"{missing} s less than its 6 rows" in found[0].message
    (tmp_path / "top.mp4").unlink()
    assert next(iter(lerobot_checks.video_faults(data, listed, "top", 6))).kind == "missing video"


def listed(*numbers):
    return [lerobot_listed.Listed(n, 3, pathlib.Path(f"{n}.parquet"), {}, {}) for n in numbers]


def test_what_meta_does_not_list_is_found():
    data = types.SimpleNamespace(info={"total_episodes": 5}, root=pathlib.Path("root"), packed=True)
    broken = {pathlib.Path("0.parquet"): "broken", pathlib.Path("x.parquet"): "cut off"}
    spans = {9: [("nine.parquet", 0, 3)], 1: [("one.parquet", 0, 3)], 3: [("three.parquet", 4, 9)]}
    found = lerobot_checks.unlisted(data, listed(0, 1), broken, spans)
    assert [(p.kind, p.episode, p.file) for p in found] == [
        ("unlisted episode", "episode_000003", "three.parquet"),
        ("unlisted episode", "episode_000009", "nine.parquet"),
        ("unlisted episode", "episode_000002", "root/meta"),
        ("unlisted episode", "episode_000004", "root/meta"),
        ("unreadable data file", "x", "x.parquet"),
    ]
    data.info = {"total_episodes": 2}
    assert lerobot_checks.unlisted(data, listed(0, 1), {}, {}) == []
