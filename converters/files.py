"""Reading and writing weight files as numpy arrays, bit for bit, a tensor at a time.

`.safetensors` needs nothing else. `.pt` and `.pth` need PyTorch (its CPU build is enough) and are
read with `weights_only=True`, which refuses anything but tensors and plain containers. What a file
is tells its content, not its name (`foreign.py`).
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from converters import foreign, lightwam, rules, wrapped
from converters.rules import Entry
from lightwam_jax import atomic

_NUMPY = {  # of the names in safetensors files
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
    **{"U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "C64": np.complex64},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    "BOOL": np.bool_,
}
_REOPEN_BYTES = 256 << 20  # pages of a mapped file count as memory until it is closed


class SafetensorsFile:
    """One `.safetensors` file."""

    def __init__(self, path):
        self.name, self.entries, self._path = str(path), {}, path
        with _open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                part = file.get_slice(key)
                dtype = _dtype(part.get_dtype(), key, path)
                self.entries[key] = Entry(tuple(part.get_shape()), dtype)

    def read(self, key, start=None, stop=None):
        """As `InMemory.read`. The file is open only here, so that its pages are given back."""
        with _open_safetensors(self._path) as file:
            return file.get_slice(key)[start:stop] if start is not None else file.get_tensor(key)


class TorchFile:
    """A `.pt` or `.pth` file, mapped into memory.

    Attributes: as `InMemory`; rest: what `flatten` found beside the tensors.
    """

    def __init__(self, path, flatten):
        self.name, self._path, self._flatten = str(path), path, flatten
        self._reload()
        self.entries = {}
        for key, tensor in self._tensors.items():
            if not hasattr(tensor, "detach"):
                raise ValueError(f"{path}: {key} is a {type(tensor).__name__}, expected a tensor")
            kind = str(tensor.dtype).removeprefix("torch.")
            kind = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
            self.entries[key] = Entry(tuple(tensor.shape), np.dtype(kind))

    def _reload(self):
        self._tensors, self._touched = None, 0
        self._tensors, self.rest = self._flatten(read_torch(self._path))

    def read(self, key, start=None, stop=None):
        """As `InMemory.read`."""
        if self._touched > _REOPEN_BYTES:
            self._reload()
        tensor = self._tensors[key]
        tensor = tensor[start:stop] if start is not None else tensor
        self._touched += tensor.numel() * tensor.element_size()
        return to_numpy(tensor)


def open_tensors(path, part=""):
    """A weight file (or an index of shards) as tensors to read.

    Keys come in the order of a PyTorch file; safetensors files keep none and give them sorted.

    Args:
      part: of a PyTorch file in which several dictionaries hold weights: which one.

    Raises:
      FileNotFoundError: no such file, or shards that an index names are absent.
      ValueError: truncated, not a weight file, or LoRA adapters alone.
    """
    path = existing(path)
    source = _open_index(path) if path.name.endswith(".index.json") else _open_one(path, part)
    foreign.refuse_adapters(source.entries, str(path), path.parent)
    return source


def _open_one(path, part=""):
    foreign.refuse(path)
    if path.suffix == ".safetensors" or foreign.is_safetensors(path):
        return SafetensorsFile(path)

    def flatten(content):
        if lightwam.SECTIONS[1] in content:
            raise rules.LightwamCheckpoint(
                f"{path} is a Light-WAM checkpoint; run: python -m converters lightwam --in {path} "
                "..."
            )
        tensors, place = wrapped.tensors_of(content, part)
        return tensors, {"part": place}

    return _open_torch(path, flatten)


def _open_torch(path, flatten):
    try:
        return TorchFile(path, flatten)
    except rules.LightwamCheckpoint:
        raise
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def open_checkpoint(path, part=""):
    """A Light-WAM checkpoint -> (tensors to read, {"step", "torch_dtype", ...}).

    Flat keys are section.key: `mot.mixtures.video.head.modulation`. A `.safetensors` file holds
    them as they are.

    Raises:
      FileNotFoundError: no such file. ValueError: truncated, foreign, or a section is missing.
    """
    path = existing(path)
    foreign.refuse(path)
    if path.suffix == ".safetensors" or foreign.is_safetensors(path):
        source = SafetensorsFile(path)
        foreign.refuse_adapters(source.entries, str(path), path.parent)
        return source, {}
    source = _open_torch(path, lambda content: wrapped.sections_of(content, part))
    rest = {key: value for key, value in source.rest.items() if key != "optimizer"}
    return source, rest  # the optimizer's state belongs to another optimizer


def read_tensors(path):
    """{key: array} of a flat weight file, all of it; see `open_tensors`."""
    source = open_tensors(path)
    return {key: source.read(key) for key in source.entries}


def read_checkpoint(path):
    """A Light-WAM checkpoint -> ({flat key: array}, the rest); see `open_checkpoint`."""
    source, rest = open_checkpoint(path)
    return {key: source.read(key) for key in source.entries}, rest


def write_checkpoint(path, flat, rest):
    """Writes a Light-WAM `.pt` that the PyTorch reference loads, or a flat `.safetensors`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_tensors(path, flat)
        return
    tensors = _to_torch(path, flat)
    _save_torch(path, lightwam.unflatten_checkpoint(tensors, rest))


def write_tensors(path, tensors):
    """Writes a flat weight file: `.safetensors`, or `.pt`/`.pth` with PyTorch."""
    path = Path(path)
    if path.suffix == ".safetensors":
        whole = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
        with atomic.writing(path) as partial:
            save_file(whole, partial)
    elif path.suffix in (".pt", ".pth"):
        _save_torch(path, _to_torch(path, tensors))
    else:
        raise ValueError(f"{path}: expected a name that ends in .safetensors, .pt or .pth")


def read_json(path):
    """The content of a JSON file."""
    path = existing(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return content


def existing(path):
    """The path of a file that is there.

    Raises:
      FileNotFoundError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def absent(path):
    """The path of something that will be written.

    Raises:
      FileExistsError: it is there already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another --out")
    return path


def _open_index(path):
    place_of = keys_of_index(path)
    for name in place_of.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path} names the shard {name!r}; expected a file beside the index")
    shards = {name: path.parent / name for name in sorted(set(place_of.values()))}
    lost = [name for name, shard in shards.items() if not shard.is_file()]
    if lost:
        keys = [key for key, place in place_of.items() if place in lost]
        raise FileNotFoundError(
            f"{path} names {rules.some_of(lost)} for {len(keys)} tensors (such as {keys[0]}), and "
            f"{len(lost)} of its {len(shards)} shards are not in {path.parent}: get the missing "
            "shards and put them there"
        )
    source = rules.Joined([_open_one(shard) for shard in shards.values()], str(path))
    absent = sorted(set(place_of) - set(source.entries))
    if absent:
        raise ValueError(f"{path} lists {absent[0]}, and {place_of[absent[0]]} does not hold it")
    return source


def _open_safetensors(path):
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _dtype(name, key, path):
    if name not in _NUMPY:
        raise ValueError(f"{path}: {key} is {name}; expected one of {', '.join(_NUMPY)}")
    return np.dtype(_NUMPY[name])


def read_torch(path):
    """The dictionary in a `.pt` or `.pth` file, mapped into memory where the format allows.

    Raises:
      ValueError: truncated, no dictionary, or more than tensors and plain containers.
    """
    torch = _torch(path)
    try:
        with open(path, "rb") as file:  # only files in the newer zip format can be mapped
            mapped = file.read(2) == b"PK"
        content = torch.load(path, mmap=mapped, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and end-of-file errors here
        raise ValueError(foreign.why_refused(path, error)) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected a dictionary of tensors")
    return content


def keys_of_index(path):
    """{key: shard} of an index of shards, whether they are there or not."""
    place_of = read_json(path).get("weight_map")
    if not isinstance(place_of, dict) or not place_of:
        raise ValueError(f"{path} has no weight_map; expected an index of shards")
    return place_of


def _torch(path):
    try:
        import torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path.name} is a PyTorch file and PyTorch is not installed; its CPU build is enough: "
            "pip install -r requirements-torch.txt"
        ) from error
    return torch


def to_numpy(tensor):
    """A PyTorch tensor as an array of the same bits."""
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no bfloat16: move the bits
        import torch

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(path, arrays):
    """{key: array} -> {key: tensor of the same bits}, for the file `path`."""
    torch = _torch(path)

    def tensor(array):
        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    return {key: tensor(array) for key, array in arrays.items()}


def _save_torch(path, content):
    with atomic.writing(path) as partial:
        _torch(path).save(content, partial)
