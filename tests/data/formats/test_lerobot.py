"""LeRobot datasets written by hand as the format says."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightwam_jax.data import episodes
from tests.data.formats.test_lerobot_write import configure
from tests.data.formats.test_video import counted


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def packed(root, table):
    """Writes both episodes into one file of v3.0; returns the pattern of its path."""
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(table, root / "data/chunk-000/file-000.parquet", row_group_size=2)
    tasks = pa.table({"task_index": [7, 4], "__index_level_0__": ["lift", "reach"]})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    place = {"data/chunk_index": [0, 0], "data/file_index": [0, 0]}
    listed = {"episode_index": [0, 1], "length": [3, 2], **place}
    listed["stats/action/mean"] = [[0.0], [0.0]]
    pq.write_table(pa.table(listed), root / "meta/episodes/chunk-000/file-000.parquet")
    return "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


def single(root, table):
    """Writes a file per episode of v2.1; returns the pattern of their paths."""
    for i, (first, n) in enumerate(((0, 3), (3, 2))):
        (root / f"data/chunk-00{i}").mkdir(parents=True)
        pq.write_table(table.slice(first, n), root / f"data/chunk-00{i}/episode_00000{i}.parquet")
    (root / "meta/tasks.jsonl").write_text(
        '{"task_index": 4, "task": "reach"}\n{"task_index": 7, "task": "lift"}\n', encoding="utf-8"
    )
    (root / "meta/episodes.jsonl").write_text(
        '{"episode_index": 1, "length": 2}\n\n{"episode_index": 0, "length": 3}\n', encoding="utf-8"
    )
    return "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"


def by_hand(root, version, **changes):
    """Two episodes of 3 and 2 steps with lists of any length, doubles, and paths of images."""
    index = [0, 0, 0, 1, 1]
    cells = [{"bytes": png(image), "path": None} for image in counted(5, 8, 64)]
    cells[1] = {"bytes": None, "path": "images/1.png"}
    columns = {
        "joints": pa.array([[i, i + 0.5] for i in range(5)], pa.list_(pa.float64())),
        "gripper": pa.array([0, 1, 0, 1, 0], pa.int64()),
        "action": pa.array([[float(i)] * 3 for i in range(5)], pa.large_list(pa.float32())),
        "timestamp": pa.array([0, 0.1, 0.2, 0, 0.1], pa.float32()),
        "frame_index": [0, 1, 2, 0, 1],
        "episode_index": index,
        "index": list(range(5)),
        "task_index": [4, 4, 7, 4, 4],
        "top": pa.array(cells),
    } | changes
    (root / "meta").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "images/1.png").write_bytes(png(counted(5, 8, 64)[1]))
    numeric = {key: 1 for key in columns if key != "top"} | {"joints": 2, "action": 3}
    info = {
        "codebase_version": version,
        "fps": 10,
        "chunks_size": 1,
        "total_episodes": 2,
        "features": {"top": {"dtype": "image", "shape": [3, 8, 64], "names": None}}
        | {key: {"dtype": "float32", "shape": [n], "names": None} for key, n in numeric.items()},
    }
    files = packed if version == "v3.0" else single
    info["data_path"] = files(root, pa.table(columns))
    (root / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    return configure(
        root,
        **{
            "data.fields.state": ("joints", "gripper"),
            "data.fields.image": "{camera}",
            "data.cameras": ("top",),
            "model.proprio_dim": 3,
            "model.action_dim": 3,
        },
    )


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_what_others_write(tmp_path, version):
    first, second = episodes.load_episodes(by_hand(tmp_path / "set", version))
    assert first.state.tolist() == [[0, 0.5, 0], [1, 1.5, 1], [2, 2.5, 0]]
    assert second.action.tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [first.task_at(i) for i in range(3)] == ["reach", "reach", "lift"]
    assert second.task == "reach" and second.timestamps == pytest.approx([0, 0.1])
    np.testing.assert_array_equal(first.frames("top", [0, 1, 2]), counted(3, 8, 64))
    np.testing.assert_array_equal(second.frames("top", [1, 0]), counted(5, 8, 64)[[4, 3]])


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"joints": pa.array([[0.0, 1], [0.0], [0, 1], [0, 1], [0, 1]])},
            "rows of 1 and of 2 numbers",
        ),
        ({"joints": pa.array([[0.0, 1], None, [0, 1], [0, 1], [0, 1]])}, "1 empty rows"),
        ({"gripper": pa.array([1, 2, None, 1, 2])}, "1 empty cells"),
        ({"gripper": pa.array(["a", "b", "c", "d", "e"])}, "unreadable data file"),
    ],
)
def test_columns_that_are_no_numbers(tmp_path, changes, reason):
    found, problems = episodes.read(by_hand(tmp_path / "set", "v2.1", **changes))
    assert "episode_000000" not in [e.id for e in found]
    assert problems[0].kind == "unreadable data file" and reason in problems[0].line()


@pytest.mark.parametrize(
    "cell, reason",
    [
        ({"bytes": None, "path": None}, "empty"),
        ({"bytes": None, "path": "no.png"}, "No such file"),
        ({"bytes": png(counted(1, 8, 64)[0])[:90], "path": None}, "do not decode"),
        ({"bytes": png(np.zeros((8, 64), np.uint16)), "path": None}, "mode I;16"),
        ({"bytes": png(counted(1, 8, 32)[0]), "path": None}, r"\[8, 32, 3\] here"),
    ],
)
def test_images_that_cannot_be_decoded(tmp_path, cell, reason):
    good = {"bytes": png(counted(1, 8, 64)[0]), "path": None}
    config = by_hand(tmp_path / "set", "v3.0", top=pa.array([good, good, cell, good, good]))
    episode = episodes.load_episodes(config)[0]
    assert episode.frames("top", [0, 1]).shape == (2, 8, 64, 3)
    with pytest.raises(episodes.FrameError, match=reason) as error:
        episode.frames("top", [1, 2])
    assert error.value.frame == 2 and error.value.file.endswith("file-000.parquet")
