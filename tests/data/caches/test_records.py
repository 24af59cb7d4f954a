"""Records of several files: in order, by threads, in a copy, each for the same small price."""

import concurrent.futures
import pickle

import pytest
from array_record.python import array_record_module

from lightwam_jax.data.caches import records

COUNTS = (3, 1, 4)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    place, paths, number = tmp_path_factory.mktemp("records"), [], 0
    for file, count in enumerate(COUNTS):
        paths.append(place / f"{file}.array_record")
        writer = array_record_module.ArrayRecordWriter(str(paths[-1]), "group_size:1")
        for _ in range(count):
            writer.write(b"record %d" % number)
            number += 1
        writer.close()
    return records.Records(paths, COUNTS)


def test_rows_go_through_the_files_in_order(opened):
    assert len(opened) == 8
    assert [opened[row] for row in range(8)] == [b"record %d" % row for row in range(8)]
    names = [opened.file(row).rpartition("/")[2][0] for row in range(8)]
    assert names == ["0", "0", "0", "1", "2", "2", "2", "2"]
    for row in (-1, 8):
        with pytest.raises(IndexError, match=f"record {row} of 8"):
            opened[row]


def test_a_copy_opens_the_files_itself_and_threads_share_one(opened):
    copy = pickle.loads(pickle.dumps(opened))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [row for row in range(8)] * 20
        assert list(pool.map(copy.__getitem__, rows)) == [b"record %d" % row for row in rows]


def test_a_file_that_is_missing_or_another_says_so(opened, tmp_path):
    with pytest.raises(RuntimeError, match=r"gone\.array_record holds 0 records, expected 1"):
        records.Records([tmp_path / "gone.array_record"], [1])[0]
    with pytest.raises(RuntimeError, match=r"2\.array_record holds 4 records, expected 5"):
        records.Records([opened.file(7)], [5])[0]


def test_no_reader_is_asked_for_a_list(opened, monkeypatch):
    """A list of one index costs time in proportion to the records of the file."""
    asked = []

    class Reader:
        def __init__(self, *args, **kwargs):
            pass

        def num_records(self):
            return 4

        def read(self, *args):
            asked.append(args)
            return [b""]

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
    copy = pickle.loads(pickle.dumps(opened))
    assert copy[6] == b"" and asked == [(2, 3)]
