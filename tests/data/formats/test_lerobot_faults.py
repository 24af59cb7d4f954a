"""Broken LeRobot datasets: every fault is named, and the other episodes are read."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.formats import video
from tests.data.formats.test_lerobot_write import LENGTHS, configure, record, write
from tests.data.formats.test_video import counted


@pytest.fixture(scope="module")
def recorded():
    return record()


@pytest.fixture(scope="module")
def written(recorded, tmp_path_factory):
    root = tmp_path_factory.mktemp("lerobot")
    for name in ("2.1 video", "3.0 video"):
        write(recorded, root / name, name)
    return root


@pytest.fixture
def single(written, tmp_path):
    """A copy of a sound set of v2.1, to break."""
    return shutil.copytree(written / "2.1 video", tmp_path / "set")


@pytest.fixture
def packed(written, tmp_path):
    """A copy of a sound set of v3.0, to break."""
    return shutil.copytree(written / "3.0 video", tmp_path / "set")


def fault(path, **overrides):
    """Returns ({id of a sound episode}, {(kind, id): problem})."""
    found, problems = episodes.read(configure(path, **overrides))
    return {e.id for e in found}, {(p.kind, p.episode): p for p in problems}


def ids(*numbers):
    return {f"episode_{i:06d}" for i in numbers}


def rewrite(file, change):
    """Rewrites a parquet file: `change` gets and returns its rows."""
    table = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), file)


def test_faults_of_single_files(single):
    data, videos = single / "data/chunk-000", single / "videos/chunk-000/observation.images.wrist"
    (data / "episode_000000.parquet").unlink()
    (data / "episode_000001.parquet").write_bytes(
        (data / "episode_000001.parquet").read_bytes()[:2000]
    )
    (videos / "episode_000002.mp4").unlink()
    rewrite(data / "episode_000003.parquet", lambda rows: rows[:-2])
    rewrite(data / "episode_000004.parquet", lambda rows: [r | {"task_index": 9} for r in rows])
    rewrite(data / "episode_000005.parquet", lambda rows: rows[::-1])
    sound, problems = fault(single)
    assert sound == set() and set(problems) == {
        (kind, f"episode_{i:06d}")
        for i, kind in enumerate(
            (
                "missing data file",
                "unreadable data file",
                "missing video",
                "wrong length",
                "unknown task",
                "rows out of order",
            )
        )
    }
    for (_, name), problem in problems.items():
        assert name in problem.file and problem.severity == "error"
    assert "31 rows, meta/ says 33" in problems["wrong length", "episode_000003"].message

    # Excluded, they are not even opened: nothing is left to say about them.
    sound, problems = fault(single, **{"data.exclude": tuple(ids(0, 1, 3, 4, 5))})
    assert sound == set() and set(problems) == {("missing video", "episode_000002")}
    sound, problems = fault(
        single, **{"data.exclude": tuple(ids(0, 1, 3, 4, 5)), "data.cameras": ("scene",)}
    )
    assert sound == ids(2) and not problems  # nobody asks for that camera
    with pytest.raises(ValueError, match="has no such episode"):
        fault(single, **{"data.exclude": ("episode_000099",)})


def test_episodes_that_meta_forgets(single):
    file = single / "meta/episodes.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    (single / "data/chunk-000/episode_000005.parquet").unlink()
    file.write_text("".join(lines[:3] + lines[4:5]), encoding="utf-8")
    sound, problems = fault(single)
    assert sound == ids(0, 1, 2, 4)
    assert set(problems) == {("unlisted episode", name) for name in ids(3, 5)}
    assert fault(single, **{"data.exclude": tuple(ids(3, 5))}) == (ids(0, 1, 2, 4), {})


def test_an_episode_without_rows(single):
    rewrite(single / "data/chunk-000/episode_000002.parquet", lambda rows: [])
    sound, problems = fault(single)
    assert sound == ids(*range(6)) and set(problems) == {("empty episode", "episode_000002")}


def test_a_truncated_video_names_its_frame(single):
    file = single / "videos/chunk-000/observation.images.scene/episode_000003.mp4"
    file.write_bytes(file.read_bytes()[:-900])
    episode = episodes.load_episodes(configure(single))[3]
    with pytest.raises(episodes.FrameError, match=r"cannot be opened|no video stream") as error:
        episode.frames("scene", [0])
    assert error.value.file == str(file)
    video.write(file, counted(20), 20)  # of 33
    with pytest.raises(episodes.FrameError, match=r"no frame at 1\.0000 s") as error:
        episode.frames("scene", np.arange(10, 33))
    assert error.value.frame == 20


def test_faults_of_packed_files(packed):
    meta = packed / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(meta).to_pylist()
    key = "videos/observation.images.wrist"
    where = {i: row[f"{key}/file_index"] for i, row in enumerate(table)}
    (packed / f"videos/observation.images.wrist/chunk-000/file-{where[5]:03d}.mp4").unlink()
    inside = {i for i in where if where[i] == where[5]}
    sound, problems = fault(packed)
    assert set(problems) == {("missing video", name) for name in ids(*inside)}
    assert sound == ids(*set(range(6)) - inside)

    sound, problems = fault(packed, **{"data.cameras": ("scene",)})
    assert sound == ids(*range(6)) and not problems
    rewrite(
        meta,
        lambda rows: [
            row | {f"{key}/to_timestamp": row[f"{key}/from_timestamp"] + 0.5} for row in rows
        ],
    )
    _, problems = fault(packed, **{"data.exclude": tuple(ids(*inside))})
    late = {i for i in range(6) if LENGTHS[i] > 10} - inside  # the others last half a second
    assert late and {name for kind, name in problems} == ids(*late)
    assert {kind for kind, _ in problems} == {"wrong length"}

    last = {row["data/file_index"] for row in table}
    file = packed / f"data/chunk-000/file-{max(last):03d}.parquet"
    file.write_bytes(b"PAR1 and nothing")
    inside = {i for i, row in enumerate(table) if row["data/file_index"] == max(last)}
    assert inside != set(range(6))
    sound, problems = fault(packed, **{"data.cameras": ()})
    assert sound == ids(*set(range(6)) - inside)
    assert set(problems) == {("unreadable data file", name) for name in ids(*inside)}
    assert fault(packed, **{"data.cameras": (), "data.exclude": tuple(ids(*inside))}) == (sound, {})
    file.unlink()
    _, problems = fault(packed, **{"data.cameras": ()})
    assert set(problems) == {("missing data file", name) for name in ids(*inside)}


def test_wrong_file_numbers_of_lerobots_first_converter(packed, recorded):
    """It gave the first episode of each file the number of the file before."""
    meta = packed / "meta/episodes/chunk-000/file-000.parquet"
    before = [row["data/file_index"] for row in pq.read_table(meta).to_pylist()]
    wrong = [before[max(0, i - 1)] for i in range(6)]
    assert wrong != before
    rewrite(meta, lambda rows: [r | {"data/file_index": n} for r, n in zip(rows, wrong)])
    for back, episode in zip(episodes.load_episodes(configure(packed)), recorded):
        np.testing.assert_array_equal(back.action, episode.action)


def test_rows_in_two_places(packed):
    rewrite(packed / "data/chunk-000/file-000.parquet", lambda rows: [*rows[1:], rows[0]])
    sound, problems = fault(packed)
    assert sound == ids(*range(1, 6)) and set(problems) == {("scattered rows", "episode_000000")}


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (
            {"data.fields.state": ("state",)},
            r"no feature 'state'.*has observation.state \(float32 \[8",
        ),
        (
            {"data.fields.action": ("observation.images.scene",)},
            "'observation.images.scene' of num",
        ),
        ({"data.cameras": ("top",)}, "'observation.images.top'.*observation.images.wrist"),
        ({"data.fields.image": "{camera}"}, "no feature 'scene'"),
        ({"data.fields.image": "observation.images.scene"}, "one feature for all"),
        ({"data.fields.fps": 10.0}, "fps=10, but .* says 20"),
        ({"data.fields.task": "language"}, "do nothing"),
    ],
)
def test_a_config_that_fits_no_episode(packed, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        episodes.read(configure(packed, **overrides))
    with pytest.raises(KeyError, match="has scene, wrist"):
        episodes.load_episodes(configure(packed, **{"data.fields.fps": 20.0}))[0].frames("top", [0])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"codebase_version": "v1.6"}, "'v1.6'; readable are v2.0, v2.1, v3.0"),
        ({"codebase_version": None}, "readable are"),
        ({"fps": None, "delete": "fps"}, "lacks fps"),
        ({"depth": True}, "no feature 'observation.images.wrist' of colour images"),
    ],
)
def test_sets_that_are_not_readable(single, change, reason):
    file = single / "meta/info.json"
    info = json.loads(file.read_text(encoding="utf-8")) | change
    info.pop(change.get("delete"), None)
    info["features"]["observation.images.wrist"]["info"]["video.is_depth_map"] = "depth" in change
    file.write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        episodes.read(configure(single))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("info.json", None, "no meta/info.json"),
        ("info.json", "{", "is not JSON"),
        ("tasks.jsonl", None, "does not exist"),
        ("episodes.jsonl", "{}", "line 1 lacks episode_index"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 3}\n{"epi', "line 2 is not JSON"),
    ],
)
def test_broken_metadata(single, name, content, reason):
    (single / "meta" / name).unlink()
    if content is not None:
        (single / "meta" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        episodes.load_episodes(configure(single))


def test_broken_packed_metadata(packed):
    tasks = packed / "meta/tasks.parquet"
    content = tasks.read_bytes()
    tasks.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"tasks.parquet cannot be read"):
        episodes.read(configure(packed))
    tasks.write_bytes(content)
    meta = packed / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(meta)
    pq.write_table(table.drop_columns(["videos/observation.images.wrist/file_index"]), meta)
    with pytest.raises(ValueError, match=r"lacks videos/observation.images.wrist/file_index"):
        episodes.read(configure(packed))
    meta.unlink()
    with pytest.raises(ValueError, match="no parquet file"):
        episodes.read(configure(packed))
