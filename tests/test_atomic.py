"""Files are the old ones or the new ones, and have one writer at a time."""

import os

import pytest

from lightwam_jax import atomic


def test_a_json_file_that_cannot_be_written_stays_what_it_was(tmp_path):
    path = str(tmp_path / "plan.json")
    atomic.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"step": 2, "bad": object()})
    assert atomic.read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["plan.json"]


def test_text_replaces_the_old_one_or_leaves_it(tmp_path):
    for text in ("a long text\n", "short"):
        atomic.write_text(tmp_path / "notes.txt", text)
        assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == text
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(tmp_path / "notes.txt", "no text: \ud800")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "short"
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert atomic.read_json(tmp_path / "nothing.json") is None


def test_a_second_writer_is_noticed_and_the_first_one_finishes(tmp_path):
    path = tmp_path / "file"
    with atomic.writing(path) as partial:
        with (
            pytest.raises(atomic.InUse, match="the same command runs twice"),
            atomic.writing(path),
        ):
            pass
        with open(partial, "w", encoding="utf-8") as f:
            f.write("of the first")
    assert path.read_text(encoding="utf-8") == "of the first"


def test_what_a_kill_left_is_not_part_of_the_next_file(tmp_path):
    (tmp_path / "file.json.partial").write_text("[1, 2, 3, 4, 5, 6, 7", encoding="utf-8")
    atomic.write_json(tmp_path / "file.json", [8])
    assert atomic.read_json(tmp_path / "file.json") == [8]
