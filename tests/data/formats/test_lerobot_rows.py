"""Rows of LeRobot files: counted through row groups, and in order."""

import io
import types

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from lightwam_jax.data.formats import (
    hdf5,
    lerobot,
    lerobot_checks,
    lerobot_listed,
    lerobot_meta,
    lerobot_rows,
)


def png(level):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_of_an_episode_that_begins_within_a_row_group(tmp_path):
    file = tmp_path / "file-000.parquet"
    table = pa.table({"top": [png(level) for level in range(10)]})
    pq.write_table(table, file, row_group_size=3)
    place = lerobot.Images(file, "top", ("top",), 4, 8, tmp_path)  # groups begin at rows 0, 3, 6, 9
    seen = lerobot._images(place, np.array([0, 3, 1]))
    assert seen[:, 0, 0, 0].tolist() == [4, 7, 5]


def test_a_single_row_out_of_order_is_a_fault(tmp_path):
    file = tmp_path / "file-000.parquet"
    data = types.SimpleNamespace(tasks={0: "go"}, needed=())
    entry = lerobot_listed.Listed(0, 4, file, {}, {})

    def faults(*frames):
        rows = lerobot_rows.Rows(
            np.zeros((4, 2), np.float32),
            np.zeros((4, 2), np.float32),
            np.arange(4) / 10,
            np.array(frames),
            np.zeros(4, int),
            np.zeros(4, int),
        )
        return [fault.kind for fault in lerobot_checks.faults(data, entry, file, rows)]

    assert faults(0, 1, 2, 3) == []
    assert faults(0, 1, 3, 2) == ["rows out of order"]
    assert faults(0, 1, 2, 4) == ["rows out of order"]


def test_groups_of_an_hdf5_file_are_counted_naturally(tmp_path):
    with hdf5.h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("demo_10", "demo_2", "demo_1", "other"):
            file.create_group(f"data/{name}")
        names = hdf5._matching(file, "data/demo_*")
    assert names == ["data/demo_1", "data/demo_2", "data/demo_10"]


def test_a_video_lasts_from_its_own_beginning_in_a_shared_file(tmp_path):
    key = "observation.images.top"
    place = {"chunk_index": 0, "file_index": 0}
    rows = [
        {
            "episode_index": number,
            "length": 10,
            **{f"data/{name}": value for name, value in place.items()},
            **{f"videos/{key}/{name}": value for name, value in place.items()},
            f"videos/{key}/from_timestamp": begin,
            f"videos/{key}/to_timestamp": end,
        }
        for number, (begin, end) in enumerate(((0.0, 2.0), (2.0, 3.5)))
    ]
    (tmp_path / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    )
    info = {
        "codebase_version": "v3.0",
        "features": {key: {"dtype": "video"}},
        "video_path": "{video_key}/{chunk_index}/{file_index}.mp4",
        "data_path": "{chunk_index}/{file_index}.parquet",
    }
    data = lerobot_meta.LeRobotInfo(tmp_path, info, (), (), {"top": key}, (key,), {})
    listed, _ = lerobot_listed.listed(data)
    assert [entry.seconds[key] for entry in listed] == [2.0, 1.5]
    file = tmp_path / key / "0/0.mp4"
    assert [entry.videos[key] for entry in listed] == [(file, 0.0), (file, 2.0)]
