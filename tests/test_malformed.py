"""Malformed inputs at every door: one clear error that names the file, or nothing has changed."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import pathlib
import random
import shutil

import h5py
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from converters import files
from converters.__main__ import main as converters
from lightwam_jax import command_line, config_read, precompute
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import compact
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
        [e.id, e.fps, [e.task_at(i) for i in range(e.length)], e.state, e.action] for e in found
    ]
    content += [
        e.frames(camera, np.arange(e.length)) for e in found for camera in config.data.cameras
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


def _weights(root, golden, suffix):
    """A transformer's weights, as `converters inspect` lists them."""
    path = root / f"dit{suffix}"
    tensors = files.read_tensors(golden / "a_dit" / "dit_alt.safetensors")
    tensors = {k: x for k, x in tensors.items() if "lora" not in k and "adapters" not in k}
    files.write_tensors(path, tensors)

    def read(place):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = converters(["inspect", str(place / path.name), "--head_dim", "14"])
        if code:
            assert code == 2 and err.getvalue().startswith("error: ")
            raise ValueError(err.getvalue())
        return out.getvalue().replace(str(place), ""), ""

    return read


_CONFIG = """from configs import base


def get_config():
    config = base.get_config("tiny")
    config.train.steps = 7
    return config
"""


def _config(root):
    (root / "mine.py").write_text(_CONFIG, encoding="utf-8")

    def read(place):
        argv, values = ["train.py", f"--config={place / 'mine.py'}"], flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
        command_line.parse(argv, values)
        return values.config.to_json(), ""

    return read


# ---- the test ------------------------------------------------------------------------------------

# How many damages of each kind; 300 in all, with the flags.
KINDS = {"lerobot2.1": 30, "lerobot3.0": 30, "hdf5": 30, "rlds": 30, "cache": 50, "policy": 30}
KINDS |= {"checkpoint": 20, "safetensors": 30, "pt": 20, "config": 10}
FLAGS = 20
# Metadata that describe another file: where the two differ, either may be named.
_OTHER = {"features.json": "robot-train.tfrecord", "dataset_info.json": "robot-train.tfrecord"}


@pytest.fixture(scope="session")
def valid(tmp_path_factory, golden):
    """A function: kind -> (directory of a valid input, reader of it or of a copy, its content)."""

    @functools.cache
    def make(kind):
        root = tmp_path_factory.mktemp(kind)
        if kind.startswith("lerobot"):
            root = root / "set"
            read = _lerobot(root, kind.removeprefix("lerobot"))
        elif kind in ("safetensors", "pt"):
            if kind == "pt":
                pytest.importorskip("torch")
            read = _weights(root, golden, f".{kind}")
        elif kind == "policy":
            read = _policy(root, make("cache")[0])
        else:
            makers = {"hdf5": _hdf5, "rlds": _rlds, "cache": _cache, "checkpoint": _checkpoint}
            read = (makers | {"config": _config})[kind](root)
        content, said = read(root)
        assert "error" not in said
        return root, read, content

    return make


def _outcome(read, place, file, content):
    """Returns what came of a damaged file: "equal", "warned" or "refused"; anything else fails."""
    try:
        got, said = read(place)
    except (ValueError, OSError) as error:  # what the commands' main functions make one line of
        got, said = None, str(error)
    if got == content:
        return "equal"
    names = [file.name, _OTHER.get(file.name, file.name)]
    if file.parent.name in ("params", "d", "ocdbt.process_0"):  # Orbax's own files, of one item
        names.append("/params cannot be read")
        names.append("/params: ")
    if not file.is_file():
        names.append(str(file.parent))
    assert any(name in said for name in names), said or "accepted, and its content is another"
    assert "allow_pickle" not in said and "weights_only" not in said
    return "refused" if got is None else "warned"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_by_name_or_change_nothing(kind, valid, tmp_path, capsys):
    root, read, content = valid(kind)
    count = collections.Counter()
    for seed in range(KINDS[kind]):
        rng = random.Random(f"{kind} {seed}")
        place = shutil.copytree(root, tmp_path / str(seed))
        file, how = malformed.damage(rng, place)
        try:
            count[_outcome(read, place, file, content)] += 1
        except Exception as error:
            relative = file.relative_to(place)
            error.add_note(f"{kind}, seed {seed}: {relative} {how}")
            raise
        shutil.rmtree(place)
    with capsys.disabled():
        print(f" {kind}: {dict(count)}", end="")
    assert count["refused"] > KINDS[kind] // 4


_BAD = {
    int: ("x", "2.5", "nan", "", "[]", "None", "-1000000000000"),
    float: ("x", "nan", "", "-inf", "[]", "None", "inf"),
    bool: ("x", "2", "nan"),
    tuple: ("(3,", "(None,)", "({},)"),
}


def test_flags_of_a_wrong_kind_are_named():
    keys = {key: kind for key, kind in _leaves(base.get_config("tiny")).items() if kind in _BAD}
    root = pathlib.Path(__file__).parent.parent
    for seed in range(FLAGS):
        rng = random.Random(seed)
        key = rng.choice(sorted(keys))
        argument = f"--config.{key}={rng.choice(_BAD[keys[key]])}"
        argv = ["train.py", f"--config={root}/configs/base.py", argument]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
        with pytest.raises(config_read.ConfigError) as caught:
            command_line.parse(argv, values)
            pytest.fail(f"accepted: {argument}")
        said = str(caught.value)
        assert key in said and "\n" not in said, argument


def _leaves(config, start=""):
    found = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            found |= _leaves(value, f"{start}{key}.")
        else:
            found[start + key] = type(value)
    return found
