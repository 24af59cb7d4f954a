"""Malformed inputs at every door: one clear error that names the file, or nothing has changed."""

import dataclasses
import functools
import hashlib
import json
import random
import warnings
import zlib

import h5py
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from converters.__main__ import main as converters
from lightwam_jax import command_line, precompute
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import compact, storage
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import loader
from lightwam_jax.data.caches import latents as latent_cache
from lightwam_jax.data.doctor import examine
from lightwam_jax.data.formats import lerobot_write
from tests import interrupted, malformed, writers
from tests.data.formats.test_lerobot_meta import configure, made

# ---- valid inputs, and what is read of them ------------------------------------------------------


def _digest(tree):
    """A hash of everything in a tree of arrays, numbers and texts."""
    out = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf) if not isinstance(leaf, str) else None
        out.update(leaf.encode() if array is None else f"{array.dtype}{array.shape}".encode())
        out.update(b"" if array is None else array.tobytes())
    return out.hexdigest()


def _episodes(config):
    """(hash of all columns and pictures, what the doctor says); its errors are raised."""
    found, problems = episodes_lib.read(config)
    report = examine.examine(config, (found, problems))
    said = "\n".join(problem.line() for problem in report.problems)
    if report.errors:
        raise ValueError(said)
    content = [
        (e.id, e.fps, [e.task_at(i) for i in range(e.length)], e.state, e.action)
        + tuple(e.frames(camera, np.arange(e.length)) for camera in config.data.cameras)
        for e in found
    ]
    return _digest(content), said


def _lerobot(root, version):
    lerobot_write.write(made(), root, version, ("scene", "wrist"))
    return lambda place: _episodes(configure(place))


def _hdf5(root):
    keys = writers.robomimic(root, made())
    (file,) = root.rglob("*.hdf5")
    with h5py.File(file, "r+") as opened:
        for demo in opened["data"].values():
            demo.attrs["fps"] = 10.0
    keys |= {"data.fields.fps": 0.0, "data.check_frames": "all"}
    return lambda place: _episodes(configure(place / "robomimic", **_beside(keys)))


def _rlds(root):
    keys = writers.rlds(root, made(2)) | {"data.check_frames": "all"}
    return lambda place: _episodes(configure(place / "rlds" / "1.0.0", **_beside(keys)))


def _beside(keys):
    return {key: value for key, value in keys.items() if key != "data.path"}


def _cache(root):
    with interrupted.small(4):
        precompute.precompute(interrupted.make_config(root), interrupted.STEPS)

    def read(place):
        config = interrupted.make_config(place)
        cache = latent_cache.open_cache(config)
        ((_, samples),) = loader.val_samples(config)
        assets = assets_lib.load_assets(assets_lib.assets_directory(config), config)
        ((_, train),) = loader._datasets(config, "train")
        records = [[s[i] for i in range(len(s))] for s in (train, samples)]
        content = records, assets.codec.arrays
        return _digest((content, cache.meta["tasks"], dataclasses.asdict(assets.action))), ""

    return read


def _checkpoint(root):
    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal((8, 4), np.float32) for name in ("a", "b", "c")}
    checkpoint.save_params(root / "run", tree, {"config": None, "step": 3})

    def read(place):
        stored = checkpoint.load_params(place / "run")
        return _digest((params_lib.flatten(jax.device_get(stored.params)), stored.meta["step"])), ""

    return read


def _policy(root, cache):
    """A checkpoint as `evaluation.export` writes it: config, assets and their sums."""
    config, assets = interrupted.make_config(cache), cache / "cache" / "assets"
    small, dtypes = compact.rounded({"a": np.ones((8, 4), np.float32)})
    meta = {"step": 3, "dtypes": dtypes, "config": dataclasses.asdict(config)}
    meta["files"] = compact.sums(assets)
    checkpoint.save_params(root / "policy", small, meta, assets)

    def read(place):
        stored = checkpoint.load_params(place / "policy")
        loaded = assets_lib.load_assets(stored.assets, stored.config)
        parts = stored.params, loaded.codec.arrays, dataclasses.asdict(loaded.action)
        return _digest((jax.device_get(parts), stored.meta["step"])), ""

    return read


def _inspected(capsys, path):
    capsys.readouterr()
    code = converters(["inspect", str(path), "--head_dim", "20"])
    shown = capsys.readouterr()
    if code:
        assert shown.err.startswith("error: ")
        raise ValueError(shown.err)
    return shown.out.replace(str(path), ""), ""
