"""Making the latent cache, shard by shard, on any number of processes.

A shard is a file of a few consecutive episodes of a split; config and data alone decide which. A
batch ends with its episode, so that a window is always encoded together with the same others,
whichever process makes its shard, and whenever: the bytes of the cache do not depend on it.
"""

import collections
import concurrent.futures
import contextlib
import errno
import itertools
import os
import typing

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming

from lightwam_jax import atomic, encoders
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.caches import resumable
from lightwam_jax.encoders import quality

SHARD_BYTES = 64 << 20  # of records, at most; one episode at least
_MOST_SHARDS = 512  # of a large cache: a reader holds all of them open
_RECORD_BYTES = 512  # of a record, beside its arrays
_ENCODE_VALUES = 16 << 20  # pixel values handed to the codec at once
_AHEAD = 4  # batches decoded while another is encoded
_TEST_EPISODES = 8  # decoded to report the quality of the codec
_NAME = "lightwam_windows"
_OPTIONS = "group_size:1"  # as TFDS writes: every record can be read by itself


def build(config, splits, codec, process_index=0, process_count=1, imported=None):
    """Makes what is missing of the cache; the process that finds it complete moves it into place.

    Args:
      config: Config.
      splits: {"train": [Episode], "val": [Episode]}; an empty one is left out.
      codec: Codec.
      process_index: process i of process_count makes shards i, i + process_count, ...
      process_count: how many make it together.
      imported: {split: (latents, note)} for splits that need no encoding: latents[i] is
        [F, H, W, C] of window i; the note, JSON, is kept in cache.json.

    Returns:
      cache.json as a dictionary; None where other processes have shards left to make.

    Raises:
      resumable.FullDisk: says how much is needed; what is finished is kept.
      ValueError: imported latents of another shape.
      atomic.InUse: another process makes the same shards.
    """
    work = _LatentBuild(config, splits, codec, imported or {}, process_index, process_count)
    return latent_cache.read_meta(config) if work.run() else None


class _LatentBuild(resumable.Build):
    """Makes a latent cache out of shards; its plan becomes cache.json."""

    plan_file = finished_file = "cache.json"

    def __init__(self, config, splits, codec, imported, process_index, process_count):
        super().__init__(latent_cache.latents_directory(config), process_index, process_count)
        self.config, self.splits, self.codec, self.imported = config, splits, codec, imported
        notes = {name: note for name, (_, note) in imported.items()}
        self.wanted = _plan(config, splits, codec, notes)
        self._number = {task: i for i, task in enumerate(self.wanted["tasks"])}
        self._features = latent_cache.features(config)
        self._serialize = _serializer(self._features)

    def plan(self):
        psnr = {} if self.imported else _quality(self.config, self.splits, self.codec)
        return {**self.wanted, "psnr": psnr}

    def differences(self, have):
        have, want = ({**side, **side["config"]} for side in (have, self.wanted))
        lines = [
            f"{key}: {have.get(key)!r}, now {value!r}"[:200]
            for key, value in want.items()
            if key not in ("config", *latent_cache.WHEREABOUTS) and have.get(key) != value
        ]
        return "\n  ".join(lines)

    def missing_bytes(self):
        missing = (
            shard for shard in self.wanted["shards"] if not os.path.exists(self._file(shard))
        )
        return sum(shard["records"] for shard in missing) * record_bytes(self.config)

    def make_share(self, plan):
        del plan  # found equal to `wanted`
        mine = self.wanted["shards"][self.index :: self.count]
        left = self._left(mine)
        if len(left) < len(mine):
            there = len(mine) - len(left)
            print(f"continuing: {there} of {len(mine)} shards are there", flush=True)
        if left:
            resumable.check_room(self.growing, self.missing_bytes())
            self._make(left, mine)
        return not self.missing_bytes()

    def assemble(self, plan):
        meta = {**self.wanted, "psnr": plan["psnr"]}
        _write_metadata(self.growing, meta, self._features)
        return self.growing

    def _file(self, shard):
        return os.path.join(self.growing, shard["file"])

    def _left(self, shards):
        """The shards that are not there; one that is damaged is taken away."""
        left = []
        for shard in shards:
            path = self._file(shard)
            if os.path.exists(path) and latent_cache.count(path) != shard["records"]:
                print(f"{path} is damaged and is made again", flush=True)
                os.remove(path)
            if not os.path.exists(path):
                left.append(shard)
        return left

    def _make(self, left, mine):
        """Makes the shards `left` of `mine`."""
        total, remaining = (sum(shard["records"] for shard in some) for some in (mine, left))
        bar = tqdm.tqdm(total=total, initial=total - remaining, desc="latents", unit="window")
        batches = _ahead(_batches(left, self.splits, self.config, self.imported))
        with contextlib.closing(batches), bar:
            for file, of_shard in itertools.groupby(batches, lambda b: b.shard["file"]):
                with atomic.writing(os.path.join(self.growing, file)) as path:
                    self._write_shard(path, of_shard, bar)

    def _write_shard(self, path, batches, bar):
        writer, written = array_record_module.ArrayRecordWriter(path, _OPTIONS), 0
        for batch in batches:
            latents = batch.latents if batch.video is None else self.codec.encode(batch.video)
            for record in _records(batch, latents.astype(ml_dtypes.bfloat16), self._number):
                writer.write(self._serialize(record))
            written += len(batch.windows)
            bar.update(len(batch.windows))
        writer.close()
        if latent_cache.count(path) != written:
            raise OSError(errno.ENOSPC, f"{path} cannot be read back")


def record_bytes(config):
    """Returns the size of a record before compression, roughly."""
    fields = latent_cache.features(config).get_tensor_info().values()
    sizes = [
        np.prod(field.shape) * np.dtype(field.np_dtype).itemsize for field in fields if field.shape
    ]
    return _RECORD_BYTES + int(sum(sizes))


def records_per_shard(windows, bytes_each):
    """Returns how many records a file of a split of so many windows may have."""
    return max(SHARD_BYTES, -(-windows * bytes_each // _MOST_SHARDS)) // bytes_each


# ---- the plan ------------------------------------------------------------------------------------


def _plan(config, splits, codec, imported):
    """cache.json but for the quality of the codec."""
    everything = [episode for chosen in splits.values() for episode in chosen]
    size = record_bytes(config)
    return {
        "config": latent_cache.wanted(config),
        "data": latent_cache.fingerprint(everything, config),
        "train_data": latent_cache.fingerprint(splits["train"], config),
        "codec": codec.id,
        "dtype": "bfloat16",
        "imported": imported,
        "records": {name: sum(e.length for e in chosen) for name, chosen in splits.items()},
        "tasks": episodes_lib.tasks(everything),
        "episodes": {name: [e.id for e in chosen] for name, chosen in splits.items()},
        "shards": [s for name, chosen in splits.items() for s in _shards(name, chosen, size)],
    }


def _shards(split, episodes, bytes_each):
    """[{split, file, episodes [first, last), records}] of a split, in order."""
    most = records_per_shard(sum(episode.length for episode in episodes), bytes_each)
    out = []
    for number, episode in enumerate(episodes):
        if not out or out[-1]["records"] + episode.length > most:
            out.append({"split": split, "file": "", "episodes": [number, number], "records": 0})
        out[-1]["episodes"][1] += 1
        out[-1]["records"] += episode.length
    names = _template("", split)
    for i, shard in enumerate(out):
        shard["file"] = names.sharded_filepath(shard_index=i, num_shards=len(out)).name
    return out


def _template(directory, split):
    return naming.ShardedFileTemplate(
        dataset_name=_NAME, data_dir=directory, split=split, filetype_suffix="array_record"
    )


def _quality(config, splits, codec):
    """PSNR of images after the codec, in dB, on held-out ones where there are any."""
    episodes = splits.get("val") or splits["train"]
    clips = windows_lib.clips(episodes, config, _TEST_EPISODES, 4)
    decoded, real = codec.decode(codec.encode(clips)), encoders.base.to_uint8(clips)
    return {
        "first": round(quality.psnr(decoded[:, 0], real[:, 0]), 2),
        "later": round(quality.psnr(decoded[:, 1:], real[:, 1:]), 2),
        "frames": "held-out" if splits.get("val") else "training",
    }


# ---- batches and records -------------------------------------------------------------------------


class _Batch(typing.NamedTuple):
    """Consecutive windows of an episode: their video, or their latents where those are given."""

    shard: dict
    episode: episodes_lib.Episode
    start: int
    windows: list
    video: np.ndarray | None
    latents: np.ndarray | None


def _ahead(items):
    """Makes the next few items in a thread while one is used."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = collections.deque(pool.submit(next, items, None) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


def _batches(shards, splits, config, imported):
    """The `_Batch`es of shards, in order; every episode is decoded once."""
    data = config.data
    first = {name: np.cumsum([0, *(e.length for e in chosen)]) for name, chosen in splits.items()}
    step = max(1, _ENCODE_VALUES // (3 * data.canvas[0] * data.canvas[1] * data.video_frames))
    for shard in shards:
        split = shard["split"]
        for place in range(*shard["episodes"]):
            episode = splits[split][place]
            windows = [windows_lib.window_of(episode, i, data) for i in range(episode.length)]
            parts = {i: windows[i : i + step] for i in range(0, len(windows), step)}
            if split in imported:
                latents, begin = imported[split][0], first[split][place]
                for start, part in parts.items():
                    given = [latents[begin + start + i] for i in range(len(part))]
                    yield _Batch(shard, episode, start, part, None, np.stack(given))
            else:
                videos = _videos(episode, parts.values(), config)
                for (start, part), video in zip(parts.items(), videos):
                    yield _Batch(shard, episode, start, part, video, None)


def _videos(episode, parts, config):
    """Videos [k, frames, H, W, 3] of consecutive windows; an image is laid out once."""
    every = np.arange(episode.length)
    images = {camera: episode.frames(camera, every) for camera in config.data.cameras}
    canvases = {}
    for part in parts:
        frames = np.stack([window.frames for window in part])
        needed = np.unique(frames)
        new = [frame for frame in needed if frame not in canvases]
        if new:
            shown = {camera: values[new] for camera, values in images.items()}
            canvases.update(zip(new, windows_lib.lay_out(shown, episode, config)))
        canvases = {frame: canvases[frame] for frame in needed}
        yield np.stack([np.stack([canvases[frame] for frame in row]) for row in frames])


def _records(batch, latents, number):
    """The windows of a batch as records; see `latents.features`."""
    for offset, window in enumerate(batch.windows):
        start = batch.start + offset
        yield {
            "latents": latents[offset],
            **windows_lib.raw_values(batch.episode, start, window, number),
            "start": start,
            "episode": batch.episode.id,
        }


# ---- files ---------------------------------------------------------------------------------------


def _serializer(features):
    """Returns the function from a record to the bytes TFDS would write, fields in a fixed order."""
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(record):
        example = serializer.get_tf_example(features.encode_example(record))
        return example.SerializeToString(deterministic=True)  # the default's order is random

    return serialize


def _write_metadata(directory, meta, features):
    """Writes what makes the finished shards a TFDS dataset, and cache.json."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=_NAME, version="1.0.0", data_dir=directory, module_name=latent_cache.__name__
    )
    about = "Windows of video latents, states and actions."
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=about)
    info.set_file_format("array_record")
    splits = []
    for name in meta["records"]:
        shards = [shard for shard in meta["shards"] if shard["split"] == name]
        if shards:
            sizes = [os.path.getsize(os.path.join(directory, shard["file"])) for shard in shards]
            split = tfds.core.SplitInfo(
                name=name,
                shard_lengths=[shard["records"] for shard in shards],
                num_bytes=sum(sizes),
                filename_template=_template(directory, name),
            )
            splits.append(split)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(directory)
    atomic.write_json(os.path.join(directory, "cache.json"), meta)
