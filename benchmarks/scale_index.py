"""A latent cache of millions of windows without pixels, and what opening and reading it costs.

The cache has everything that a real one has, but latents of two by two cells: cache.json, the TFDS
description, 512 shards, statistics and a text for every instruction. The first number of a window's
state is its row, so that a record that is read in place of another is seen.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import time
import zlib
from unittest import mock

import numpy as np
from array_record.python import array_record_module

from benchmarks import results
from configs import base
from lightwam_jax import atomic, encoders
from lightwam_jax import config as config_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import loader
from lightwam_jax.data.caches import build_latents, records
from lightwam_jax.data.caches import latents as latent_cache

STEPS = 200  # of an episode
TEXT = 128, 4096  # rows and width of a text as the full-size model takes it
_ROWS = 10  # of a text in the file
_MARK = np.float32(-12345.678)  # stands in a record for its row


def try_index(directory, count, instructions, batches=100, long_shard=0):
    """Makes a cache of `count` windows in a directory and reads it in a process of its own.

    Args:
      instructions: distinct ones.
      batches: read from the start; as many again after half of them, as after a restart.
      long_shard: records of one more file, from which records are read in both of ArrayRecord's
        ways; 0: no such file.

    Returns:
      numbers for a JSON file: seconds to make it, to open it, to the first batch; memory.
    """
    begun = time.perf_counter()
    config, planned = make(directory, count, instructions)
    found = {"windows": count, "episodes": count // STEPS, "instructions": instructions}
    found |= {"plan_s": planned, "make_s": round(time.perf_counter() - begun, 1)}
    path = pathlib.Path(directory) / "config.json"
    path.write_text(config_lib.to_json(config), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.scale_index", str(path), str(batches)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    found |= json.loads(done.stdout.split("\n")[-2])
    dense = instructions * TEXT[0] * TEXT[1] * 2
    found["texts_gib_if_in_memory"] = round(dense / results.GIB, 2)
    if long_shard:
        found["long_shard"] = read_ways(pathlib.Path(directory) / "long.array_record", long_shard)
    return found


def make(directory, count, instructions):
    """Writes the cache; returns (its `Config`, seconds that its plan took)."""
    config = make_config(directory)
    begun = time.perf_counter()
    planner = _planner(config, count, instructions)
    planned = round(time.perf_counter() - begun, 1)
    place = pathlib.Path(latent_cache.latents_directory(config))
    place.mkdir(parents=True)
    meta = {**planner.wanted, "psnr": {}}
    numbers = itertools.count()
    for shard in meta["shards"]:
        path = str(place / shard["file"])
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        for episode in range(*shard["episodes"]):
            head, tail = _record(planner, episode % instructions, f"{episode}")
            for _ in range(STEPS):
                writer.write(head + np.float32(next(numbers)).tobytes() + tail)
        writer.close()
    build_latents._write_metadata(str(place), meta, planner._features)
    _write_assets(config, [f"task {i}" for i in range(instructions)])
    return config, planned


def make_config(directory):
    """The smallest latents there are; texts of the full-size model's width."""
    c = base.get_config("tiny")
    c.loss.downsample = 1
    c.model.text_dim = TEXT[1]
    c.data.update(source="lerobot", path=f"{directory}/data", cache=f"{directory}/cache")
    c.data.update(codec="pca", text_encoder="hashed", text_len=TEXT[0], cameras=("scene",))
    c.data.update(canvas=(16, 16), num_frames=5, frame_stride=1, action_horizon=4, val_fraction=0.0)
    c.data.update(normalization="none", threads=2, prefetch=64)
    c.train.update(batch_size=64, eval_batches=0)
    c.evaluation.replan_steps = 1
    return config_lib.from_config_dict(c)


class _Codec:
    id = "none"


def _planner(config, count, instructions):
    """The real planning of a cache: fingerprint, instructions, shards; as many as are allowed."""
    state, action = (np.zeros((STEPS, width), np.float32) for width in _widths(config))
    image = {"scene": np.zeros((STEPS, 16, 16, 3), np.uint8)}
    made = [
        episodes_lib.ArrayEpisode(f"{i}", 20.0, f"task {i % instructions}", state, action, image)
        for i in range(count // STEPS)
    ]
    with mock.patch.object(build_latents, "SHARD_BYTES", 1):
        splits = {"train": made, "val": []}
        return build_latents._LatentBuild(config, splits, _Codec, {}, 0, 1)


def _record(planner, task, episode):
    """A serialised record before and after the first number of its state."""
    config = planner.config
    state, (frames, *cell) = (
        np.zeros(_widths(config)[0], np.float32),
        planner._features["latents"].shape,
    )
    state[0] = _MARK
    data = config.data
    record = {
        "latents": np.zeros((frames, *cell), planner._features["latents"].np_dtype),
        "proprio": state,
        "actions": np.zeros((data.action_horizon, _widths(config)[1]), np.float32),
        "action_is_pad": np.zeros(data.action_horizon, bool),
        "image_is_pad": np.zeros(data.video_frames, bool),
        "task": task,
        "start": 0,
        "episode": episode,
    }
    head, mark, tail = planner._serialize(record).partition(_MARK.tobytes())
    assert mark and _MARK.tobytes() not in tail
    return head, tail


def _widths(config):
    return config_lib.state_width(config), config_lib.action_width(config)


def _write_assets(config, tasks):
    """Statistics that are not looked at, the codec's name, and a sparse file of texts."""
    place = pathlib.Path(config.data.cache) / "assets"
    (place / "text").mkdir(parents=True)
    (place / "codec").mkdir()
    atomic.write_json(place / "codec/codec.json", {"id": _Codec.id})
    names = [f"global_{name}" for name in ("min", "max", "mean", "std", "q01", "q99")]
    tables = [{"default": {name: [0.0] * width for name in names}} for width in _widths(config)]
    atomic.write_json(place / "dataset_stats.json", dict(zip(("state", "action"), tables)))
    prompts = [encoders.text.prompt(task, config.data.prompt_template) for task in tasks]
    index = {
        "kind": config.data.text_encoder,
        "template": config.data.prompt_template,
        "id": "none",
        "dim": TEXT[1],
        "text_len": TEXT[0],
        "prompts": prompts,
        "lengths": [_ROWS] * len(prompts),
    }
    atomic.write_json(place / "text/index.json", index)
    shape = (_ROWS * len(prompts), TEXT[1])
    rows = np.lib.format.open_memmap(place / "text/rows.npy", "w+", np.uint16, shape)
    rows[:: max(1, len(rows) // 1000), 0] = 0x3F80  # bfloat16 1; the file stays sparse
    rows.flush()


# ---- reading -------------------------------------------------------------------------------------


def read(config, batches):
    """Opens a cache that `make` made, reads it, and reads again from the middle.

    Returns:
      {"open_s", "first_batch_s", "all_shards_s", "peak_gib", "index_bytes_per_window", ...}

    Raises:
      AssertionError: rows out of order or twice, another record than asked for, or other batches
        after a restart.
    """
    begun, before = time.perf_counter(), results.memory_gib()["process"]
    iterator = loader.train_loader(config)
    opened = time.perf_counter()
    first = next(iterator)
    found = {"open_s": opened - begun, "first_batch_s": time.perf_counter() - opened}
    found["before_gib"], resident = before, _resident()
    begun, opened_files = time.perf_counter(), _opened(config)
    found["all_shards_s"] = time.perf_counter() - begun
    found["index_bytes_per_window"] = round((_resident() - resident) / len(opened_files), 1)
    seen = [
        _short(batch) for batch in itertools.chain([first], itertools.islice(iterator, batches - 1))
    ]
    iterator.close()
    rows, state = (np.concatenate([short[i] for short in seen]) for i in (0, 1))
    assert len(np.unique(rows)) == len(rows), "a row came twice"
    assert np.array_equal(state, rows.astype(np.float32)), "another record than asked for"
    assert 0.3 < np.mean(np.diff(rows) > 0) < 0.7, "rows are in order"
    half = batches // 2
    again = loader.train_loader(config, start_step=half)
    for short, batch in zip(seen[half:], again):
        assert short[2] == _short(batch)[2], "a batch differs after a restart"
    again.close()
    found |= {"rows_read": len(rows), "first_rows": rows[:8].tolist(), "resumed_exactly": True}
    found["peak_gib"] = results.memory_gib()["process"]
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in found.items()}


def _short(batch):
    """What is kept of a batch: its rows, the first number of each state, a checksum of it all."""
    sums = {name: zlib.crc32(np.ascontiguousarray(x).view(np.uint8)) for name, x in batch.items()}
    return batch["index"], batch["proprio"][:, 0], sums


def _opened(config):
    """Returns the records of a cache, with all of their files open, each for one that was read."""
    cache, row = latent_cache.open_cache(config), 0
    found = cache.records("train")
    for shard in cache.meta["shards"]:
        assert found[row]
        row += shard["records"]
    return found


def _resident():
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(x.split()[1]) * 1024 for x in text.split("\n") if x.startswith("RssAnon"))


def read_ways(path, count, reads=50):
    """Microseconds of processor time to read a record of a long file, in ArrayRecord's two ways."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for number in range(count):
        writer.write(number.to_bytes(8, "little"))
    writer.close()
    options = {"options": records._OPTIONS, "file_reader_buffer_size": records._BUFFER}
    reader = array_record_module.ArrayRecordReader(str(path), **options)
    rows = np.random.default_rng(0).integers(0, count, reads).tolist()
    ways = {
        "by_list_us": lambda row: reader.read([row])[0],
        "by_range_us": lambda row: reader.read(row, row + 1)[0],
    }
    found = {"records": count}
    for name, way in ways.items():
        begun = time.process_time()
        assert all(int.from_bytes(way(row), "little") == row for row in rows)
        found[name] = round(1e6 * (time.process_time() - begun) / reads, 1)
    reader.close()
    return found


if __name__ == "__main__":
    stored = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
    print(json.dumps(read(config_lib.from_json(stored), int(sys.argv[2]))))
