"""From what `--in` says to the weight file: a file, a folder of Wan or diffusers, or `hf:`."""

import fnmatch
import re
from pathlib import Path

from converters import foreign, rules
from lightwam_jax import folders

# Where each kind's weights lie in a repository of Wan, of diffusers or of Light-WAM, first first.
_DIT = ("diffusion_pytorch_model*.safetensors.index.json", "diffusion_pytorch_model*.safetensors")
_DIT += ("diffusion_pytorch_model*.bin.index.json", "diffusion_pytorch_model*.bin")
_TEXT = ("model.safetensors.index.json", "model*.safetensors")
_TEXT += ("pytorch_model.bin.index.json", "pytorch_model*.bin")
PLACES = {
    "dit": (*_DIT, *(f"transformer/{place}" for place in _DIT)),
    "vae": (
        "Wan2.*_VAE.pth",
        "diffusion_pytorch_model*.safetensors",
        "vae/diffusion_pytorch_model*.safetensors",
    ),
    "t5": ("models_t5*.pth", *_TEXT, *(f"text_encoder/{place}" for place in _TEXT)),
    "lightwam": ("*.pt",),
}
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer/tokenizer.json",
    "../tokenizer/tokenizer.json",
    "google/umt5-xxl/tokenizer.json",
)
_BESIDE = ("*tokenizer.json", "*dataset_stats.json")  # small files that go with the weights
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?::(?P<file>.+))?")


def locate(place, kind):
    """Returns (the weight file or index, revision of the hub or None).

    Args:
      place: a file; a folder that holds one; or `hf:owner/name[@revision][:file]`.
      kind: of `PLACES`: which model's weights are wanted from a folder.

    Raises:
      FileNotFoundError: nothing there. ValueError: a folder with several candidates.
      ConnectionError: the hub cannot be reached; says what to place where.
    """
    revision = None
    if str(place).startswith("hf:"):
        place, revision = _download(str(place), kind)
    place = Path(place)
    if not place.exists():
        raise FileNotFoundError(
            f"{place}: no such file or folder; give the path of one that is here, or "
            "hf:OWNER/NAME, which is downloaded (docs/weights.md)"
        )
    if place.is_file():
        return place, revision
    names = [path.relative_to(place).as_posix() for path in folders.files_below(place)]
    return place / _choose(names, kind, place), revision


def _choose(names, kind, where):
    """The weight file (or index) of a kind among the files of a folder."""
    for pattern in PLACES[kind]:
        found = sorted(fnmatch.filter(names, pattern))
        if len(found) > 1:
            raise ValueError(
                f"{where} holds {len(found)} files that could be meant: "
                f"{rules.some_of(found)}; name one of them (hf:owner/name:FILE, or "
                "its path)"
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{where} holds no {kind} weights; expected one of {', '.join(PLACES[kind])} in it"
        f"{foreign.hint(names, where)}"
    )


def tokenizer(weights):
    """Returns the tokenizer.json that lies with the weights of a text encoder, or None."""
    found = (weights.parent / place for place in TOKENIZERS)
    return next((path for path in found if path.is_file()), None)


def _download(place, kind):
    """Brings the files of one kind of a hub repository here: (local path, commit)."""
    match = _HUB.fullmatch(place)
    if not match:
        raise ValueError(
            f"{place}: expected hf:owner/name, hf:owner/name@revision or hf:owner/name:path/of/file"
        )
    repo, wanted, file = match["repo"], match["revision"], match["file"]
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{place} needs huggingface_hub: pip install huggingface_hub, or {_by_hand(repo, kind)}"
        ) from error
    try:
        info = huggingface_hub.HfApi().repo_info(repo, revision=wanted)
        names = [sibling.rfilename for sibling in info.siblings]
        file = file or _choose(names, kind, place)
        needed = [file.replace(".index.json", "*"), *_BESIDE]
        folder = huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=needed)
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{place} could not be downloaded (no connection); {_by_hand(repo, kind)}"
        ) from error
    except FileNotFoundError:  # of _choose
        raise
    # Its first base is the error of the hub's HTTP library, also of a host that is not found.
    except (OSError, errors.HfHubHTTPError.__bases__[0]) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"{place} could not be downloaded ({reason}); {_by_hand(repo, kind)}"
        ) from error
    return Path(folder) / file, info.sha


def _by_hand(repo, kind):
    return (
        f"without a network: get {' or '.join(PLACES[kind][:2])} of "
        f"https://huggingface.co/{repo} elsewhere, place it here and give its path as --in"
    )
