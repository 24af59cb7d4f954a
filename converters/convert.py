"""Weight files to checkpoint directories and back, a part at a time."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import tqdm

from converters import files, foreign, layouts, locate, rules, umt5, wrapped
from lightwam_jax import params
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage, streamed
from lightwam_jax.data import normalize
from lightwam_jax.models import quantized

FLOATS = ("float32", "bfloat16", "float16")  # what weights may be stored in
_HALF = ml_dtypes.bfloat16


def convert(kind, place, out, told, beside=(), verify=False, say=print):
    """Converts a weight file into a checkpoint directory.

    Tensors are read, moved and written one part at a time: memory holds a few hundred MB whatever
    the size of the file.

    Args:
      kind: "lightwam", "dit", "vae" or "t5": what the file has to be.
      place: file, folder or `hf:` repository (`locate.locate`).
      out: directory; must not exist.
      told: what the file does not tell; arguments of `lightwam.model_config`, "variant", and
        "part": which of several sets of weights in a .pt file.
      beside: files to keep with the weights: dataset_stats.json, tokenizer.json.
      verify: read the directory back and print what became of each module.

    Raises:
      FileExistsError: `out` exists. ValueError: the file is not what `kind` says.
    """
    out = files.absent(out)
    path, revision = locate.locate(place, kind)
    source, layout, meta = read(path, kind, told)
    if note := wrapped.told(meta["source"]):
        say(f"{path}: {note}")
    meta["source"].update(sha256=_sha256(path), revision=revision)
    beside = [*map(Path, beside), *_beside(path, kind)]
    check_beside(beside, meta["config"])

    total = sum(_bytes(entry) for entry in source.entries.values())
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar,
        tempfile.TemporaryDirectory() as assets,
    ):
        tree = rules.to_streams(layout.table, source, bar.update)
        for file in beside:
            shutil.copyfile(file, Path(assets, file.name))
        checkpoint.save_params(out, params.unflatten(tree), meta, assets if beside else None)
    size = sum(stream.size for stream in tree.values())
    say(f"{path}: {len(source.entries)} tensors, {size:,} values -> {out}")
    if verify:
        _read_back(out, source, layout, say)


def read(path, kind, told):
    """Opens a weight file and finds out what it is, without reading a tensor.

    Returns:
      (tensors to read, `Layout`, meta with "config", "source" and, for Light-WAM, "checkpoint").

    Raises:
      ValueError: not this kind; a missing or unexpected key, a wrong shape or dtype.
    """
    told = dict(told)
    part = told.pop("part", None) or ""
    source, layout, origin, rest = identify(path, kind, part)
    if layout.kind != kind:
        raise ValueError(
            f"{path} is a {layout.kind} file ({layout.name} names), not {kind}; run: "
            f"python -m converters {layout.kind} --in {path} ..."
        )
    _drop_tied(source)
    for key, entry in source.entries.items():
        if str(entry.dtype) not in FLOATS:
            quantised = str(entry.dtype).startswith(("float8", "int8", "uint8"))
            advice = "; quantised weights are not read: get the file they came from"
            raise ValueError(
                f"{path}: {key} is {entry.dtype}; expected weights in {', '.join(FLOATS)}"
                f"{advice if quantised else ''}"
            )
    config = read_config(source, layout, told)
    meta = {"config": config, "source": origin}
    if kind == "lightwam":
        meta.update(checkpoint=rest, step=rest.get("step", 0))
    return source, layout, meta


def identify(path, kind="", part=""):
    """Opens a weight file under plain keys and finds its layout; sizes are not looked at.

    Args:
      kind: what it should be; "lightwam" alone makes a difference. part: see `convert`.

    Returns:
      (tensors to read, `Layout`, what meta["source"] keeps of it, what lay beside the tensors).

    Raises:
      ValueError: no weight file, or of no known layout.
    """
    if kind == "lightwam":
        source, rest = files.open_checkpoint(path, part)
    else:
        source = files.open_tensors(path, part)
        rest = dict(getattr(source, "rest", {}))
    place, given = rest.pop("part", ""), source
    source, prefix = wrapped.unwrap(source)
    try:
        layout = layouts.detect(source.entries, source.name)
    except rules.UnknownLayout as error:
        if not (shard := foreign.shard_of(path)):
            raise
        raise ValueError(
            f"{path} is {shard} of a model; give the index that lies with the shards "
            "(.index.json), or their folder"
        ) from error
    origin = dict(file=path.name, kind=layout.kind, layout=layout.name, version=layout.version)
    origin |= dict(prefix=prefix)
    if place:
        origin |= dict(part=place)
    if source is not given and not prefix:
        origin |= dict(unwrapped=True)
    return source, layout, origin, rest


def read_config(source, layout, told):
    """The config of a file, and the proof that the file is complete."""
    told = dict(told)
    variant = told.pop("variant", None)
    shapes = rules.shapes_of(source.entries)
    rules.match_sources(layout.table, shapes, source.name)  # an unknown key is the clearer error
    try:
        config = layout.read_config(shapes, told)
    except KeyError as error:
        raise ValueError(f"{source.name}: key {error} is missing: incomplete") from error
    except ValueError as error:
        same = rules.Untold if isinstance(error, rules.Untold) else ValueError
        raise same(f"{source.name}: {error}") from error
    if variant:
        config = layouts.of_variant(config, variant)
    _check_complete(source.name, shapes, layouts.expected_shapes(layout, config))
    return config


def check_beside(beside, config):
    """Whether the files that go with the weights can be read and fit them."""
    for path in beside:
        if path.name == "dataset_stats.json":
            fields = config["model"]
            normalize.read_statistics(path, fields["proprio_dim"], fields["action_dim"])
        elif path.name != "tokenizer.json":
            raise ValueError(f"{path}: expected dataset_stats.json or tokenizer.json")
        else:
            files.read_json(path)


def export(place, out, layout=None, say=print):
    """Writes a checkpoint directory as a PyTorch-side file: the way back of `convert`.

    A run of `train.py` is written as a Light-WAM `.pt`.

    Args:
      layout: "official", "diffusers" or "huggingface"; None: the one it came in.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no checkpoint at `place`.
    """
    out = files.absent(out)
    stored = checkpoint.load_params(place)
    origin = stored.meta.get("source", {"kind": "lightwam", "version": "", "layout": "official"})
    layout = layouts.find(origin["kind"], origin["version"], layout or origin["layout"])
    whole = quantized.dequantized(stored.params)
    flat = {path: np.asarray(x) for path, x in params.flatten(whole).items()}
    tensors = rules.from_params(layout.table, flat, layouts.stacking(stored.meta["config"]))
    if layout.name == origin["layout"] and origin.get("prefix"):
        tensors = {origin["prefix"] + key: x for key, x in tensors.items()}
    if origin["kind"] == "lightwam":
        trained = {"step": stored.meta["step"], "torch_dtype": "torch.float32"}
        files.write_checkpoint(out, tensors, stored.meta.get("checkpoint") or trained)
    else:
        files.write_tensors(out, tensors)
    say(f"{stored.path} -> {out}: {len(tensors)} tensors")


# ---- parts of it ---------------------------------------------------------------------------------


def _drop_tied(source):
    """Leaves out the second copy of umT5's token table, if there is one and it is a copy."""
    first, second = (source.entries.get(key) for key in umt5.TIED)
    if not (first and second):
        return
    rows = streamed.rows_per_part(*first)
    parts = [(start, min(start + rows, first.shape[0])) for start in range(0, first.shape[0], rows)]
    equal = lambda part: np.array_equal(*(source.read(key, *part) for key in umt5.TIED))
    if first != second or not all(map(equal, parts)):
        raise ValueError(
            f"{source.name}: {umt5.TIED[1]} is not equal to {umt5.TIED[0]}; expected one token "
            "table"
        )
    del source.entries[umt5.TIED[1]]


def _check_complete(name, shapes, expected):
    """Nothing missing, nothing extra, every shape as the model has it.

    Raises:
      ValueError: names the file and the keys.
    """
    lines = [
        f"  {key} is {list(shapes[key])}, expected {list(expected[key])}"
        for key in shapes
        if key in expected and shapes[key] != tuple(expected[key])
    ]
    lines += [f"  missing {key} {list(expected[key])}" for key in expected if key not in shapes]
    lines += [f"  unexpected {key} {list(shapes[key])}" for key in shapes if key not in expected]
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError(
            f"{name} is not the complete model its sizes describe:\n" + "\n".join(lines[:10]) + more
        )


def _beside(path, kind):
    """Files that belong to the weights and lie with them."""
    if kind == "t5":
        found = locate.tokenizer(path)
        return [found] if found else []
    statistics = path.with_name("dataset_stats.json")
    return [statistics] if kind == "lightwam" and statistics.is_file() else []


def _read_back(out, source, layout, say):
    """Compares the written arrays with the file, module by module, and prints the table.

    Per module: tensors, values, the largest weight, the error of the stored weights in float32
    (they have to be the file's bytes) and after rounding to bfloat16, relative to the largest.

    Raises:
      ValueError: bytes changed on the way; `out` is removed.
    """
    meta, changed, rows = storage.read_meta(out), [], {}
    for path, stream in rules.to_streams(layout.table, source).items():
        stored, start = storage.read_array(out, "params", path, meta), 0
        for part in stream.parts():
            got = stored[start : start + len(part)]
            start += len(part)
            if part.dtype != got.dtype or part.tobytes() != got.tobytes():
                changed.append(path)
            _add(rows.setdefault(_module(path), np.zeros(5)), part, got, start == len(part))
    if changed:
        shutil.rmtree(out)
        names = rules.some_of(set(changed))
        raise ValueError(
            f"{len(set(changed))} arrays changed on the way, {out} was removed: {names}"
        )
    say(
        f"{'module':<28} {'arrays':>7} {'values':>15} {'largest':>10} {'float32':>9} "
        f"{'bfloat16':>9}"
    )
    for name, (arrays, values, largest, exact, rounded) in rows.items():
        scale = largest or 1.0
        say(
            f"{name:<28} {int(arrays):>7} {int(values):>15,} {largest:10.3e} "
            f"{exact / scale:9.1e} {rounded / scale:9.1e}"
        )
    say(f"read back: all {len(source.entries)} tensors identical, byte for byte")


def _add(row, part, got, first):
    """Adds a part to [arrays, values, largest, error in float32, error in bfloat16]."""
    true = part.astype(np.float32)
    error = lambda x: np.abs(x.astype(np.float32) - true).max()
    row += (first, part.size, 0, 0, 0)
    row[2:] = np.maximum(row[2:], (np.abs(true).max(), error(got), error(got.astype(_HALF))))


def _module(path):
    """The first parts of a path that name a module of the model."""
    parts = path.split("/")
    depth = 3 if parts[:2] == ["dit", "blocks"] else 2 if len(parts) > 2 else 1
    return "/".join(parts[:depth])


def _bytes(entry):
    return int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize


def _sha256(path):
    """Digest of the file; of an index, of its shards one after the other."""
    paths = [path]
    if path.name.endswith(".index.json"):
        names = sorted(set(files.read_json(path)["weight_map"].values()))
        paths = [path.parent / name for name in names]
    digest = hashlib.sha256()
    for each in paths:
        with open(each, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
