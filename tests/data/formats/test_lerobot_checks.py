"""What LeRobot's meta/ says twice has to agree; times, and columns that are cut."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.doctor import examine
from lightwam_jax.data.formats import lerobot_write, video
from tests import synthetic
from tests.data.formats.test_lerobot_meta import (
    NAME,
    OTHERS,
    change_column,
    change_info,
    change_lines,
    configure,
    episode_table,
    made,
    packed,
    read,
    sets,
    single,
)

__all__ = ["packed", "sets", "single"]  # fixtures
EVERY = {NAME, *OTHERS}


def data_file(root, number):
    return root / f"data/chunk-000/episode_{number:06d}.parquet"


# ---- files, rows and lists ---------------------------------------------------------------------


def test_a_file_that_says_it_is_another_episode(single):
    """Two sessions in one folder: files renamed, columns not."""
    for number in (0, 1):
        shutil.copy(data_file(single, number), data_file(single, number + 2))
    sound, errors, _ = read(single)
    assert sound == {"episode_000000", "episode_000001"}
    for number, error in zip((0, 1), errors):
        assert (error.kind, error.episode) == ("wrong episode", f"episode_{number + 2:06d}")
        assert error.file == str(data_file(single, number + 2))
        assert f"episode_index {number}; expected {number + 2}" in error.message
    assert read(single, **{"data.exclude": tuple(e.episode for e in errors)})[1] == []


def test_a_file_that_nobody_lists(single):
    shutil.copy(data_file(single, 0), data_file(single, 7))
    sound, (error,), _ = read(single)
    assert sound == EVERY and (error.kind, error.episode) == ("unlisted episode", "episode_000007")
    assert read(single, **{"data.exclude": ("episode_000007",)})[1] == []


def test_a_file_with_rows_of_two_episodes(single):
    change_column(data_file(single, 2), "episode_index", lambda values: [2, 2, 2, 2, 5, 5])
    sound, (error, other), _ = read(single)
    assert sound == OTHERS and "episode_index 5; expected 2" in error.message
    assert (other.kind, other.episode) == ("unlisted episode", "episode_000005")


def test_rows_of_another_episode_in_a_shared_file(packed):
    (file,) = (packed / "data").rglob("*.parquet")
    change_column(file, "episode_index", lambda values: [9 if v == 2 else v for v in values])
    sound, errors, _ = read(packed)
    assert sound == OTHERS
    assert {(e.kind, e.episode) for e in errors} == {
        ("wrong episode", NAME),
        ("unlisted episode", "episode_000009"),
    }


@pytest.mark.parametrize("value", [None, float("nan"), 2.5, -3.0])
@pytest.mark.parametrize("key", ["episode_index", "frame_index", "task_index", "timestamp"])
def test_an_index_of_a_row_that_is_none(packed, key, value):
    """Only the episode of that row is broken."""
    (file,) = (packed / "data").rglob("*.parquet")
    row = 2 * 6 + 3
    change = lambda values: [value if i == row else float(v) for i, v in enumerate(values)]
    change_column(file, key, change, pa.float64())
    sound, errors, _ = read(packed)
    if key == "timestamp" and value in (2.5, -3.0):
        assert sound == EVERY  # a number: the doctor looks at the order of times
        return
    assert sound == OTHERS and {e.episode for e in errors} == {NAME}
    assert read(packed, **{"data.exclude": (NAME,)})[:2] == (OTHERS, [])


@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_instructions_of_rows_and_list_that_disagree(sets, tmp_path, version):
    root = shutil.copytree(sets / version, tmp_path / "set")
    for file in (root / "data").rglob("*.parquet"):
        change_column(file, "task_index", lambda values: [0] * len(values), pa.int64())
    sound, errors, warnings = read(root)
    assert sound == EVERY and not errors
    assert [(w.kind, w.episode) for w in warnings] == [
        ("tasks disagree", "episode_000001"),
        ("tasks disagree", "episode_000003"),
    ]
    assert all(task in warnings[0].message for task in synthetic.TASKS)
    assert {e.task for e in episodes.load_episodes(configure(root))} == {synthetic.TASKS[0]}


@pytest.mark.parametrize("said", [None, [], [3], float("nan"), {"task": 1}, "the rows' own"])
def test_a_list_without_instructions_is_no_contradiction(single, said):
    said = synthetic.TASKS[0] if isinstance(said, str) else said
    change_lines(single / "meta/episodes.jsonl", lambda lines: lines[2].update(tasks=said))
    assert read(single) == (EVERY, [], [])


@pytest.mark.parametrize("claims", ["v3.0", "v2.1"])
def test_a_version_that_the_files_do_not_have(sets, tmp_path, claims):
    root = shutil.copytree(sets / ("2.1" if claims == "v3.0" else "3.0"), tmp_path / "other")
    change_info(root, lambda info: info.update(codebase_version=claims))
    has = "v2.1" if claims == "v3.0" else "v3.0"
    with pytest.raises(ValueError, match=rf"codebase_version is '{claims}', but the files lie as "):
        read(root)
    with pytest.raises(ValueError, match=rf"lie as in {has}: there is meta/episodes"):
        read(root)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda i: i.update(total_frames=25), "total_frames is 25, meta/ lists 24"),
        (lambda i: i.update(total_tasks=1), "total_tasks is 1, meta/ lists 2"),
        (lambda i: i.update(total_episodes=3), "total_episodes is 3, meta/ lists 4"),
        (lambda i: i["features"]["action"].update(shape=[6]), "action has 6 numbers by its shape"),
        (lambda i: i["features"]["action"].update(names=["x", "y"]), "action has 2 names"),
        (
            lambda i: i["features"]["observation.state"].update(names={"motors": ["a"] * 9}),
            "observation.state has 9 names and shape",
        ),
    ],
)
@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_what_info_json_says_of_the_rest(sets, tmp_path, version, change, says):
    root = shutil.copytree(sets / version, tmp_path / "set")
    change_info(root, change)
    sound, errors, (warning, *more) = read(root)
    assert sound == EVERY and not errors and says in " ".join(w.message for w in (warning, *more))
    assert "info.json" in warning.message


@pytest.mark.parametrize("names", [["actions"], None, [], {"motors": list("abcdefg")}], ids=repr)
def test_names_that_are_no_contradiction(single, names):
    change_info(single, lambda info: info["features"]["action"].update(names=names))
    assert read(single) == (EVERY, [], [])


def test_a_count_of_episodes_beyond_belief(single):
    change_info(single, lambda info: info.update(total_episodes=10**12))
    sound, errors, _ = read(single)
    assert sound == EVERY and not errors


@pytest.mark.parametrize("kept", [(), ("timestamp",), ("episode_index", "task_index")])
@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_index_columns_need_no_feature(sets, tmp_path, version, kept):
    root = shutil.copytree(sets / version, tmp_path / "set")
    index = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    drop = lambda info: [info["features"].pop(key) for key in index if key not in kept]
    change_info(root, drop)
    assert read(root) == (EVERY, [], [])


def test_an_index_column_that_the_rows_lack(single):
    table = pq.read_table(data_file(single, 2))
    pq.write_table(table.drop_columns(["task_index"]), data_file(single, 2))
    sound, (error,), _ = read(single)
    assert sound == OTHERS and "has no column task_index; it has" in error.message


# ---- columns -----------------------------------------------------------------------------------


def test_dimensions_of_a_column(tmp_path):
    """The last numbers of a state are a sensor that is not mounted."""
    found = made(2, widths=(10, 9))
    for episode in found:
        episode.state[:, 8:] = np.nan
    lerobot_write.write(found, tmp_path / "set", "3.0", ("scene", "wrist"))
    cut = {"data.fields.state": ("observation.state[:, :8]",)}
    cut["data.fields.action"] = ("action[:, :4]", "action[:, 5]", "action[:, -2:]")
    back, problems = episodes.read(configure(tmp_path / "set", **cut))
    assert not problems
    for one, episode in zip(back, found):
        np.testing.assert_array_equal(one.state, episode.state[:, :8])
        np.testing.assert_array_equal(one.action, episode.action[:, [0, 1, 2, 3, 5, 7, 8]])


@pytest.mark.parametrize(
    "key, says",
    [
        ("action[1:]", "cannot be cut, its dimensions can: 'action"),
        ("action[:-1, :7]", "cannot be cut"),
        ("action[", "expected PATH"),
        ("actions[:, :7]", "no feature 'actions' of numbers"),
    ],
)
def test_keys_that_cut_nothing(single, key, says):
    with pytest.raises(ValueError, match=says):
        read(single, **{"data.fields.action": (key,)})


@pytest.mark.parametrize("kind", [pa.string(), pa.null(), pa.timestamp("ms"), pa.binary()], ids=str)
def test_a_column_of_another_type(single, kind):
    change_column(data_file(single, 2), "action", lambda values: [None] * len(values), kind)
    sound, (error,), _ = read(single)
    assert sound == OTHERS and error.kind == "unreadable data file"
    assert f"column action is {kind}; expected numbers" in error.message


# ---- times -------------------------------------------------------------------------------------


def shift(root, change):
    for file in (root / "data").rglob("*.parquet"):
        change_column(file, "timestamp", lambda t: list(change(np.array(t))), pa.float64())


def seen(episode, camera="scene"):
    """The (episode, frame) that each picture carries."""
    images = episode.frames(camera, np.arange(episode.length)).astype(int)
    bars = (images[:, 1, :, 0] > 160).sum(1), (images[:, 12, :, 0] > 160).sum(1)
    return [((a - 2) // 2, (b - 2) // 2) for a, b in zip(*bars)]


@pytest.mark.parametrize("drift", [0.0003, 0.001, 0.004])
def test_a_video_that_begins_a_fraction_of_a_frame_late(packed, drift):
    """As where durations were added up in a long file."""
    for camera in ("scene", "wrist"):
        for end in ("from", "to"):
            name = f"videos/observation.images.{camera}/{end}_timestamp"
            late = lambda values: [v + drift * i for i, v in enumerate(values)]
            change_column(episode_table(packed), name, late)
    found = episodes.load_episodes(configure(packed))
    assert [seen(e) for e in found] == [[(i, k) for k in range(6)] for i in range(4)]
    assert not examine.examine(configure(packed)).errors
    strict = episodes.load_episodes(configure(packed, **{"data.tolerance_s": 1e-4}))
    with pytest.raises(episodes.FrameError, match=r"config\.data\.tolerance_s allows 0\.0001"):
        strict[3].frames("scene", [0])


def test_the_clock_of_a_robot(single):
    noise = np.random.default_rng(0)
    shift(single, lambda t: t + noise.uniform(-0.02, 0.02, len(t)))
    found = episodes.load_episodes(configure(single))
    assert [seen(e) for e in found] == [[(i, k) for k in range(6)] for i in range(4)]


@pytest.mark.parametrize("offset, frames", [(0.1, "+1"), (-0.1, "-1"), (1.7e9, "+1.7e+10")])
def test_times_that_begin_elsewhere(single, offset, frames):
    """By the nearest frame, every image would be of another step."""
    shift(single, lambda t: t + offset)
    sound, errors, _ = read(single)
    assert not sound and [(e.kind, e.frame) for e in errors] == [("timestamp offset", 0)] * 4
    assert f"every image would be {frames} frames off" in errors[0].message
    report = examine.examine(configure(single))
    assert [p.kind for p in report.errors] == ["timestamp offset"] * 4, "one line per episode"


def test_rows_cut_off_in_front_keep_their_times(single):
    """Row 0 is frame 2, and says so: its image is that of 0.2 s."""
    file = data_file(single, 2)
    pq.write_table(pq.read_table(file).slice(2), file)
    change_lines(single / "meta/episodes.jsonl", lambda lines: lines[2].update(length=4))
    assert seen(episodes.load_episodes(configure(single))[2]) == [(2, k) for k in range(2, 6)]


def test_a_tolerance_is_a_number_of_seconds():
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"config\.data\.tolerance_s"):
            configure("", **{"data.tolerance_s": value})


def test_no_frame_within_half_of_one(tmp_path):
    video.write(tmp_path / "a.mp4", made(1)[0].images["scene"], 10)
    for time, says in (
        (0.549, r"0\.0490 s away; config\.data\.tolerance_s"),
        (0.9, "frames are m"),
    ):
        with pytest.raises(episodes.FrameError, match=says):
            video.frames(tmp_path / "a.mp4", [time], tolerance=0.025)
    assert json.dumps(video.frames(tmp_path / "a.mp4", [0.52], tolerance=0.025).shape) == (
        "[1, 16, 16, 3]"
    )
