"""What a weight file or a checkpoint directory is: kind, sizes, counts, dtypes."""

import collections
import math
import types
from pathlib import Path

from converters import convert, files, foreign, layouts, locate, rules, wrapped
from lightwam_jax import params
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage


def inspect(place, told, say=print):
    """Prints what lies at `place`, read from keys and shapes; no tensor is loaded.

    Args:
      place: weight file, folder, or checkpoint directory.
      told: head_dim and pool_heads where they are not the release's.

    Raises:
      FileNotFoundError: nothing there. ValueError: a file of no known layout, or incomplete.
    """
    place = Path(place)
    if not place.is_dir():
        return _file(place, told, say)
    try:
        directory = checkpoint.find_checkpoint(place)
    except FileNotFoundError:  # no checkpoint: a folder of weights
        path, _ = locate.locate(place, _kind_of_folder(place))
        return _file(path, told, say)
    return _checkpoint(directory, say)


def _file(path, told, say):
    """Lists what is there first; what keeps it from being converted comes after that."""
    told = dict(told)
    part = told.pop("part", None) or ""
    if path.name.endswith(".index.json"):
        keys = files.keys_of_index(path)
        shards = len(set(map(str, keys.values())))
        say(f"{path}: index of {len(keys)} tensors in {shards} shards{_of_kind(keys)}")
    try:
        source, layout, origin, rest = _identified(path, part)
    except rules.UnknownLayout as error:
        source = files.open_tensors(path, part)
        say(f"{path}: tensors of no known layout")
        _tensors(source, say)
        raise error
    say(f"{path}: {layout.kind} {layout.version} ({layout.name} names)".replace("  ", " "))
    if note := wrapped.told(origin):
        say(f"  {note}")
    problem = None
    try:
        source, layout, meta = convert.read(path, layout.kind, told | {"part": part})
        _config(meta["config"], say)
    except ValueError as error:
        problem = error
    if "step" in rest:
        say(f"  step {rest['step']}, saved as {rest.get('torch_dtype', 'unknown')}")
    _tensors(source, say)
    if isinstance(problem, rules.Untold):
        say(f"  to convert it: {problem}")
    elif problem:
        raise problem


def _of_kind(keys):
    """ ", of a dit" where keys alone tell it: shards may be missing."""
    names = types.SimpleNamespace(name="the index", entries=dict.fromkeys(keys))
    try:
        return f", of a {layouts.detect(wrapped.unwrap(names)[0].entries, names.name).kind}"
    except ValueError:
        return ""


def _identified(path, part):
    """As `convert.identify`, of a Light-WAM checkpoint too."""
    try:
        return convert.identify(path, "", part)
    except rules.LightwamCheckpoint:
        return convert.identify(path, "lightwam", part)


def _tensors(source, say):
    leaves = {key: (entry.shape, str(entry.dtype)) for key, entry in source.entries.items()}
    _counts(leaves, say, lambda key: key.split(".")[0])


def _kind_of_folder(folder):
    """The kind whose weights a folder holds.

    Raises:
      ValueError: weights of several kinds, or of none.
    """
    found = []
    for kind in locate.PLACES:
        try:
            locate.locate(folder, kind)
            found.append(kind)
        except FileNotFoundError:
            continue
    if len(found) != 1:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        raise ValueError(
            f"{folder} holds weights of {', '.join(found) or 'no known kind'}; give one file"
            f"{foreign.hint(names, folder)}"
        )
    return found[0]


def _checkpoint(directory, say):
    meta = storage.read_meta(directory)
    source = meta.get("source")
    made = "written by train.py"
    if source:
        made = (
            f"converted from {source['file']} ({source['kind']}, {source['layout']} names, sha256 "
            f"{source['sha256'][:12]})"
        )
    say(f"{directory}: checkpoint of step {meta['step']}, {made}")
    _config(meta["config"] or {}, say)
    leaves = {
        path: (shape, dtype)
        for name, arrays in meta["arrays"].items()
        if name != "optimizer"
        for path, (shape, dtype, _) in arrays.items()
    }
    group = lambda path: next(name for name, pattern in params.GROUPS if pattern.search(path))
    _counts(leaves, say, group)


def _config(config, say):
    for section in ("model", "vae", "text_encoder"):
        if section in config:
            fields = ", ".join(f"{key}={_short(value)}" for key, value in config[section].items())
            say(f"  {section}: {fields}")


def _short(value):
    """A long run of layer numbers as its ends."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(x, int) for x in value)
    if numbers and len(value) > 4 and list(value) == list(range(value[0], value[-1] + 1)):
        return f"{value[0]}..{value[-1]}"
    return value


def _counts(leaves, say, group_of):
    """Values per group and dtype, and the sum."""
    groups, dtypes = collections.Counter(), collections.Counter()
    for name, (shape, dtype) in leaves.items():
        groups[group_of(name)] += math.prod(shape)
        dtypes[dtype] += math.prod(shape)
    for name, values in groups.items():
        say(f"  {name:<28} {values:>15,}")
    say(
        f"  {'total':<28} {sum(groups.values()):>15,} values in {len(leaves)} tensors, "
        + ", ".join(f"{values:,} {dtype}" for dtype, values in dtypes.items())
    )
