"""Damages files the way disks, editors and other programs do; everything follows from a seed.

A damage is a function (random.Random, path) that changes what lies there and returns a few words
that say how. Text gets bytes that are no UTF-8 rather than other letters, and payloads without a
checksum (pictures, weights) are never changed in place: nothing could tell that from the original.
"""

import json
import math

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VALUES = (None, math.nan, -1, -math.inf, 2.5, 10**30, "", "x", True, [], {}, [None], [[1]])


def cut(rng, path):
    """Only a beginning is left."""
    content = path.read_bytes()
    kept = rng.choice((0, 1, rng.randrange(len(content)), len(content) - 1))
    path.write_bytes(content[:kept])
    return f"{kept} of {len(content)} bytes are left"


def directory(rng, path):
    """A directory in the place of the file."""
    path.unlink()
    path.mkdir()
    return "is a directory"


def foreign(rng, path):
    """The content of something else."""
    text = rng.choice((b"\0" * 4096, b"not found\n", b"[1, 2]", b"null", b"\xff" * 100, b"PK\3\4"))
    path.write_bytes(text)
    return f"holds {text[:12]!r}"


def high_byte(rng, path):
    """A byte of a text file that is no UTF-8."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] = 0xFF
    path.write_bytes(content)
    return f"byte {at} is 0xff"


def any_byte(rng, path):
    """A byte of a file that is checked by sums."""
    return _flipped(path, rng.randrange(path.stat().st_size), rng.randrange(8))


def first_bytes(count):
    """A byte among the first ones: a header."""
    return lambda rng, path: _flipped(path, rng.randrange(count), rng.randrange(8))


def last_bytes(count):
    """A byte among the last ones: parquet's footer."""

    def damage(rng, path):
        size = path.stat().st_size
        return _flipped(path, size - 1 - rng.randrange(min(count, size)), rng.randrange(8))

    return damage


def _flipped(path, at, bit):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} is another"


def in_json(rng, path):
    """A value of another kind, or a key that is missing, anywhere in a JSON file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    said = _in_tree(rng, tree)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return said


def in_a_line(rng, path):
    """The same in a line of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    tree = json.loads(lines[number])
    said = _in_tree(rng, tree)
    path.write_text(
        "\n".join([*lines[:number], json.dumps(tree), *lines[number + 1 :]]),
        encoding="utf-8",
    )
    return f"line {number}: {said}"


def _in_tree(rng, tree):
    holder, key, place = rng.choice(list(_places(tree)))
    if isinstance(holder, dict) and rng.random() < 0.35:
        del holder[key]
        return f"{place} is missing"
    number = isinstance(holder[key], float)  # another number would be another input, not a fault
    holder[key] = rng.choice([v for v in VALUES if not number or not _is_finite(v)])
    return f"{place} is {holder[key]!r}"


def _is_finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _places(tree, path=""):
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key, f"{path}/{key}"
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key], f"{path}/{key}")


def in_parquet(rng, path):
    """A column that is gone, of another type or with another value; or a row that is gone."""
    table = pq.read_table(path)
    number, row = rng.randrange(table.num_columns), rng.randrange(table.num_rows)
    name, cells = table.column_names[number], table.column(number).to_pylist()
    how = rng.choice(("gone", "text", "value", "value", "nested", "row"))
    if how == "gone":
        table = table.drop_columns([name])
    elif how == "row":
        table = pa.concat_tables([table.slice(0, row), table.slice(row + 1)])
    else:
        if how == "text":
            cells = [str(cell) for cell in cells]
        elif how == "nested":
            cells = [[cell] for cell in cells]
        else:
            cells[row], kind = _cell(rng, cells[row]), table.schema.field(number).type
        fixed = how == "value" and not pa.types.is_fixed_size_list(kind)
        array = pa.array(cells, kind) if fixed else pa.array(cells)
        table = table.set_column(number, name, array)
    pq.write_table(table, path)
    return f"{name}, row {row}: {how}{f' {cells[row]!r}' if how == 'value' else ''}"


def _cell(rng, cell):
    if isinstance(cell, list):
        bad = rng.choice((math.nan, None, math.inf)) if isinstance(cell[0], float) else None
        return rng.choice((None, cell[:-1], [*cell[:-1], bad]))
    if isinstance(cell, float):
        return rng.choice((None, math.nan, math.inf, -1e30))
    return rng.choice((None, -1, 2**40)) if isinstance(cell, int) else None


def in_hdf5(rng, path):
    """A dataset or attribute of a robot's file that is gone, or of another kind or length."""
    with h5py.File(path, "r+") as file:
        places = []
        file.visititems(lambda name, node: places.append(name))
        places = [name for name in places if name.count("/") > 1 or file[name].attrs]
        name = rng.choice(places)
        node = file[name]
        if node.attrs:
            key = rng.choice(list(node.attrs))
            node.attrs[key] = value = rng.choice((0, -1.5, "", "{}", "[1", math.nan, b"\xff\xfe"))
            return f"{name}@{key} is {value!r}"
        values = node[()] if isinstance(node, h5py.Dataset) else None
        del file[name]
        how = rng.choice(("gone", "group", "short", "text", "wide", "nan", "empty", "scalar"))
        if values is None or how == "gone":
            return f"{name} is gone"
        made = {
            "short": values[:-1],
            "text": np.array([b"x"] * len(values)),
            "wide": np.stack([values, values], -1),
            "nan": np.full(values.shape, math.nan, np.float32),
            "empty": values[:0],
            "scalar": np.float32(3),
        }
        if how == "group":
            file.create_group(name)
        else:
            file[name] = made[how]
        return f"{name} is {how}"


def in_safetensors(rng, path):
    """A header that says something else."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, said = header[name], name
    how = rng.choice(("gone", "dtype", "shape", "offsets", "renamed", "value", "length"))
    if how == "gone":
        del header[name]
    elif how == "dtype":
        entry["dtype"] = rng.choice(("I64", "F8_E4M3", "X", None, 3))
    elif how == "shape":
        entry["shape"] = rng.choice(([], [-1], [2**62, 4], ["a"], None, [*entry["shape"], 2]))
    elif how == "offsets":
        entry["data_offsets"] = rng.choice(([0, 2**60], [-1, 4], [5, 1], None, [0]))
    elif how == "renamed":
        header[name + "x"] = header.pop(name)
    elif how == "value":
        header[name] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    size = rng.choice((0, 2**63, len(text) * 2)) if how == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
    return f"{said}: {how}"


def in_torch(rng, path):
    """An entry of a .pt file that is gone, renamed or no tensor."""
    import torch

    content = torch.load(path, weights_only=True)
    name = rng.choice(list(content))
    how = rng.choice(("gone", "renamed", "value", "scalar", "nested", "list"))
    tensor = content.pop(name)
    if how == "list":
        content = [tensor]
    elif how != "gone":
        made = {
            "value": rng.choice(VALUES),
            "scalar": torch.tensor(1.0),
            "nested": {"a": {"b": tensor}},
            "renamed": tensor,
        }
        content[name if how != "renamed" else 7] = made[how]
    torch.save(content, path)
    return f"{name}: {how}"


ANYTHING = (cut, cut, directory, foreign)
TEXT = (*ANYTHING, high_byte)
JSON = (*TEXT, in_json, in_json, in_json, in_json, in_json)
LINES = (*TEXT, in_a_line, in_a_line, in_a_line, in_a_line)
PARQUET = (*ANYTHING, last_bytes(300), in_parquet, in_parquet, in_parquet, in_parquet)


def damages_of(path):
    """Returns what can be done to a file, by its name."""
    name = path.name
    if name.endswith((".json", "metadata", "_METADATA", "_sharding")):
        return JSON
    known = {
        ".jsonl": LINES,
        ".parquet": PARQUET,
        ".mp4": (*ANYTHING, first_bytes(24)),
        ".hdf5": (*ANYTHING, first_bytes(96), in_hdf5, in_hdf5, in_hdf5),
        ".safetensors": (*ANYTHING, first_bytes(200), in_safetensors, in_safetensors),
        ".pt": (*ANYTHING, in_torch, in_torch),
        ".npz": (*ANYTHING, any_byte),
        ".npy": (*ANYTHING, first_bytes(100)),
        ".py": TEXT,
    }
    return known.get(path.suffix, (*ANYTHING, any_byte))


def damage(rng, root):
    """Damages one file below `root`; returns (file, what was done)."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    by_kind = {}
    for file in files:  # many shards and chunks, and one meta file: as likely as each other
        by_kind.setdefault(
            (file.parent.name if file.suffix == ".json" else "", file.suffix), []
        ).append(file)
    path = rng.choice(by_kind[rng.choice(sorted(by_kind))])
    if rng.random() < 0.05 and len(files) > 1:
        path.unlink()
        return path, "is gone"
    return path, rng.choice(damages_of(path))(rng, path)
