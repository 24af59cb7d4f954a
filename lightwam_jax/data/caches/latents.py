"""The latent cache: one record per window, as a TFDS dataset of ArrayRecord files.

Layout of config.data.cache:
  assets/    what a policy needs (see `assets.py`): dataset_stats.json, codec/, text/
  latents/   the TFDS dataset (splits train and val) and cache.json, which says what it was made of
             (of a mixture: latents_NAME/ for each dataset)

Records hold raw windows; normalisation happens in the loader, so that other statistics or another
mode need no new cache. `build_latents.py` makes it. Neither writing nor reading imports TensorFlow.
"""

import concurrent.futures
import dataclasses
import hashlib
import os

import ml_dtypes  # noqa: F401 (else TFDS imports TensorFlow to find bfloat16, when it reads)
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from lightwam_jax import atomic
from lightwam_jax import config as config_lib
from lightwam_jax.data import assets, spec, tfds_metadata
from lightwam_jax.data.caches import contents, records

REBUILD = "python -m lightwam_jax.precompute --config CONFIG --what"
REDO = f"delete its directory and run {REBUILD} latents"
# What cache.json and each of its shards have to hold.
_KINDS = {"config": dict, "data": str, "train_data": str, "codec": str, "tasks": [str]}
_KINDS |= {"shards": [dict], "records": dict, "episodes": dict}
_OF_A_SHARD = {"split": str, "file": str, "records": int}
TENSORS = ("latents", "proprio", "actions", "action_is_pad", "image_is_pad")  # of a record

# Config keys that decide what the records hold. What only normalises or transforms raw windows
# does not; how wide they are is added below.
_KEYS = (
    "data.source",
    "data.path",
    "data.exclude",
    "data.fields",
    "data.cameras",
    "data.orientation",
    "data.camera_size",
    "data.layout",
    "data.canvas",
    "data.codec",
    "data.num_frames",
    "data.frame_stride",
    "data.action_horizon",
    "data.val_fraction",
    "model.latent_channels",
)
# With these two changed and the same fingerprint, the same episodes lie elsewhere.
WHEREABOUTS = ("config.data.path", "config.data.exclude")


def features(config):
    """Returns the TFDS features of a record."""
    batch = spec.batch_spec(config, 1)
    shapes = {name: batch[name].shape[1:] for name in TENSORS}
    # As wide as the data: the loader pads to the model's widths.
    shapes["proprio"] = (config_lib.state_width(config),)
    shapes["actions"] = (config.data.action_horizon, config_lib.action_width(config))
    # encoding="bytes" keeps bfloat16 at two bytes; the default would widen it.
    tensors = {
        name: tfds.features.Tensor(shape=shape, dtype=batch[name].dtype.type, encoding="bytes")
        for name, shape in shapes.items()
    }
    more = {"task": np.int64, "start": np.int64, "episode": tfds.features.Text()}
    return tfds.features.FeaturesDict(tensors | more)


def wanted(config):
    """Returns {"config.section.key": JSON} of the keys that decide what the records hold."""
    out = {}
    for key in _KEYS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        parts = {key: value}
        if dataclasses.is_dataclass(value):
            parts = {f"{key}.{field}": v for field, v in dataclasses.asdict(value).items()}
        for part, v in parts.items():
            out[f"config.{part}"] = list(v) if isinstance(v, tuple) else v
    out["config.data.state_dim, or else model.proprio_dim"] = config_lib.state_width(config)
    out["config.data.action_dim, or else model.action_dim"] = config_lib.action_width(config)
    return out


def differences(have, config):
    """Returns lines "key: cache value, config value" for the keys of `wanted` that differ."""
    return [
        f"{key}: cache {have.get(key)!r}, config {value!r}"
        for key, value in wanted(config).items()
        if have.get(key) != value
    ]


def fingerprint(episodes, config):
    """Returns a hash of the episodes: ids, tasks, states, actions, and the files of their images.

    No image is decoded: that would take minutes, and a damaged one would be in the way of the
    report about it. See `contents` for what is read of a file. Of episodes without files, the very
    first image tells another renderer or camera from this one.
    """
    digest = hashlib.sha256()
    for episode in episodes:
        tasks = "\0".join(episode.task_at(step) for step in range(episode.length))
        digest.update(f"{episode.id}\0{episode.length}\0{tasks}\0".encode())
        digest.update(np.ascontiguousarray(episode.state, np.float32).tobytes())
        digest.update(np.ascontiguousarray(episode.action, np.float32).tobytes())
    places = [(episode, camera) for episode in episodes for camera in config.data.cameras]
    with concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool:
        for (episode, camera), content in zip(places, pool.map(_content, *zip(*places))):
            digest.update(content)
            if not content and episode is episodes[0]:
                digest.update(np.ascontiguousarray(episode.frames(camera, [0])).tobytes())
    return digest.hexdigest()[:16]


def _content(episode, camera):
    """What stands for the images of a camera: where they begin in which content; b"" in memory."""
    files, video = episode.files(camera), episode.video(camera)
    first = f"{video[1]}\0".encode() if video else b""
    return first + b"".join(map(contents.digest, files))


class DamagedRecord(ValueError):
    """A record that cannot be read; the message names its file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """An opened latent cache.

    Attributes:
      meta: cache.json: config (see `wanted`), data and train_data (fingerprints), codec (id),
        dtype, psnr, tasks, imported (see `build_latents.build`), shards, and per split the number
        of records and the episodes' ids.
      directory: of the TFDS dataset.
    """

    meta: dict
    directory: str

    def source(self, split):
        """Returns the random-access records of "train" or "val": len(), [i] -> dict of arrays.

        Raises:
          ValueError: the files are not those that were written; names the one that differs.
        """
        with tfds_metadata.naming(os.path.join(self.directory, "features.json"), REDO):
            tfds.features.FeatureConnector.from_config(self.directory)
        path = os.path.join(self.directory, "dataset_info.json")
        with tfds_metadata.naming(path, REDO):
            builder = tfds.builder_from_directory(self.directory)
            info = builder.info.splits[split]
            listed, size = info.shard_lengths, info.num_bytes
        shards = [shard for shard in self.meta["shards"] if shard["split"] == split]
        if listed != [shard["records"] for shard in shards]:
            raise ValueError(f"{path} lists other records of {split} than cache.json; {REDO}")
        files = [os.path.join(self.directory, shard["file"]) for shard in shards]
        if sum(map(os.path.getsize, files)) != size:
            for file, shard in zip(files, shards):
                if (there := count(file)) != shard["records"]:
                    raise ValueError(
                        f"{file} is damaged: {there} of its {shard['records']} records are there; "
                        f"{REDO}"
                    )
            raise ValueError(f"{path} says another size of {split} than its files have; {REDO}")
        return builder.as_data_source(split)

    def records(self, split):
        """Returns the `records.Records` of a split; `source` says whether all are there."""
        shards = [shard for shard in self.meta["shards"] if shard["split"] == split]
        files = [os.path.join(self.directory, shard["file"]) for shard in shards]
        return records.Records(files, [shard["records"] for shard in shards])

    def size(self, split):
        """Returns the number of records of a split."""
        return self.meta["records"][split]


def latents_directory(config):
    """Returns where the latent cache of a config, or of a dataset of a mixture, lies."""
    dataset = config.data.dataset
    return os.path.join(config.data.cache, f"latents_{dataset}" if dataset else "latents")


def read_meta(config):
    """Returns cache.json, or None where there is no finished cache; ValueError: it is damaged."""
    path = os.path.join(latents_directory(config), "cache.json")
    meta = atomic.read_json(path, _KINDS, REDO)
    for number, shard in enumerate(meta["shards"] if meta else ()):
        atomic.check_json(shard, _OF_A_SHARD, f"{path}: shards[{number}]", REDO)
    for split in meta["records"] if meta else ():
        there = sum(shard["records"] for shard in meta["shards"] if shard["split"] == split)
        if meta["records"][split] != there:
            raise ValueError(
                f"{path} says {meta['records'][split]} records of {split}, its shards hold "
                f"{there}; {REDO}"
            )
    return meta


def open_cache(config):
    """Returns the `Cache` of config.data.cache.

    Raises:
      FileNotFoundError: none there.
      ValueError: made for another config; every differing key is listed with both values.
    """
    meta = read_meta(config)
    if meta is None:
        raise FileNotFoundError(
            f"config.data.cache={config.data.cache!r} holds no finished latent cache; make it "
            f"with: {REBUILD} all"
        )
    lines = differences(meta["config"], config)
    codec = _asset(config, "codec", "codec.json").get("id")
    if codec != meta["codec"]:
        lines.append(f"codec: cache {meta['codec']}, assets/codec/codec.json {codec}")
    # Statistics without "made_from" were put there by hand (a released file): taken as they are.
    made_from = _asset(config, assets.statistics_file(config)).get("made_from")
    if made_from and meta["train_data"] not in made_from["data"].split("+"):
        lines.append(f"training data: cache {meta['train_data']}, statistics {made_from['data']}")
    if lines:
        raise ValueError(
            f"the latent cache of {latents_directory(config)}/cache.json does not fit:\n  "
            + "\n  ".join(lines)
            + "\nSet another config.data.cache, change the config back, or rebuild the cache: "
            f"{REBUILD} stats,text,latents\n(If only config.data.path changed, that command "
            "compares the episodes and keeps the latents.)"
        )
    return Cache(meta, latents_directory(config))


def _asset(config, *path):
    """The JSON file `path` of the assets, {} if it is not there."""
    return atomic.read_json(os.path.join(config.data.cache, "assets", *path), {}) or {}


def count(path):
    """Returns the number of records in a file; 0 if it is not one."""
    try:
        reader = array_record_module.ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except RuntimeError:
        return 0
    return count
