"""Samples per second of the data loader, from a latent cache and from video, and its memory.

    python -m benchmarks.data [--samples 20000] [--rounds 3] [--directory DIR] [--out FILE.json]

Everything is made on the fly: 20 episodes of 100 steps, two cameras of 256x256 as h264 in a LeRobot
dataset, and a cache of their 2,000 windows, random latents of LIBERO's shapes (three latent frames
of 28x56 cells, 150 KB; chunks of 32 actions; text of 128 rows of width 4,096). One process reads
batches of 64 from the cache and of 8 from video, with several numbers of threads and of worker
processes; the median round counts. Last, 2,500 episodes of 150 steps without images are examined
and their statistics computed. Takes three to four minutes on two cores, when nothing else runs.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import results
from configs import base
from lightwam_jax import config as config_lib
from lightwam_jax import interrupts, precompute
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import loader, spec
from lightwam_jax.data.caches import build_latents
from lightwam_jax.data.formats import lerobot_write
from lightwam_jax.encoders import pca as pca_lib

EPISODES, STEPS, SIZE = 20, 100, 256
TARGET = 1500  # samples per second from the cache


def make_config(directory, **overrides):
    c = base.get_config()
    c.data.update(
        source="lerobot",
        path=f"{directory}/lerobot",
        cache=f"{directory}/cache",
        codec="pca",
        text_encoder="hashed",
        check_frames="none",
        **{"cameras": ("scene", "wrist"), **overrides},
    )
    c.data.fields.image = "observation.images.{camera}"
    return config_lib.from_config_dict(c)


def episodes():
    """A square moves over a ramp; ten instructions."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 160, SIZE)
    for number in range(EPISODES):
        images = {}
        for camera in ("scene", "wrist"):
            frames = np.empty((STEPS, SIZE, SIZE, 3), np.uint8)
            frames[:] = (ramp[:, None, None] + rng.uniform(0, 1, 3) * ramp[:, None]) / 2
            top, left = rng.integers(0, SIZE - 50, 2)
            for step, frame in enumerate(frames):
                frame[top : top + 50, (left + 2 * step) % (SIZE - 50) :][:, :50] = 255
            images[camera] = frames
        yield episodes_lib.ArrayEpisode(
            id=f"{number}",
            fps=20.0,
            task=f"put object {number % 10} into the bowl",
            state=rng.standard_normal((STEPS, 8)).astype(np.float32),
            action=rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32),
            images=images,
        )


class RandomLatents:
    """Latents of window i, [F, H, W, C]; as hard to compress as real ones."""

    def __init__(self, config):
        self._shape = spec.latents_shape(config)

    def __getitem__(self, index):
        values = np.random.default_rng(index).standard_normal(self._shape, np.float32)
        return values.astype(ml_dtypes.bfloat16)


def make_data(config):
    """Writes the LeRobot dataset, its statistics and texts, and the latent cache."""
    lerobot_write.write(episodes(), config.data.path, cameras=config.data.cameras)
    precompute.precompute(config, ("stats", "text"))
    noise = np.random.default_rng(0).integers(0, 256, (8, 5, 32, 32, 3), np.uint8)
    codec = pca_lib.PcaCodec.fit(noise, config.model.latent_channels)
    codec.save(f"{config.data.cache}/assets/codec")
    found = episodes_lib.load_episodes(config)
    build_latents.build(
        config,
        {"train": found, "val": []},
        codec,
        imported={"train": (RandomLatents(config), "random")},
    )


def columns(folder, count=2500, steps=150):
    """Seconds of `precompute --what stats` on a LeRobot v2.1 dataset without images."""
    rng = np.random.default_rng(1)
    made = (
        episodes_lib.ArrayEpisode(
            f"{number}",
            20.0,
            f"task {number % 40}",
            rng.standard_normal((steps, 8)).astype(np.float32).cumsum(0),
            rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
            {},
        )
        for number in range(count)
    )
    config = make_config(f"{folder}/columns", cameras=())
    lerobot_write.write(made, config.data.path)
    start = time.perf_counter()
    precompute.precompute(config, ("stats",))
    return {
        "episodes": count,
        "steps": count * steps,
        "seconds": round(time.perf_counter() - start, 1),
    }


def speed(config, batch_size, batches, **values):
    """Samples per second of a loader in steady state: what was read ahead is used up first."""
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **values),
        train=dataclasses.replace(config.train, batch_size=batch_size),
    )
    iterator = loader.train_loader(config)
    for _ in range(2 * max(config.data.threads, -(-config.data.prefetch // batch_size))):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - start
    iterator.close()
    return round(batches * batch_size / seconds, 1)


def memory(config, samples, points=10):
    """Resident memory in MB while `samples` are read, and its slope after the first tenth.

    A point is the median over the batches of an interval: batches of 77 MB come and go.
    """
    each = samples // config.train.batch_size // points
    rows, iterator = [], loader.train_loader(config)
    for point in range(1, points + 1):
        resident = []
        for _ in range(each):
            next(iterator)
            resident.append(_resident())
        rows.append(
            [point * each * config.train.batch_size, round(statistics.median(resident) / 1e6, 1)]
        )
    iterator.close()
    slope, _ = np.polyfit(*np.array(rows[1:]).T, 1)
    return {"samples_and_mb": rows, "mb_per_1000_samples": round(1000 * float(slope), 3)}


def _resident():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def measure(name, config, rounds, settings, batch_size, batches):
    """[{threads, workers, samples_per_s of the median round, rounds}] of the settings."""
    found = []
    for threads, workers in settings:
        values = {"threads": threads, "workers": workers}
        each = [speed(config, batch_size, batches, **values) for _ in range(rounds)]
        found.append({**values, "samples_per_s": statistics.median(each), "rounds": each})
        print(name, json.dumps(found[-1]), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000, help="read while memory is watched")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where the data go for a while; default: temporary")
    parser.add_argument("--out", help="result file, such as benchmarks/results/data.json")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(dir=results.made(args.directory))
    try:
        config = make_config(folder)
        make_data(config)
        found = {
            "cache": measure("cache", config, args.rounds, [(1, 0), (2, 0), (4, 0), (2, 2)], 64, 40)
        }
        best = max(row["samples_per_s"] for row in found["cache"])
        found |= {"cache_best": best, "cache_target": TARGET, "cache_ok": best >= TARGET}
        found["memory"] = memory(config, args.samples)
        print("memory", json.dumps(found["memory"]), flush=True)
        pixels = make_config(folder, encode_online=True, prefetch=16)
        found["video"] = measure("video", pixels, args.rounds, [(2, 0), (4, 0), (1, 2)], 8, 8)
        found["statistics"] = columns(folder)
        print("statistics", json.dumps(found["statistics"]), flush=True)
    finally:
        shutil.rmtree(folder)
    results.write(args.out, "data", found)


if __name__ == "__main__":
    interrupts.guard(main)
