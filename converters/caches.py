"""The reference's own caches, read as they are: video latents and text embeddings in `.pt` files.

Latents of window i of a split: `{i:08d}.pt`, or shards with an index.pt that says where each lies.
Embeddings: one file per prompt, named by its hash (`umt5.cache_name`).
"""

import re
from pathlib import Path

import numpy as np

from converters import files, umt5

_STORAGE = ("sharded_v1", "episode_packed_v1")  # same files, cut by count or by episode


class LatentFiles:
    """A latent cache of one split; one file is open at a time.

    Attributes:
      name: the directory.
    """

    def __init__(self, directory, shard_of, offset_of, paths):
        self.name, self._directory = str(directory), Path(directory)
        self._shard_of, self._offset_of, self._paths = shard_of, offset_of, paths
        self._open = None, None  # number of a shard, its latents

    def __len__(self):
        return len(self._shard_of)

    def __contains__(self, index):
        return 0 <= index < len(self) and self._shard_of[index] >= 0

    def __getitem__(self, index):
        """Window `index` -> latents [F, H, W, C], of the dtype they were stored in.

        Raises:
          IndexError: beyond the last one.
          KeyError: the cache was never finished: it lacks this one.
          ValueError: the file holds something else.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of the {len(self)} in {self.name}")
        if index not in self:
            raise KeyError(
                f"{self.name} lacks the latents of window {index}; finish it with the reference's "
                "precompute, or make a cache with python -m lightwam_jax.precompute"
            )
        shard, offset = int(self._shard_of[index]), int(self._offset_of[index])
        if self._open[0] != shard:
            self._open = None, None  # the old one's memory first
            self._open = shard, self._load(shard)
        number, latents = self._open[1]
        if not 0 <= offset < len(latents) or (number is not None and number[offset] != index):
            raise ValueError(
                f"{self._paths[shard]} of {self.name} does not hold window {index} at place "
                f"{offset}, as index.pt says: one of them is damaged"
            )
        return np.ascontiguousarray(np.moveaxis(files.to_numpy(latents[offset]), 0, -1))

    def _load(self, shard):
        """(window numbers or None, tensor [n, C, F, H, W]) of one file."""
        path = self._directory / self._paths[shard]
        content = files.read_torch(files.existing(path))
        latents, number = content.get("video_latents"), content.get("sample_indices")
        if hasattr(latents, "ndim") and latents.ndim == 4 and number is None:
            latents = latents[None]
        if not hasattr(latents, "ndim") or latents.ndim != 5:
            raise ValueError(
                f"{path} holds {', '.join(content) or 'nothing'}; expected video_latents "
                "[C, F, H, W], or [n, C, F, H, W] in a shard"
            )
        return (None if number is None else number.tolist()), latents


def read_latent_cache(directory):
    """Opens a latent cache of the reference: len() windows, [i] -> latents [F, H, W, C].

    The length of a cache of single files is its highest number plus one; files that are not there
    are missing windows, as are the -1 of an index.

    Raises:
      FileNotFoundError: no cache there. ValueError: an index of another kind, or a damaged one.
    """
    directory = Path(directory)
    if (directory / "index.pt").is_file():
        return _open_index(directory)
    names = (path.name for path in directory.glob("*.pt"))
    paths = sorted(name for name in names if re.fullmatch(r"\d{8}\.pt", name))
    if not paths:
        raise FileNotFoundError(
            f"{directory} holds no latent cache; expected index.pt and its shards, or 00000000.pt, "
            "00000001.pt, ..."
        )
    numbers = np.array([int(name[:8]) for name in paths])
    shard_of = np.full(numbers[-1] + 1, -1)
    shard_of[numbers] = np.arange(len(paths))
    return LatentFiles(directory, shard_of, np.zeros_like(shard_of), paths)


def _open_index(directory):
    index = files.read_torch(directory / "index.pt")
    if index.get("storage_format", _STORAGE[0]) not in _STORAGE:
        raise ValueError(
            f"{directory}/index.pt is of storage_format {index['storage_format']!r}; expected one "
            f"of {', '.join(_STORAGE)}"
        )
    lacks = {"sample_to_shard", "sample_to_offset", "shard_paths"} - set(index)
    if lacks:
        raise ValueError(
            f"{directory}/index.pt lacks {', '.join(sorted(lacks))}; expected the index of a "
            "latent cache"
        )
    shard_of = files.to_numpy(index["sample_to_shard"]).astype(np.int64)
    offset_of = files.to_numpy(index["sample_to_offset"]).astype(np.int64)
    paths = [str(path) for path in index["shard_paths"]]
    count = index.get("num_samples", len(shard_of))
    if not len(shard_of) == len(offset_of) == count or (shard_of >= len(paths)).any():
        raise ValueError(
            f"{directory}/index.pt is damaged: it speaks of {count} windows, places "
            f"{len(shard_of)} and {len(offset_of)} of them, in shards up to number "
            f"{shard_of.max(initial=-1)} of {len(paths)}"
        )
    outside = [path for path in paths if Path(path).is_absolute() or ".." in Path(path).parts]
    if outside:
        raise ValueError(
            f"{directory}/index.pt names {outside[0]}; expected paths inside of {directory}"
        )
    return LatentFiles(directory, np.where(offset_of < 0, -1, shard_of), offset_of, paths)


class TextFiles:
    """A text cache of the reference.

    Attributes:
      name: the directory. text_len: rows of each embedding, L. encoder: the id in the file names.
    """

    def __init__(self, directory, text_len, encoder):
        self.name, self.text_len, self.encoder = str(directory), text_len, encoder

    def path(self, prompt):
        """Returns the file of a prompt, whether or not it is there."""
        return Path(self.name) / umt5.cache_name(prompt, self.text_len, self.encoder)

    def __contains__(self, prompt):
        return self.path(prompt).is_file()

    def table(self, prompts):
        """Returns (context [n, L, dim] as stored, zero where the mask is false; mask bool [n, L]).

        Raises:
          KeyError: a prompt has no file. ValueError: a file holds something else.
        """
        context, mask = zip(*(self._read(prompt) for prompt in prompts))
        return np.stack(context), np.stack(mask)

    def _read(self, prompt):
        path = self.path(prompt)
        if not path.is_file():
            raise KeyError(
                f"{self.name} has no embedding of {prompt!r} (no {path.name}); other "
                "instructions, or another prompt template, were encoded there"
            )
        content = files.read_torch(path)
        if {"context", "mask"} - set(content):
            raise ValueError(f"{path} holds {', '.join(content)}; expected context and mask")
        context, mask = files.to_numpy(content["context"]), files.to_numpy(content["mask"])
        mask = mask.astype(bool)
        if context.ndim != 2 or mask.shape != (self.text_len,) or len(context) != self.text_len:
            raise ValueError(
                f"{path} holds context {list(context.shape)} and mask {list(mask.shape)}; expected "
                f"[{self.text_len}, dim] and [{self.text_len}]"
            )
        return np.where(mask[:, None], context, np.zeros((), context.dtype)), mask


def read_text_cache(directory, text_len=0):
    """Opens a text cache of the reference; `table(prompts)` -> (context [n, L, dim], mask [n, L]).

    Args:
      text_len: L, where files of several lengths lie together.

    Raises:
      FileNotFoundError: no cache there. ValueError: of several lengths or encoders.
    """
    pattern = re.compile(r"[0-9a-f]{64}\.t5_len(\d+)\.(.+)\.pt")
    found = {
        (int(match[1]), match[2])
        for path in Path(directory).glob("*.pt")
        if (match := pattern.fullmatch(path.name))
    }
    found = {kind for kind in found if text_len in (0, kind[0])}
    if not found:
        length = f" of {text_len} rows" if text_len else ""
        raise FileNotFoundError(
            f"{directory} holds no text embeddings{length}; expected files <sha256 of the "
            "prompt>.t5_len<L>.<encoder>.pt"
        )
    if len(found) > 1:
        kinds = ", ".join(f"t5_len{length}.{encoder}" for length, encoder in sorted(found))
        raise ValueError(
            f"{directory} holds embeddings of several kinds ({kinds}); keep one kind in a folder"
        )
    return TextFiles(directory, *found.pop())
