"""Malformed inputs at every door: one clear error that names the file, or nothing has changed."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
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
from lightwam_jax import config as config_lib
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


@pytest.fixture(scope="module")
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
        place = malformed.copy(root, tmp_path / str(seed))
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


# ---- one case for each defect that was found -----------------------------------------------------


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
    place = malformed.copy(root, tmp_path / "copy")
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
    place = malformed.copy(root, tmp_path / "copy")
    (place / "cache" / name).write_bytes(content)
    _refused(read, place, words)


def test_a_header_of_another_length_shifts_no_rows(valid, tmp_path):
    root, read, _ = valid("cache")
    place = malformed.copy(root, tmp_path / "copy")
    file = place / "cache/assets/text/rows.npy"
    content = bytearray(file.read_bytes())
    content[8] -= 4
    file.write_bytes(content)
    _refused(read, place, "rows.npy")


def test_a_shard_is_checked_when_it_is_opened_and_when_it_is_read(valid, tmp_path):
    root, read, _ = valid("cache")
    place = malformed.copy(root, tmp_path / "copy")
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
        place = malformed.copy(root, tmp_path / str(number))
        (place / "run/params/_METADATA").write_text(text, encoding="utf-8")
        with pytest.raises(storage.DamagedCheckpointError, match="/params cannot be read"):
            read(place)
    (place / "run/meta/metadata").write_text("[]", encoding="utf-8")
    with pytest.raises(storage.DamagedCheckpointError, match="meta/metadata was altered"):
        read(place)


def test_a_directory_in_the_place_of_a_recording(valid, tmp_path):
    root, read, _ = valid("hdf5")
    place = malformed.copy(root, tmp_path / "hdf5")
    (place / "robomimic/more.hdf5").mkdir()
    _refused(read, place, "more.hdf5", "unreadable file: a directory is in its place")
    root, read, _ = valid("rlds")
    place = malformed.copy(root, tmp_path / "rlds")
    (shard,) = (place / "rlds/1.0.0").glob("*tfrecord*")
    malformed.directory(None, shard)
    _refused(read, place, f"{shard.name}): damaged file")


def test_rlds_metadata_that_list_nothing_or_not_all(valid, tmp_path):
    root, read, content = valid("rlds")
    place = malformed.copy(root, tmp_path / "a")
    (shard,) = (place / "rlds/1.0.0").glob("*tfrecord*")
    shutil.copy(shard, shard.with_name("robot-val.tfrecord-00000-of-00001"))
    got, said = read(place)
    assert got == content and "robot-val.tfrecord-00000-of-00001): unlisted file" in said
    info = place / "rlds/1.0.0/dataset_info.json"
    _rewritten(info, lambda tree: tree["splits"][0].pop("shardLengths"))
    _refused(read, place, "dataset_info.json lists no episode")


def test_a_video_whose_codec_is_cut_off(valid, tmp_path):
    root, read, _ = valid("lerobot2.1")
    place = malformed.copy(root, tmp_path / "copy")
    file = sorted(place.rglob("*.mp4"))[0]
    content = file.read_bytes()
    for kept in range(len(content) - 600, len(content), 40):
        file.write_bytes(content[:kept])
        _refused(read, place, file.name)


def test_a_shape_that_is_no_shape(valid, tmp_path):
    root, read, content = valid("lerobot2.1")
    place = malformed.copy(root, tmp_path / "copy")
    info = place / "meta/info.json"
    _rewritten(info, lambda tree: tree["features"]["action"].update(shape=[10**30]))
    assert read(place)[0] == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**30])
def test_numbers_of_a_config_are_finite(value):
    tree = base.get_config("tiny")
    tree.model.eps = value
    with pytest.raises(ValueError, match="config.model.eps is"):
        config_lib.from_config_dict(tree)
