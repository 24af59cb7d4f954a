"""Addresses, and objects under one, in a file system of fsspec that is in memory."""

import importlib.util

import pytest

from lightwam_jax import bucket, command_line, config_read
from tests import buckets


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hdfs://cluster/run", r"hdfs:// is not supported; expected a directory, gs://BUCKET/"),
        ("http://host/run", r"http:// is not supported"),
        ("GS://bucket/run", r"GS:// is not supported"),
        ("s3://bucket", r"expected s3://BUCKET/PATH"),
        ("gs://bucket//run", r"expected gs://BUCKET/PATH"),
        ("gs://bucket/a/../b", r"expected gs://BUCKET/PATH"),
    ],
)
def test_addresses_that_nothing_here_can_use(address, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=f"--workdir={address}: .*{words}|{words}"):
        bucket.check(address)
    with pytest.raises(config_read.ConfigError, match=words):
        command_line.check_directory(address, "--workdir", bucket=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs: pip install -r requirements-b"):
        bucket.check("gs://bucket/run")
    with pytest.raises(ValueError, match="the package s3fs"):
        bucket.check("s3://bucket/run")


@pytest.fixture
def place(monkeypatch):
    return bucket.Bucket(buckets.in_memory(monkeypatch))


def test_objects_come_back_and_only_those_of_the_address(place, tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").touch()
    place.put({"x/a": tmp_path / "a", "x/b [1]*": tmp_path / "b"})
    place.write("y", b"1")
    bucket.Bucket(place.address + "2").write("other", b"1")
    assert place.sizes() == {"x/a": 5, "x/b [1]*": 0, "y": 1}
    assert place.sizes("x") == {"x/a": 5, "x/b [1]*": 0} and place.sizes("z") == {}
    place.get({"x/a": tmp_path / "new" / "a"})
    assert (tmp_path / "new" / "a").read_bytes() == b"12345"
    place.copy("x/a", "z")
    place.delete(["x/a", "x/b [1]*", "never there"])
    assert place.sizes() == {"y": 1, "z": 5} and place.read("z") == b"12345"
    assert place.read("x/a") is None


def test_what_fails_is_one_kind_of_error_with_the_address(place, tmp_path):
    for fails in (lambda: place.get({"no": tmp_path / "no"}), lambda: place.copy("no", "there"),
                  lambda: place.put({"x": tmp_path / "no"})):  # fmt: skip
        with pytest.raises(bucket.BucketError, match=rf"{place.address}: \w+ (no|x) failed"):
            fails()


def test_no_name_leaves_a_directory(place):
    place._fs.store[f"{place._root}/a/../../evil"] = place._fs.open(f"{place._root}/y", "wb")
    with pytest.raises(bucket.BucketError, match="unsafe name"):
        place.sizes()
