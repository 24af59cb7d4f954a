"""Files of other programs that hold no weights we can read: what each is, and what to do with it.

Nothing is unpickled here: `unsafe_names` reads the opcodes of a pickle, it runs none.
"""

import itertools
import json
import pickletools
import re
import zipfile
from pathlib import Path

# How a file begins, what it then is, and what to do.
_BEGINS = (
    (b"GGUF", "a GGUF file (quantised for llama.cpp or ComfyUI): its blocks do not give back the "
     "weights; get the .safetensors or .pth in bfloat16 that it was made from"),
    (b"\x89HDF", "an HDF5 file (Keras?); get the .safetensors or .pth of the model"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file it stands for: run "
     "`git lfs pull` where it was cloned, or download the file itself"),
    (b"<", "a web page (a download that failed?); download the file again"),
    (b"\x1f\x8b", "packed with gzip; unpack it first"),
    (b"Rar!", "a packed archive; unpack it first"),
    (b"7z\xbc\xaf", "a packed archive; unpack it first"),
)  # fmt: skip
# Names of files that cannot be read whatever they begin with.
_ENDS = {
    ".gguf": _BEGINS[0][1],
    ".ggml": _BEGINS[0][1],
    ".onnx": "an ONNX graph; get the .safetensors or .pth that it was exported from",
    ".msgpack": "a Flax msgpack file; get the .safetensors or .pth of the model",
    ".engine": "a TensorRT engine; get the .safetensors or .pth that it was built from",
    ".tflite": "a TensorFlow Lite model; get the .safetensors or .pth of the model",
}
_MERGE = (
    "merge them into that model first, in the program that trained them (PEFT: "
    "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT), diffusers: "
    "pipe.fuse_lora()), and convert what it saves"
)
_ADAPTER = re.compile(  # as PEFT and diffusers, kohya's scripts, and LyCORIS name them
    r"(^|[._])lora_(A|B|embedding_A|embedding_B|magnitude_vector|down|up)([._]|$)"
    r"|^lora_(unet|te\d?|transformer)_|\.(lokr|hada|oft)_|(^|\.)base_layer\."
)


def refuse(path):
    """Raises ValueError, naming what it is and what to do, for a file of no format that we read.

    Files that only look odd pass: their readers judge them.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if not size:
        raise ValueError(f"{path} is empty (0 bytes): copy or download it again")
    if path.suffix in _ENDS:
        raise ValueError(f"{path} is {_ENDS[path.suffix]}")
    for begin, what in _BEGINS:
        if head.startswith(begin):
            raise ValueError(f"{path} is {what}")
    if path.name == "adapter_config.json":
        raise ValueError(f"{path} is the config of {_adapters(path.parent)}")
    if path.suffix in (".json", ".yaml", ".yml", ".txt", ".md"):
        raise ValueError(
            f"{path} holds text and no weights; expected a .safetensors, .pt, .pth or .bin file, "
            "an index of shards (.index.json), or a folder of them"
        )
    if head.startswith(b"PK"):
        _refuse_zip(path)


def _refuse_zip(path):
    """Of the zip files only those that torch.save wrote are read."""
    if not zipfile.is_zipfile(path):
        return  # truncated: its reader says so
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} is a TorchScript program (torch.jit.save), not a file of tensors; load it "
            "where it was made and write torch.save(program.state_dict(), FILE)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        kind = "arrays of numpy (.npz)" if any(n.endswith(".npy") for n in names) else "a zip file"
        raise ValueError(
            f"{path} is {kind}, not a file of torch.save; expected .safetensors, .pt, .pth or .bin"
        )


def is_safetensors(path):
    """Whether a file begins like a .safetensors file, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20


def refuse_adapters(keys, name, folder=None):
    """Raises ValueError for tensors of LoRA adapters that another program saved.

    Args:
      keys: of the file. name: of the file. folder: where adapter_config.json may lie.
    """
    found = [key for key in keys if _ADAPTER.search(key)]
    if not found:
        return
    if any("base_layer." in key for key in found):
        raise ValueError(
            f"{name} holds a model with LoRA adapters that are not merged (such as {found[0]}): "
            f"{_MERGE}"
        )
    others = len(keys) - len(found)
    beside = f", beside {others} other tensors" if others else ""
    raise ValueError(
        f"{name} holds {len(found)} tensors such as {found[0]}{beside}: these are "
        f"{_adapters(folder or Path())}"
    )


def _adapters(folder):
    """What adapters are, with the base model that their config names."""
    base = ""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = base.get("base_model_name_or_path") or ""
    except (OSError, ValueError, AttributeError):
        pass  # nothing more is known then
    of = f" of {base}" if base else ""
    return f"LoRA adapters alone (PEFT), without the weights{of} that they adapt: {_MERGE}"


def hint(names, folder):
    """What a folder without weights holds instead, for the end of a message; "" if nothing known.

    Args:
      names: relative paths of its files.
    """
    if "adapter_config.json" in names:
        return f"; it holds {_adapters(Path(folder))}"
    for name in sorted(names):
        if (end := Path(name).suffix) in _ENDS:
            return f"; {name} in it is {_ENDS[end]}"
    return ""


def shard_of(path):
    """The text "shard 2 of 6" for a file that is named so and is one of several, else ""."""
    match = re.search(r"-(\d{4,6})-of-(\d{4,6})\.\w+$", path.name)
    if not match or int(match[2]) < 2:
        return ""
    return f"shard {int(match[1])} of {int(match[2])}"


def why_refused(path, error):
    """One sentence on a file that torch.load(weights_only=True) refused.

    PyTorch's own text is not repeated: it advises to load the file without that protection.
    """
    if names := unsafe_names(path):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return (
            f"{path} holds objects beside its tensors, and making them could run code: "
            f"{', '.join(names[:4])}{more}; refused. In the program that wrote it, save the "
            "tensors alone: torch.save(model.state_dict(), FILE)"
        )
    first = re.split(r"(?<=[.:])\s|\n", str(error).strip() or type(error).__name__)[0]
    if re.search(r"weights_only|safe_globals|re-running|unsafe", first, re.IGNORECASE):
        first = type(error).__name__
    return (
        f"{path} is truncated, or no file of torch.save: {first.rstrip('.:')}; compare its size "
        "with the original and copy it again"
    )


def unsafe_names(path):
    """Names that a pickle asks for and that tensors do not need, such as argparse.Namespace."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                place = next(n for n in packed.namelist() if n.endswith("data.pkl"))
                return _foreign_names([packed.read(place)])
        with open(path, "rb") as file:  # each pickle is read where the one before it ends
            return _foreign_names([file] * _OLD_PICKLES)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, UnicodeDecodeError):
        return []


def _foreign_names(pickles):
    """Globals in the opcodes of pickles, but for those that rebuild tensors; in their order."""
    found, strings = {}, []
    try:
        for code, value, _ in itertools.chain.from_iterable(map(pickletools.genops, pickles)):
            if "UNICODE" in code.name or "STRING" in code.name:
                strings.append(str(value))
            elif code.name in ("GLOBAL", "INST"):
                found[str(value).replace(" ", ".")] = True
            elif code.name == "STACK_GLOBAL" and len(strings) > 1:
                found[".".join(strings[-2:])] = True
    except Exception:  # a stream that ends or makes no sense: the names up to there
        pass
    return [name for name in found if not _OF_TENSORS.fullmatch(name)]


# In files of the older format: magic number, version, system, content, keys of the tensors.
_OLD_PICKLES = 5
_OF_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild\w*|torch\.(\w+Storage|storage\.\w+)"
    r"|torch\.(Size|Tensor|device|dtype|nn\.parameter\.Parameter|serialization\.\w+)"
    r"|torch\.(float|bfloat|int|uint|complex)\w+|torch\.(bool|half|double|long)"
    r"|collections\.(OrderedDict|defaultdict|Counter)|_codecs\.encode|__builtin__\.(set|dict|list)"
    r"|builtins\.(set|dict|list|bytearray|complex)"
)
