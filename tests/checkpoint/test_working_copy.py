"""Copies between a run's directory and a bucket: what counts, what is sent, what is dropped."""

import contextlib
import os

import pytest

from lightwam_jax import bucket as bucket_lib
from lightwam_jax.checkpoint import places, storage, working_copy
from tests import buckets

LARGE = bytes(storage.LARGE)
everything = lambda steps: steps
last_two = lambda steps: steps[-2:]


@pytest.fixture
def address(monkeypatch):
    return buckets.in_memory(monkeypatch)


@pytest.fixture
def copy(address, tmp_path):
    made = working_copy.WorkingCopy(address, tmp_path / "one", "train")
    yield made
    made.close()


@contextlib.contextmanager
def elsewhere(address, tmp_path):
    """The copy on another machine."""
    made = working_copy.WorkingCopy(address, tmp_path / "other", "train")
    with contextlib.closing(made):
        yield made


def save(copy, step, frozen=None):
    """What a checkpoint looks like to a copy; `frozen` is a file that it shares with others."""
    folder = copy.path / "checkpoints" / str(step)
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "a").write_bytes(b"%d" % step * 10)
    (folder / "params" / "empty").touch()
    if frozen:
        os.link(frozen, folder / "frozen")
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def test_a_committed_checkpoint_comes_back_as_it_was(copy, address, tmp_path):
    folder = save(copy, 3)
    copy.upload(3, everything)
    with elsewhere(address, tmp_path) as other:
        assert other.steps() == [3]
        assert contents(other.fetch(3)) == contents(folder)


def test_metrics_are_there_before_the_checkpoint_counts(copy, monkeypatch):
    save(copy, 3)
    (copy.path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    written, write = [], copy.bucket.write
    monkeypatch.setattr(
        copy.bucket, "write", lambda n, c: (written.append(set(copy.bucket.sizes())), write(n, c))
    )
    copy.upload(3, everything)
    (before,) = written
    assert before == {"checkpoints/3/params/a", "checkpoints/3/params/empty", "metrics.jsonl"}


def test_what_arrives_short_does_not_count(copy, monkeypatch):
    save(copy, 3)
    put = copy.bucket.put
    monkeypatch.setattr(copy.bucket, "put", lambda files: put(files) or _cut(copy.bucket))
    with pytest.raises(bucket_lib.BucketError, match=r"3/params/a has \d+ bytes after \d+ were"):
        copy.upload(3, everything)
    assert copy.steps() == []


def test_an_upload_that_was_killed_does_not_count_and_is_removed(copy, address, tmp_path):
    save(copy, 1)
    copy.upload(1, everything)
    copy.bucket.write("checkpoints/2/params/a", b"half of it")
    assert copy.steps() == [1]
    copy.remove_unfinished()
    assert {name.split("/")[1] for name in copy.bucket.sizes("checkpoints")} == {"1"}


def test_old_checkpoints_go_after_the_new_one_counts(copy, monkeypatch):
    for step in (1, 2):
        save(copy, step)
        copy.upload(step, last_two)
    save(copy, 3)
    with monkeypatch.context() as patch:
        patch.setattr(copy.bucket, "write", lambda name, content: 1 / 0)  # killed before it
        with pytest.raises(ZeroDivisionError):
            copy.upload(3, last_two)
    assert copy.steps() == [1, 2]
    copy.upload(3, last_two)
    assert copy.steps() == [2, 3]
    assert not copy.bucket.sizes("checkpoints/1")


def test_shared_files_are_sent_once(copy, address, tmp_path, monkeypatch):
    (shared := tmp_path / "shared").write_bytes(LARGE)
    sent, put = [], bucket_lib.Bucket.put
    monkeypatch.setattr(
        bucket_lib.Bucket, "put", lambda self, files: (sent.extend(files), put(self, files))
    )
    for step in (1, 2):
        save(copy, step, shared)
        copy.upload(step, lambda steps: steps[-1:])
    assert "checkpoints/1/frozen" in sent and "checkpoints/2/frozen" not in sent
    with elsewhere(address, tmp_path) as other:  # nor is what was fetched
        assert contents(other.fetch(2))["frozen"] == LARGE
        save(other, 3, other.path / "checkpoints" / "2" / "frozen")
        other.upload(3, everything)
        assert contents(other.fetch(3))["frozen"] == LARGE
    assert "checkpoints/3/frozen" not in sent and "checkpoints/3/params/a" in sent


def _altered(bucket):
    bucket.write("checkpoints/3/params/a", b"4" * 10)


def _cut(bucket):
    bucket.write("checkpoints/3/params/a", b"3")


def _lost(bucket):
    bucket.delete(["checkpoints/3/params/a"])


def _commit_altered(bucket):
    commit = bucket.read("checkpoints/3/committed.json")
    bucket.write("checkpoints/3/committed.json", commit.replace(b"10", b"11"))


def _commit_cut(bucket):
    bucket.write("checkpoints/3/committed.json", b'{"step": 3, "fi')


def _commit_lost(bucket):
    bucket.delete(["checkpoints/3/committed.json"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_altered, "params/a is not what was committed: its checksum differs"),
        (_cut, "params/a has 1 bytes; expected 10"),
        (_lost, "params/a is missing; expected 10"),
        (_commit_altered, "committed.json was altered"),
        (_commit_cut, "committed.json is not JSON"),
        (_commit_lost, "is not committed"),
    ],
)
def test_damage_in_the_bucket_is_named(copy, address, tmp_path, damage, words):
    save(copy, 3)
    copy.upload(3, everything)
    damage(copy.bucket)
    with (
        elsewhere(address, tmp_path) as other,
        pytest.raises(storage.DamagedCheckpointError, match=f"{address}/checkpoints/3.*{words}"),
    ):
        other.fetch(3)


def test_the_bucket_decides_against_what_is_here(copy):
    folder = save(copy, 3)
    copy.upload(3, everything)
    wanted = contents(folder)
    (folder / "params" / "a").write_bytes(b"4" * 10)
    (folder / "params" / "more").touch()
    assert contents(copy.fetch(3)) == wanted
    (copy.path / "metrics.jsonl").write_text("not pushed\n", encoding="utf-8")
    copy.pull()
    assert not (copy.path / "metrics.jsonl").exists() and folder.exists()


def test_what_is_here_is_not_read_again(copy, monkeypatch):
    save(copy, 3)
    copy.upload(3, everything)
    read = []
    monkeypatch.setattr(copy.bucket, "get", lambda files: read.extend(files))
    copy.fetch(3)
    assert not read


def test_a_damaged_checkpoint_is_marked_and_stays(copy):
    save(copy, 3)
    copy.upload(3, everything)
    copy.mark_damaged(3, "altered")
    copy.remove_unfinished()
    assert copy.steps() == []
    assert {"checkpoints/3/damaged.json", "checkpoints/3/params/a"} <= set(copy.bucket.sizes())
    copy.upload(3, everything)  # the run comes by again
    assert copy.steps() == [3] and "checkpoints/3/damaged.json" not in copy.bucket.sizes()


def test_only_what_changed_is_pushed(copy, address, tmp_path, monkeypatch):
    (copy.path / "report").mkdir()
    for name in ("config.json", "report/a.html", "metrics.jsonl", "b.partial", "frozen_params"):
        (copy.path / name).write_text(name, encoding="utf-8")
    copy.push()
    assert set(copy.bucket.sizes()) == {"config.json", "report/a.html", "metrics.jsonl"}
    with (copy.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\nmore")
    (copy.path / "report" / "a.html").unlink()
    sent, put = [], copy.bucket.put
    monkeypatch.setattr(copy.bucket, "put", lambda files: (sent.extend(files), put(files)))
    copy.push()
    assert sent == ["metrics.jsonl"]
    with elsewhere(address, tmp_path) as other:
        other.pull()
        assert contents(other.path) == {"config.json": b"config.json",
                                        "metrics.jsonl": b"metrics.jsonl\nmore"}  # fmt: skip


def test_reading_gives_one_checkpoint_and_pushes_results(copy, address, tmp_path):
    (copy.path / "config.json").write_text("{}", encoding="utf-8")
    for step in (1, 2):
        save(copy, step)
        copy.upload(step, everything)
    with places.reading(address, None, tmp_path / "reader") as here:
        assert [p.name for p in (here / "checkpoints").iterdir()] == ["2"]
        assert (here / "config.json").exists()
        (here / "report.html").write_text("first", encoding="utf-8")
    assert copy.bucket.read("report.html") == b"first"
    with pytest.raises(KeyboardInterrupt), places.reading(address, 1, tmp_path / "reader") as here:
        assert [p.name for p in (here / "checkpoints").iterdir()] == ["1"]
        (here / "report.html").write_text("second", encoding="utf-8")
        raise KeyboardInterrupt
    assert copy.bucket.read("report.html") == b"second"  # what was finished is kept
    absent = pytest.raises(
        FileNotFoundError, match=r"no checkpoint 3 in .*: \[1, 2\] are committed"
    )
    with absent, places.reading(address, 3, tmp_path / "reader"):
        pass


def test_two_runs_of_training_do_not_share_a_copy(copy, address, tmp_path):
    with pytest.raises(ValueError, match=f"another train.py on this machine continues {address}"):
        working_copy.WorkingCopy(address, tmp_path / "one", "train")
    for use in ("evaluate", "read"):
        working_copy.WorkingCopy(address, tmp_path / "one", use).close()
