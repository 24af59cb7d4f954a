"""One case for each defect that malformed inputs brought to light; see test_malformed.py."""

import json
import math
import shutil

import pytest

from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax.checkpoint import storage
from lightwam_jax.data.caches import latents as latent_cache
from tests import interrupted, malformed
from tests.test_malformed import _outcome, valid

__all__ = ["valid"]  # a fixture


def _refused(read, place, *words):
    with pytest.raises((ValueError, OSError)) as caught:
        read(place)
    for word in words:
        assert word in str(caught.value)


def _rewritten(path, change):
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("latents/cache.json", lambda t: t.pop("shards"), "cache.json lacks shards"),
        ("latents/cache.json", lambda t: t["records"].update(val=3), "its shards hold 16"),
        ("latents/cache.json", lambda t: t["shards"][0].pop("file"), "shards[0] lacks file"),
        ("latents/features.json", lambda t: t.pop("featuresDict"), "features.json"),
        ("latents/dataset_info.json", lambda t: t["splits"][0].pop("numBytes"), "another size"),
        ("assets/codec/codec.json", lambda t: t.update(kind=[]), "kind is []; expected str"),
        ("assets/text/index.json", lambda t: t["prompts"].pop(), "lengths for"),
        ("assets/text/index.json", lambda t: t.update(lengths="x"), "expected a list of int"),
        (
            "assets/dataset_stats.json",
            lambda t: t["action"]["default"]["global_min"].__setitem__(2, 1e30),
            "global_min is above global_max in dimensions [2]",
        ),
        (
            "assets/dataset_stats.json",
            lambda t: t["state"]["default"].update(global_std=[-1.0] * 8),
            "global_std is negative",
        ),
        ("assets/dataset_stats.json", lambda t: t.update(action=[]), "'action' is no table"),
    ],
)
def test_a_cache_says_which_value_of_which_file_is_wrong(valid, tmp_path, name, change, words):
    root, read, _ = valid("cache")
    place = shutil.copytree(root, tmp_path / "copy")
    file = place / "cache" / name
    _rewritten(file, change)
    _refused(read, place, file.name, words)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("assets/text/rows.npy", b"", "rows.npy is damaged"),
        ("assets/text/rows.npy", b"PK\3\4", "rows.npy is damaged"),
        ("assets/codec/codec.npz", b"null", "codec.npz is damaged (it is no .npz file"),
        ("latents/cache.json", b"[1]", "cache.json holds [1]; expected a JSON object"),
        ("latents/cache.json", b"\xff", "cache.json is not JSON"),
    ],
)
def test_a_cache_says_which_file_is_none(valid, tmp_path, name, content, words):
    root, read, _ = valid("cache")
    place = shutil.copytree(root, tmp_path / "copy")
    (place / "cache" / name).write_bytes(content)
    _refused(read, place, words)


def test_a_header_of_another_length_shifts_no_rows(valid, tmp_path):
    root, read, _ = valid("cache")
    place = shutil.copytree(root, tmp_path / "copy")
    file = place / "cache/assets/text/rows.npy"
    content = bytearray(file.read_bytes())
    content[8] -= 4
    file.write_bytes(content)
    _refused(read, place, "rows.npy")


def test_a_shard_is_checked_when_it_is_opened_and_when_it_is_read(valid, tmp_path):
    root, read, _ = valid("cache")
    place = shutil.copytree(root, tmp_path / "copy")
    shard = next((place / "cache/latents").glob("*train*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged: 0 of its 16 records"):
        latent_cache.open_cache(interrupted.make_config(place)).source("train")
    shard.write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    with pytest.raises(latent_cache.DamagedRecord, match=f"{shard.name}: record .* of train"):
        read(place)


def test_damaged_metadata_of_orbax(valid, tmp_path):
    root, read, _ = valid("checkpoint")
    for number, text in enumerate(("null", '{"tree_metadata": {"a": -1}}')):
        place = shutil.copytree(root, tmp_path / str(number))
        (place / "run/params/_METADATA").write_text(text, encoding="utf-8")
        with pytest.raises(storage.DamagedCheckpointError, match="/params cannot be read"):
            read(place)
    (place / "run/meta/metadata").write_text("[]", encoding="utf-8")
    with pytest.raises(storage.DamagedCheckpointError, match="meta/metadata was altered"):
        read(place)


def test_a_directory_in_the_place_of_a_recording(valid, tmp_path):
    root, read, _ = valid("hdf5")
    place = shutil.copytree(root, tmp_path / "hdf5")
    (place / "robomimic/more.hdf5").mkdir()
    _refused(read, place, "more.hdf5", "unreadable file: a directory is in its place")
    root, read, _ = valid("rlds")
    place = shutil.copytree(root, tmp_path / "rlds")
    (shard,) = (place / "rlds/1.0.0").glob("*tfrecord*")
    malformed.directory(None, shard)
    _refused(read, place, f"{shard.name}): damaged file")


def test_rlds_metadata_that_list_nothing_or_not_all(valid, tmp_path):
    root, read, content = valid("rlds")
    place = shutil.copytree(root, tmp_path / "a")
    (shard,) = (place / "rlds/1.0.0").glob("*tfrecord*")
    shutil.copy(shard, shard.with_name("robot-val.tfrecord-00000-of-00001"))
    got, said = read(place)
    assert got == content and "robot-val.tfrecord-00000-of-00001): unlisted file" in said
    info = place / "rlds/1.0.0/dataset_info.json"
    _rewritten(info, lambda tree: tree["splits"][0].pop("shardLengths"))
    _refused(read, place, "dataset_info.json lists no episode")


def test_a_video_whose_codec_is_cut_off(valid, tmp_path):
    root, read, sound = valid("lerobot2.1")
    place = shutil.copytree(root, tmp_path / "copy")
    file = sorted(place.rglob("*.mp4"))[0]
    content = file.read_bytes()
    for kept in range(len(content) - 600, len(content), 40):
        file.write_bytes(content[:kept])
        assert _outcome(read, place, file, sound) in ("equal", "refused")


def test_a_shape_that_is_no_shape(valid, tmp_path):
    root, read, content = valid("lerobot2.1")
    place = shutil.copytree(root, tmp_path / "copy")
    info = place / "meta/info.json"
    _rewritten(info, lambda tree: tree["features"]["action"].update(shape=[10**30]))
    assert read(place)[0] == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_of_a_config_are_finite(value):
    tree = base.get_config("tiny")
    tree.model.eps = value
    with pytest.raises(ValueError, match=r"config\.model\.eps is"):
        config_lib.from_config_dict(tree)
