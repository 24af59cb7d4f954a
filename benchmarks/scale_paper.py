"""The table of `benchmarks.scale`: what a data set costs on a pod, each figure with its source."""

import dataclasses
import functools
import json
import math
import pathlib
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from benchmarks import aot_tables, results
from benchmarks import data as data_benchmark
from lightwam_jax import config as config_lib
from lightwam_jax.data.caches import build_latents
from lightwam_jax.data.formats import video
from lightwam_jax.encoders import wan
from lightwam_jax.training import flops
from lightwam_jax.training.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked: the flags of `benchmarks.scale`."""

    hours: float
    topology: str
    fps: float = 20.0
    epochs: float = 1.0
    episode_steps: int = 200
    instructions: int = 50_000
    chips_per_host: int = 4
    cores_per_host: int = 112


class Row(NamedTuple):
    """A figure: what it is, its value with the unit, where it comes from."""

    what: str
    value: str
    source: str


class Measured(NamedTuple):
    """What the command measures: bytes of a record on the disk, images per second and core."""

    record_bytes: float
    images_per_s: float


def rows(config, wanted, index, measured=None):
    """Returns the `Row`s of a `Config`.

    Args:
      index: what `scale_index.try_index` found; None: these rows say how to get it.
      measured: `Measured`; None: it is measured, which takes a few seconds.

    Raises:
      ValueError: a topology without a compiled step in benchmarks/results.
    """
    file, step = compiled(wanted.topology)
    measured = measured or measure(config)
    windows = round(wanted.hours * 3600 * wanted.fps)
    hosts = math.ceil(step["chips"] / wanted.chips_per_host)
    return [
        *_data(config, wanted, windows, measured),
        *_index(config, wanted, windows, index),
        *_precompute(config, wanted, windows, hosts, step, measured),
        *_training(wanted, windows, file, step),
        *_reading(wanted, hosts, file, step, measured),
        *_checkpoints(config, file, step),
    ]


def compiled(topology):
    """Returns (file name, row of its weak scaling) of a topology such as v5e:256.

    Raises:
      ValueError: names the topologies there are.
    """
    found = {}
    for name, result in aot_tables.committed().items():
        chip = result["topology"].partition(":")[0]
        step = result.get("train", {})
        plan = {"plan": step.get("memory_plan_gib"), "fsdp": step.get("mesh", {}).get("fsdp")}
        for row in step.get("scaling", ()):
            found[f"{chip}:{row['chips']}"] = name, {**row, **plan}
    if topology not in found:
        raise ValueError(
            f"--topology={topology}: no compiled step of it in benchmarks/results; there are "
            f"{', '.join(found)}"
        )
    return found[topology]


# ---- the parts -----------------------------------------------------------------------------------


def _data(config, wanted, windows, measured):
    cameras, size = len(config.data.cameras), build_latents.record_bytes(config)
    shard = build_latents.records_per_shard(windows, size)
    on_disk = measured.record_bytes
    return [
        Row("steps of recordings", _si(windows), f"{wanted.hours:g} h, {wanted.fps:g} per second"),
        Row("windows", _si(windows), "one from every step (data/windows.py)"),
        Row("images", _si(windows * cameras), f"{cameras} cameras of the config"),
        Row("latent cache, before compression", _bytes(windows * size),
            f"build_latents.record_bytes: {size:,} bytes a window"),
        Row("latent cache on the disk", _bytes(windows * on_disk),
            f"measured by this command on Gaussian latents: {on_disk:,.0f} bytes a window"),
        Row("files of the cache", f"{-(-windows // shard):,}, each {_bytes(shard * on_disk)}",
            "build_latents.records_per_shard; a kill in precompute loses one of them per process"),
    ]  # fmt: skip


def _index(config, wanted, windows, index):
    state, action = config_lib.state_width(config), config_lib.action_width(config)
    widths, episodes = state + action, math.ceil(windows / wanted.episode_steps)
    moments = 2 * 6 * 8 * (state + config.data.action_horizon * action) * episodes
    texts = wanted.instructions * config.data.text_len * config.model.text_dim * 2
    found = [
        Row("states and actions, in the memory of precompute", _bytes(4 * widths * windows),
            f"{widths} float32 a step (data/episodes.py): in every process"),
        Row(f"statistics of {_si(episodes)} episodes, before they are joined", _bytes(moments),
            "data/normalize.py: six float64 tables each, copied once: in process 0"),
        Row(f"texts of {wanted.instructions:,} instructions, if held in memory", _bytes(texts),
            "config.data.text_len rows of config.model.text_dim; above 1 GiB they stay in a file"),
    ]  # fmt: skip
    if not index:
        return [*found, Row("index of the cache", "?", "run it with --try_index")]
    per_window, long = index["index_bytes_per_window"], index["long_shard"]
    return [
        *found,
        Row("index of the cache, per process that reads", _bytes(per_window * windows),
            f"scale.json: {per_window:g} bytes a window"),
        Row("to read one record, apart from the disk", f"{long['by_range_us']:g} µs",
            f"scale.json, file of {long['records']:,}; {long['by_list_us']:,.0f} µs as it was"),
    ]  # fmt: skip


def _precompute(config, wanted, windows, hosts, step, measured):
    chip, chips = CHIPS[wanted.topology.partition(":")[0]], step["chips"]
    work = encoding_flops(config)
    images, statistics = windows * len(config.data.cameras), _result("data.json")["statistics"]
    cores = hosts * wanted.cores_per_host
    return [
        Row("precompute: decoding", _time(images / measured.images_per_s / cores),
            f"measured by this command: {measured.images_per_s:,.0f} images (256x256, h264) per "
            f"second and core; {hosts} hosts with {wanted.cores_per_host} cores each (assumed)"),
        Row("precompute: encoding, floor", _time(windows * work / chips / chip.flops),
            f"training/flops.py: {work / 1e12:.2f} TFLOP a window ({config.data.codec}); "
            "training/chips.py: the chip's peak"),
        Row("statistics, one process", _time(windows * statistics["seconds"] / statistics["steps"]),
            f"data.json: {statistics['steps']:,} steps in {statistics['seconds']} s"),
    ]  # fmt: skip


def _training(wanted, windows, file, step):
    steps = math.ceil(wanted.epochs * windows / step["batch_size"])
    days = sorted(steps * ms / 1000 / 86400 for ms in step["step_ms"])
    return [
        Row("batch", f"{step['batch_size']:,}", f"{file}: {step['chips']} chips"),
        Row(f"steps of {wanted.epochs:g} epochs", f"{steps:,}", "windows over the batch"),
        Row("training, floor", f"{days[0]:.2f} to {days[1]:.2f} days",
            f"{file}: {min(step['step_ms']):.0f} to {max(step['step_ms']):.0f} ms a step"),
    ]  # fmt: skip


def _reading(wanted, hosts, file, step, measured):
    needed = max(step["samples_per_s"]) / hosts
    loaded = _result("data.json")["cache_best"]
    return [
        Row("samples per second and host", f"{needed:,.0f} at most",
            f"{file}: {max(step['samples_per_s']):,.0f} on {hosts} hosts"),
        Row("to be read per second and host", _bytes(needed * measured.record_bytes),
            "times the bytes of a window on the disk"),
        Row("what the loader gave", f"{loaded:,.0f} samples/s, {loaded / needed:.0f} times that",
            "data.json: two cores, a local disk"),
    ]  # fmt: skip


def _checkpoints(config, file, step):
    parts = {
        name: step["plan"][name] * step["fsdp"] * 2**30 for name in ("parameters", "optimizer")
    }
    size, every = sum(parts.values()), config.train.checkpoint_every
    seconds = every * min(step["step_ms"]) / 1000
    return [
        Row("a checkpoint", _bytes(size), f"{file}: memory.plan, parameters and optimizer"),
        Row("checkpoints, on average", f"{_bytes(size / seconds)} per second",
            f"every {every:,} steps: {_time(seconds)} at the floor"),
    ]  # fmt: skip


# ---- what the command measures -------------------------------------------------------------------


def measure(config):
    """Returns `Measured`: a file of random latents is written, and an episode's video is read."""
    return Measured(_record_on_disk(config), _images_per_second())


def _record_on_disk(config, count=200):
    """Bytes that a record of Gaussian latents takes in a file."""
    features, rng = build_latents.latent_cache.features(config), np.random.default_rng(0)
    serialize = build_latents._serializer(features)
    record = {name: np.zeros(f.shape, f.np_dtype) for name, f in features.items()}
    record |= {"task": 0, "start": 0, "episode": "0"}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/records"
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for _ in range(count):
            shape, kind = features["latents"].shape, features["latents"].np_dtype
            record["latents"] = rng.standard_normal(shape, np.float32).astype(kind)
            writer.write(serialize(record))
        writer.close()
        return pathlib.Path(path).stat().st_size / count


def _images_per_second():
    """Images that a core decodes, of an episode as `benchmarks.data` makes them."""
    episode = next(data_benchmark.episodes())
    frames = episode.images["scene"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/episode.mp4"
        video.write(path, frames, episode.fps)
        times, rounds = np.arange(len(frames)) / episode.fps, 5
        begun = time.process_time()
        for _ in range(rounds):
            video.frames(path, times)
        return rounds * len(frames) / (time.process_time() - begun)


def encoding_flops(config):
    """Returns the FLOPs of encoding the video of one window; 0 for a codec that is not a VAE."""
    data = config.data
    if data.codec not in wan.VAES:
        return 0
    return _encoding_flops(data.codec, (1, 4 * data.latent_frames - 3, *data.canvas, 3))


@functools.lru_cache
def _encoding_flops(codec, shape):
    model, pixels = wan.VAES[codec](dtype=jnp.bfloat16), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, method="encode"), pixels)
    encode = jax.jit(lambda params, x: model.apply(params, x, method="encode"))
    return flops.count(encode.trace(made, pixels).jaxpr)


def _result(name):
    return json.loads((aot_tables.RESULTS / name).read_text(encoding="utf-8"))


# ---- the table -----------------------------------------------------------------------------------


def table(found):
    """Returns `Row`s as Markdown."""
    lines = ["| what | | from |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in found)])


def tried(index):
    """Returns what `scale_index.try_index` found as Markdown."""
    sizes = f"{index['windows']:,} windows of {index['episodes']:,} episodes, "
    lines = [
        f"{sizes}{index['instructions']:,} instructions | value",
        "--- | ---",
        f"planning the cache (`build_latents`) | {index['plan_s']:.0f} s",
        f"opening it for training | {index['open_s']:.1f} s",
        f"the first batch of 64 after that | {index['first_batch_s']:.1f} s",
        f"opening all of its files | {index['all_shards_s']:.1f} s",
        f"memory at most, of it before opening | {index['peak_gib']:.2f} GiB, "
        f"{index['before_gib']:.2f} GiB",
        f"texts, if they were held in memory | {index['texts_gib_if_in_memory']:.1f} GiB",
    ]
    return "\n".join(f"| {line} |" for line in lines)


def write(path, wanted, found, index):
    """Writes both tables into a Markdown file.

    Raises:
      ValueError: the file lacks the marks for them, or nothing was tried.
    """
    if not index:
        raise ValueError("benchmarks/results/scale.json has no index: run it with --try_index")
    title = f"**{wanted.hours:,.0f} hours on {wanted.topology}, computed**"
    parts = [title, table(found), "**The index, tried**", tried(index)]
    results.insert(path, "scale", "\n" + "\n\n".join(parts) + "\n")


def _si(number):
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:,.1f}{name}"
    return f"{number:,.0f}"


def _bytes(size):
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:,.1f} kB"


def _time(seconds):
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s"
