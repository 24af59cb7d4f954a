"""Reading and writing weight files as numpy arrays, bit for bit.

`.safetensors` needs nothing else. `.pt` and `.pth` need PyTorch (its CPU build is enough) and are
read with `weights_only=True`, which refuses anything but tensors and plain containers.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from converters import lightwam


def read_tensors(path):
    """{key: array} of a flat weight file; a "model_state" wrapper is opened.

    Keys come in the order of a PyTorch file; safetensors files keep none and give them sorted.

    Raises:
      FileNotFoundError: no such file. ValueError: truncated, or not a weight file.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_torch(path)
    content = content.get("model_state", content)
    return {key: _to_numpy(value, f"{path}: {key}") for key, value in content.items()}


def read_checkpoint(path):
    """A Light-WAM checkpoint -> ({flat key: array}, {"step", "torch_dtype", ...}).

    Flat keys are section.key: `mot.mixtures.video.head.modulation`. A `.safetensors` file holds
    them as they are.

    Raises:
      FileNotFoundError: no such file. ValueError: truncated, foreign, or a section is missing.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path), {}
    try:
        flat, rest = lightwam.flatten_checkpoint(_read_torch(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    rest.pop("optimizer", None)  # belongs to another optimizer
    return {key: _to_numpy(value, f"{path}: {key}") for key, value in flat.items()}, rest


def write_checkpoint(path, flat, rest):
    """Writes a Light-WAM `.pt` that the PyTorch reference loads, or a flat `.safetensors`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_tensors(path, flat)
        return
    torch = _torch(path)
    tensors = {key: _to_torch(torch, value) for key, value in flat.items()}
    torch.save(lightwam.unflatten_checkpoint(tensors, rest), path)


def write_tensors(path, tensors):
    """Writes a flat weight file: `.safetensors`, or `.pt`/`.pth` with PyTorch."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        return
    torch = _torch(path)
    torch.save({key: _to_torch(torch, value) for key, value in tensors.items()}, path)


def _existing(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _read_safetensors(path):
    try:
        with safe_open(path, framework="np") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_torch(path):
    torch = _torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and end-of-file errors here
        raise ValueError(f"{path} is truncated, no PyTorch file, or holds more than tensors "
                         "(refused: loading it could run code): "
                         f"{str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, "
                         "expected a dictionary of tensors")
    return content


def _torch(path):
    try:
        import torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path.name} is a PyTorch file and PyTorch is not installed; its CPU build is enough: "
            "pip install -r requirements-torch.txt") from error
    return torch


def _to_numpy(tensor, what):
    if not hasattr(tensor, "detach"):
        raise ValueError(f"{what} is a {type(tensor).__name__}, expected a tensor")
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no bfloat16: move the bits
        return tensor.view(_torch(Path(what)).uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch, array):
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def read_json(path):
    """The content of a JSON file."""
    return json.loads(_existing(path).read_text())
