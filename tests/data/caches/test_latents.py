"""Caches survive: kills, full disks, several processes. All of them end in the same bytes."""

import concurrent.futures
import errno
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest
from array_record.python import array_record_module

from lightwam_jax import atomic, precompute
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.caches import build_latents, resumable
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.encoders import pca as pca_lib
from tests import interrupted

STEPS = interrupted.STEPS


@pytest.fixture
def patch():
    with interrupted.small() as found:
        yield found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The contents of a cache that nothing interrupted."""
    root = tmp_path_factory.mktemp("finished")
    with interrupted.small():
        precompute.precompute(interrupted.make_config(root), STEPS)
    return interrupted.contents(root / "cache")


def same(directory, finished):
    found = interrupted.contents(directory)
    assert sorted(found) == sorted(finished)
    assert [name for name in found if found[name] != finished[name]] == []


def test_shards_are_whole_episodes_of_limited_size(finished, patch, tmp_path):
    meta = json.loads(finished["latents/cache.json"])
    assert len(meta["shards"]) > 5
    config = interrupted.make_config(tmp_path)
    most = build_latents.SHARD_BYTES // build_latents.record_bytes(config)
    lengths = {split: [0] for split in meta["records"]}
    by_id = {e.id: e for e in precompute.SourceEpisodes(config).found}
    for shard in meta["shards"]:
        first, last = shard["episodes"]
        assert first == lengths[shard["split"]][-1], "no episode is left out or twice"
        lengths[shard["split"]].append(last)
        steps = [by_id[name].length for name in meta["episodes"][shard["split"]][first:last]]
        assert sum(steps) == shard["records"] and (sum(steps) <= most or len(steps) == 1)
    assert {split: ends[-1] for split, ends in lengths.items()} == {
        split: len(names) for split, names in meta["episodes"].items()
    }


class Death(BaseException):
    """Stands for SIGKILL within the process."""


@pytest.fixture
def mortal(patch):
    """A function: from now on the process dies at its n-th step on the disk or on the device.

    It returns how many of the steps before were left.
    """
    left = [0]

    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:  # a dead process cleans nothing up either
                raise Death
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "replace"),
        (os, "rename"),
        (os, "remove"),
        (os, "fsync"),
        (os, "makedirs"),
        (shutil, "rmtree"),
        (pca_lib.PcaCodec, "encode"),
    ):
        patch.setattr(owner, name, dying(getattr(owner, name)))

    def live(steps):
        before, left[0] = left[0], steps
        return before

    yield live
    left[0] = sys.maxsize


@pytest.mark.parametrize("seed", range(3))
def test_an_interruption_anywhere_changes_no_byte(seed, mortal, tmp_path, finished):
    rng, config, deaths = random.Random(seed), interrupted.make_config(tmp_path), 0
    while True:
        mortal(rng.randrange(1, 25))
        try:
            precompute.precompute(config, STEPS)
            break
        except Death:
            deaths += 1
        assert deaths < 1000
    mortal(sys.maxsize)
    precompute.precompute(config, STEPS)  # puts away what a death at the very end left
    assert deaths > 3
    same(tmp_path / "cache", finished)


def test_an_interruption_at_each_of_the_last_steps_changes_no_byte(mortal, patch, tmp_path):
    """Down to putting away the last leftover, of the texts and of the latents."""
    patch.setattr(build_latents, "SHARD_BYTES", 10 << 20)
    found = precompute.SourceEpisodes(interrupted.make_config(tmp_path)).found[:3]
    patch.setattr(episodes_lib, "read", lambda config: (found, []))
    config = interrupted.make_config(tmp_path)
    mortal(sys.maxsize)
    precompute.precompute(config, STEPS)
    finished = interrupted.contents(tmp_path / "cache")
    for step, part in (("text", "assets/text"), ("latents", "latents")):
        shutil.rmtree(tmp_path / "cache" / part)
        mortal(1000)
        precompute.precompute(config, (step,))
        total = 1000 - mortal(sys.maxsize)
        for last in range(total - 10, total):
            shutil.rmtree(tmp_path / "cache" / part)
            mortal(last)
            with pytest.raises(Death):
                precompute.precompute(config, (step,))
            mortal(sys.maxsize)
            precompute.precompute(config, (step,))
            same(tmp_path / "cache", finished)


def test_a_rebuild_interrupted_anywhere_leaves_a_cache_and_ends_like_a_fresh_one(
    mortal, tmp_path, finished
):
    """The old cache stays until the new one is complete, but for a moment that a rerun mends."""
    rng, config = random.Random(0), interrupted.make_config(tmp_path)
    other = interrupted.synthetic.make_config(
        tmp_path,
        **{"data.path": "episodes", "data.frame_stride": 1, "data.prompt_template": "do {task}"},
    )
    mortal(sys.maxsize)
    precompute.precompute(other, STEPS)
    for _ in range(200):
        mortal(rng.randrange(1, 60))
        try:
            precompute.precompute(config, STEPS)
            break
        except Death:
            latents = tmp_path / "cache" / "latents"
            assert any(
                (latents.parent / name / "cache.json").exists()
                for name in ("latents", "latents.old")
            )
    mortal(sys.maxsize)
    precompute.precompute(config, STEPS)
    same(tmp_path / "cache", finished)


def test_a_restart_says_what_it_keeps_and_encodes_only_the_rest(patch, tmp_path, capsys):
    config, encode = interrupted.make_config(tmp_path), pca_lib.PcaCodec.encode
    seen = [0, None]

    def count(self, video):
        seen[0] += len(video)
        if seen[1] and seen[0] > seen[1]:
            raise Death
        return encode(self, video)

    patch.setattr(pca_lib.PcaCodec, "encode", count)
    seen[1] = 70
    with pytest.raises(Death):
        precompute.precompute(config, ("latents",))
    plan = atomic.read_json(tmp_path / "cache" / "latents.partial" / "cache.json")
    there = [
        shard
        for shard in plan["shards"]
        if (tmp_path / "cache" / "latents.partial" / shard["file"]).exists()
    ]
    assert 0 < len(there) < len(plan["shards"])
    seen[:] = [0, None]
    precompute.precompute(config, ("latents",))
    kept = sum(shard["records"] for shard in there)
    assert seen[0] == sum(plan["records"].values()) - kept
    assert f"continuing: {len(there)} of {len(plan['shards'])} shards" in capsys.readouterr().out


def test_a_partial_cache_of_something_else_is_made_anew_and_says_why(
    patch, tmp_path, capsys, finished
):
    config = interrupted.make_config(tmp_path)
    directory = tmp_path / "cache" / "latents.partial"
    os.makedirs(directory)
    plan = json.loads(finished["latents/cache.json"])
    plan["config"]["config.data.canvas"] = [64, 64]
    plan["codec"] = "pca-of-old"
    atomic.write_json(directory / "cache.json", plan)
    (directory / "other").write_text("of the other plan", encoding="utf-8")
    precompute.precompute(config, STEPS)
    said = capsys.readouterr().err
    assert "made anew" in said and "config.data.canvas: [64, 64], now [32, 64]" in said
    assert "codec: 'pca-of-old', now 'pca-" in said
    same(tmp_path / "cache", finished)


def test_a_damaged_shard_is_made_again(patch, tmp_path, finished, capsys):
    config = interrupted.make_config(tmp_path)
    precompute.precompute(config, STEPS)
    latents = tmp_path / "cache" / "latents"
    os.rename(latents, f"{latents}.partial")  # as a kill just before the end leaves it
    shard = next(path for path in os.listdir(f"{latents}.partial") if "array_record" in path)
    os.truncate(f"{latents}.partial/{shard}", 70_000)
    precompute.precompute(config, STEPS)
    assert f"{shard} is damaged and is made again" in capsys.readouterr().out
    same(tmp_path / "cache", finished)


# ---- several processes ---------------------------------------------------------------------------


def test_processes_share_the_work_and_make_the_same_bytes(patch, tmp_path, finished):
    patch.setattr(resumable, "_POLL", 0.01)
    config = interrupted.make_config(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = [pool.submit(precompute.precompute, config, STEPS, i, 3) for i in (2, 1, 0)]
    assert [future.result().index for future in done] == [2, 1, 0]
    same(tmp_path / "cache", finished)


def test_the_last_process_completes_the_caches(patch, tmp_path, finished, capsys):
    config = interrupted.make_config(tmp_path)
    precompute.precompute(config, STEPS, 0, 2)
    out = capsys.readouterr().out
    assert out.count("its share is made") == 2
    assert latent_cache.read_meta(config) is None
    precompute.precompute(config, STEPS, 1, 2)
    assert "stats: left to process 0" in capsys.readouterr().out
    same(tmp_path / "cache", finished)


def test_a_process_without_process_0_gives_up_with_advice(patch, tmp_path):
    patch.setattr(resumable, "PATIENCE", 0.02)
    patch.setattr(resumable, "_POLL", 0.01)
    with pytest.raises(TimeoutError, match=r"for process 0 to begin .*text.partial: is it running"):
        precompute.precompute(interrupted.make_config(tmp_path), ("text",), 1, 2)
    with pytest.raises(ValueError, match=r"--process_index=2 of --process_count=2; expected 0 to"):
        precompute.precompute(interrupted.make_config(tmp_path), ("text",), 2, 2)


def test_finishing_twice_at_once_hurts_nobody(patch, tmp_path, finished):
    """Four processes find everything there and all try to complete it."""
    config = interrupted.make_config(tmp_path)
    precompute.precompute(config, STEPS)
    latents = tmp_path / "cache" / "latents"
    os.rename(latents, f"{latents}.partial")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = [pool.submit(precompute.precompute, config, ("latents",), i, 4) for i in range(4)]
    assert [future.result().index for future in done] == [0, 1, 2, 3]
    same(tmp_path / "cache", finished)


def test_the_same_command_twice_at_once_is_noticed(tmp_path):
    with (
        resumable.alone_in(tmp_path),
        pytest.raises(atomic.InUse, match="another process 0 works"),
        resumable.alone_in(tmp_path),
    ):
        pass


# ---- full disks ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of so many bytes, or resizes it."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(number):
        options = f"size={number}" + ",remount" * os.path.ismount(place)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting needs root")
        return place

    yield size
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_command_continues(patch, disk, finished):
    patch.setattr(resumable, "check_room", lambda directory, size: None)  # it would say so first
    size, deaths = 256 << 10, 0
    config = interrupted.make_config(disk(size))
    while True:
        try:
            precompute.precompute(config, STEPS)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert "the disk is full" in str(error) and "the same command continues" in str(error)
            assert str(disk(size) / "cache") in str(error)
            deaths += 1
        for path in (disk(size) / "cache").glob("latents.partial/*array_record*"):
            reader = array_record_module.ArrayRecordReader(str(path))
            assert reader.num_records() > 0, "a broken shard got its name"
        size += 128 << 10
        disk(size)
    assert deaths > 3
    same(disk(size) / "cache", finished)


def test_too_small_a_disk_is_said_before_work_begins(patch, disk):
    config = interrupted.make_config(disk(500 << 10))
    patch.setattr(build_latents._LatentBuild, "_make", lambda *args: pytest.fail("it began"))
    patch.setattr(resumable, "_SQUEEZED", 10)
    with pytest.raises(resumable.FullDisk, match=r"too little room .* [\d.]+ MB left, and up to"):
        precompute.precompute(config, ("latents",))


@pytest.mark.parametrize("fault", ["raises", "loses records"])
def test_a_writer_that_fails_leaves_no_shard(fault, patch, tmp_path, finished):
    class Writer:
        def __init__(self, path, options):
            self._inner, self._written = writer(path, options), 0

        def write(self, record):
            self._written += 1
            if fault == "raises" or self._written % 2:
                self._inner.write(record)

        def close(self):
            self._inner.close()
            if fault == "raises":
                raise RuntimeError("write() failed: No space left on device; writing x")

    writer = array_record_module.ArrayRecordWriter
    config = interrupted.make_config(tmp_path)
    patch.setattr(array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(resumable.FullDisk, match="the same command continues"):
        precompute.precompute(config, STEPS)
    assert os.listdir(tmp_path / "cache" / "latents.partial") == ["cache.json"]
    patch.setattr(array_record_module, "ArrayRecordWriter", writer)
    precompute.precompute(config, STEPS)
    same(tmp_path / "cache", finished)


def test_numpys_full_disk_is_understood_too(tmp_path):
    with (
        pytest.raises(resumable.FullDisk, match="more is still to be written"),
        resumable.explaining_full_disk(tmp_path),
    ):
        raise OSError("1048576 requested and 65536 written")
    with pytest.raises(KeyError), resumable.explaining_full_disk(tmp_path):
        raise KeyError("else")


# ---- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_ten_times_at_random(processes, tmp_path):
    """Done-when 5; the seed is fixed, but when a kill strikes depends on the machine."""
    script = str(pathlib.Path(__file__).parents[2] / "interrupted.py")
    root = os.path.dirname(os.path.dirname(script))
    for name, kills, count in (("calm", 0, 1), ("killed", 10, processes)):
        os.mkdir(tmp_path / name)
        done = subprocess.run(
            [sys.executable, script, str(tmp_path / name), "7", str(kills), str(count)],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("killed after") == kills
    print(done.stdout)
    assert re.search(r"[1-9]\d* shards there, [1-9]\d* of them unfinished", done.stdout)
    same(tmp_path / "killed" / "cache", interrupted.contents(tmp_path / "calm" / "cache"))
