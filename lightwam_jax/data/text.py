"""Prompts, text encoders, and the cached text embeddings.

The large text encoder never runs during training: precompute embeds each prompt once, and the
policy embeds only prompts that are not in the cache.
"""

import functools
import hashlib
import html
import json
import os
import re
import shutil
import string
import typing

import ftfy
import ml_dtypes
import numpy as np
import tqdm

from lightwam_jax.data import partial

CLEANING = ("whitespace", "lower", "canonicalize")
_ENCODE = "python -m lightwam_jax.precompute --config CONFIG --what text"
_BATCH = 16  # prompts encoded at once, and lost at most where that is interrupted


def prompt(task, template):
    """Returns the text that is encoded for an instruction; `template` holds "{task}" once."""
    if "{task}" not in template:
        raise ValueError(
            f"config.data.prompt_template={template!r} has no '{{task}}': every task would get the "
            "same text; write '{task}' where the instruction belongs"
        )
    return template.replace("{task}", " ".join(task.split()))


def clean(text, mode="whitespace"):
    """Returns `text` as the tokenizer of umT5 gets it: repaired unicode, no HTML, single spaces.

    Args:
      mode: of the Wan tokenizer. The release uses "whitespace"; "lower" also lowers case, and
        "canonicalize" drops punctuation besides.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in CLEANING:
        raise ValueError(f"cleaning mode {mode!r} is unknown; expected one of {CLEANING}")
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    text = re.sub(r"\s+", " ", text).strip()
    return text if mode == "whitespace" else text.lower()


class TextEncoder(typing.Protocol):
    """Attributes: dim, the width of a row; id, which tells encoders (and their weights) apart."""

    dim: int
    id: str

    def encode(self, prompts, text_len):
        """Returns (context f32 [n, L, dim], zero past the text; mask bool [n, L], true on it)."""
        ...


class HashedTextEncoder:
    """Fixed random vectors per word: deterministic, nothing to download or to fit.

    Row i is the vector of word i plus a weaker one of position i (without it "the red cube in the
    blue bowl" and "the blue cube in the red bowl" would be the same set of rows), of
    deviation `_AMPLITUDE`.
    """

    _AMPLITUDE = 4.0  # the demo's backbone, trained from scratch, learned words sooner than at 1
    _POSITION = 0.35  # amplitude of the position vector: it tells order, it does not hide the word

    def __init__(self, dim):
        self.dim = dim
        self.id = f"hashed-v2-{dim}"

    def encode(self, prompts, text_len):
        """Returns (context f32 [n, L, dim], mask bool [n, L]).

        Raises:
          ValueError: a prompt without words, or with more than L.
        """
        context = np.zeros((len(prompts), text_len, self.dim), np.float32)
        mask = np.zeros((len(prompts), text_len), bool)
        for row, text in enumerate(prompts):
            words = re.findall(r"[a-z0-9']+", text.lower())
            if not 0 < len(words) <= text_len:
                raise ValueError(
                    f"prompt {text!r} has {len(words)} words; expected 1 to "
                    f"config.data.text_len={text_len}"
                )
            for i, word in enumerate(words):
                place = _gaussian(f"position {i}", self.dim)
                vector = _gaussian(word, self.dim) + self._POSITION * place
                scale = self._AMPLITUDE / np.sqrt(1 + self._POSITION**2)
                context[row, i] = scale * vector
            mask[row, : len(words)] = True
        return context, mask


@functools.lru_cache(maxsize=4096)
def _gaussian(word, dim):
    """[dim] f32, standard normal, a function of the word alone.

    Box-Muller on a counter of sha256 digests rather than a numpy Generator: numpy may change its
    streams, and a checkpoint must find the same vectors years later.
    """
    digests = b"".join(
        hashlib.sha256(f"{word}/{i}".encode()).digest() for i in range((dim + 3) // 4)
    )
    u = (np.frombuffer(digests, "<u4").astype(np.float64)[: 2 * dim] + 0.5) / 2**32
    return (np.sqrt(-2 * np.log(u[:dim])) * np.cos(2 * np.pi * u[dim:])).astype(np.float32)


class AbsentTextEncoder:
    """Stands in for an encoder whose weights are elsewhere: enough where every prompt is cached."""

    def __init__(self, dim, id, weights):
        self.dim, self.id, self._weights = dim, id, weights

    def encode(self, prompts, text_len):
        """Raises FileNotFoundError, which says how to get the encoder back."""
        raise FileNotFoundError(
            f"prompt {prompts[0]!r} is not in the text cache, and the encoder that made the cache, "
            f"{self.id}, is not at config.data.text_weights={self._weights!r}: put its converted "
            "weights there, or say where they are: Policy.load(..., text_weights=DIR), "
            "--config.data.text_weights=DIR"
        )


def make_encoder(kind, dim, weights="", cache=None):
    """Returns the `TextEncoder` of config.data.text_encoder with rows of config.model.text_dim.

    Args:
      kind, dim: those two keys.
      weights: config.data.text_weights; read when the first prompt is encoded.
      cache: `TextCache` of prompts encoded already; with one, the weights may be absent, and
        leave memory after every new prompt.

    Raises:
      ValueError, FileNotFoundError: unknown kind, or not the weights of such an encoder.
    """
    if kind == "hashed":
        return HashedTextEncoder(dim)
    if kind != "umt5":
        raise ValueError(
            f"config.data.text_encoder={kind!r} has no encoder here; known encoders: "
            "'umt5', 'hashed'"
        )
    if cache is not None and not os.path.isdir(weights):
        return AbsentTextEncoder(dim, cache.encoder_id, weights)
    from lightwam_jax.data import wan  # imports the models, which other encoders do not need

    encoder = wan.UMT5TextEncoder(weights, keep=cache is None)
    if encoder.dim != dim:
        raise ValueError(
            f"config.data.text_weights={weights!r} gives rows of width {encoder.dim}, "
            f"config.model.text_dim is {dim}"
        )
    return encoder


class TextCache:
    """Text embeddings of known prompts, memory-mapped; only the rows of real text are stored.

    Attributes:
      kind, template: config.data.text_encoder and prompt_template it was made with.
      encoder_id, dim: of the encoder.
      text_len: rows it was asked for; None in caches from before that was kept.
      prompts: tuple of str.
    """

    def __init__(self, directory):
        index_path = os.path.join(directory, "index.json")
        if not os.path.exists(index_path):
            raise FileNotFoundError(f"{index_path} is missing; make it with: {_ENCODE}")
        with open(index_path) as f:
            index = json.load(f)
        self.kind, self.template = index["kind"], index["template"]
        self.encoder_id, self.dim, self.prompts = index["id"], index["dim"], tuple(index["prompts"])
        self.text_len = index.get("text_len")
        self._row = {text: i for i, text in enumerate(self.prompts)}
        self._ends = np.cumsum([0, *index["lengths"]], dtype=np.int64)
        rows = np.load(os.path.join(directory, "rows.npy"), mmap_mode="r")
        if rows.shape != (self._ends[-1], self.dim):
            raise ValueError(
                f"{directory}/rows.npy has shape {list(rows.shape)}, index.json says "
                f"[{self._ends[-1]}, {self.dim}]: one is damaged; delete {directory} and run "
                f"{_ENCODE}"
            )
        self._rows = rows.view(ml_dtypes.bfloat16)

    def __contains__(self, text):
        return text in self._row

    def rows(self, text):
        """Returns the rows bf16 [n, dim] of a cached prompt."""
        begin, end = self._ends[self._row[text] :][:2]
        return self._rows[begin:end]

    def table(self, prompts, text_len):
        """Returns (context bf16 [n, L, dim], mask bool [n, L]) of cached prompts.

        Raises:
          KeyError: a prompt is not cached.
          ValueError: a prompt is longer than `text_len` rows.
        """
        context = np.zeros((len(prompts), text_len, self.dim), ml_dtypes.bfloat16)
        mask = np.zeros((len(prompts), text_len), bool)
        for i, text in enumerate(prompts):
            if text not in self._row:
                raise KeyError(
                    f"prompt {text!r} is not among the {len(self.prompts)} of the text "
                    f"cache; add it with: {_ENCODE}"
                )
            rows = self.rows(text)
            if len(rows) > text_len:
                raise ValueError(
                    f"prompt {text!r} has {len(rows)} rows, config.data.text_len is "
                    f"{text_len}; raise it"
                )
            context[i, : len(rows)], mask[i, : len(rows)] = rows, True
        return context, mask


def write_cache(
    directory, encoder, prompts, text_len, kind, template, process_index=0, process_count=1
):
    """Makes the `TextCache` of `prompts` (bfloat16, ragged) in `directory`.

    What a cache there has of the same encoder, length and template is taken over. The others are
    encoded in batches; an interruption costs a batch at most, and the same call continues.

    Args:
      directory: see above; `directory`.partial holds what is unfinished.
      encoder, text_len, kind, template: see `TextCache`; kind and template name the encoder.
      prompts: the texts, in the order of the cache.
      process_index: process i of process_count encodes batches i, i + process_count, ...
      process_count: how many make it together.

    Returns:
      Whether it is finished: False where other processes are not done.

    Raises:
      partial.FullDisk: what is finished is kept.
    """
    directory = os.path.abspath(directory)
    parts = os.path.join(directory + ".partial", "")
    wanted = {
        "kind": kind,
        "template": template,
        "id": encoder.id,
        "dim": encoder.dim,
        "text_len": text_len,
        "prompts": list(prompts),
    }

    def plan():
        have = TextCache(directory) if os.path.exists(directory) else None
        same = have is not None and (have.encoder_id, have.text_len, have.template) == (
            encoder.id,
            text_len,
            template,
        )
        return {**wanted, "new": [text for text in prompts if not (same and text in have)]}

    def differences(have):
        return ", ".join(key for key, value in wanted.items() if have.get(key) != value)

    def done():
        index = partial.read_json(os.path.join(directory, "index.json"))
        return index is not None and not differences(index)

    def share(plan):
        batches = [plan["new"][i : i + _BATCH] for i in range(0, len(plan["new"]), _BATCH)]
        for batch in tqdm.tqdm(batches[process_index::process_count], desc="text", unit="batch"):
            if not all(os.path.exists(parts + _part(text)) for text in batch):
                _write_parts(parts, encoder, batch, text_len)
        return all(os.path.exists(parts + _part(text)) for text in plan["new"])

    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with partial.explaining_full_disk(
        os.path.dirname(directory), lambda: len(prompts) * text_len * encoder.dim * 2
    ):
        return partial.make(
            directory,
            "plan.json",
            plan,
            differences,
            done,
            share,
            lambda plan: _join(parts, directory, plan),
            process_index,
        )


def _part(text):
    return hashlib.sha256(text.encode()).hexdigest() + ".npy"


def _write_parts(parts, encoder, batch, text_len):
    """A file of real rows [n, dim] for each prompt; whole batches, so that sizes do not vary."""
    context, mask = encoder.encode(batch, text_len)
    for text, rows, real in zip(batch, context.astype(ml_dtypes.bfloat16), mask):
        with partial.writing(parts + _part(text)) as path, open(path, "wb") as f:
            np.save(f, rows[real].view(np.uint16))


def _join(parts, directory, plan):
    """Makes a `TextCache` of parts and of the cache that `directory` holds; returns where it is."""
    fresh, new = directory + ".new", set(plan["new"])
    shutil.rmtree(fresh, ignore_errors=True)
    os.makedirs(fresh)
    have = TextCache(directory) if new != set(plan["prompts"]) else None
    rows = [
        np.load(os.path.join(parts, _part(text)), allow_pickle=False)
        if text in new
        else have.rows(text).view(np.uint16)
        for text in plan["prompts"]
    ]
    with partial.writing(os.path.join(fresh, "rows.npy")) as path, open(path, "wb") as f:
        empty = np.zeros((0, plan["dim"]), np.uint16)  # no prompt at all is fine too
        np.save(f, np.concatenate([empty, *rows]))
    index = {key: value for key, value in plan.items() if key != "new"}
    partial.write_json(
        os.path.join(fresh, "index.json"), {**index, "lengths": [len(part) for part in rows]}
    )
    return fresh


class CachedTextEncoder:
    """A `TextEncoder` that looks into a `TextCache` and asks `encoder` only for new prompts."""

    def __init__(self, encoder, cache):
        if cache.encoder_id != encoder.id:
            raise ValueError(
                f"the text cache was made by {cache.encoder_id}, the encoder is "
                f"{encoder.id}; run: {_ENCODE}"
            )
        self.dim, self.id = encoder.dim, encoder.id
        self._encoder, self._cache = encoder, cache

    def encode(self, prompts, text_len):
        """As `TextEncoder.encode`, rounded to bfloat16 for known and new prompts alike."""
        context = np.zeros((len(prompts), text_len, self.dim), np.float32)
        mask = np.zeros((len(prompts), text_len), bool)
        new = np.array([text not in self._cache for text in prompts], bool)
        for rows, encode in ((~new, self._cache.table), (new, self._encoder.encode)):
            if rows.any():
                encoded, mask[rows] = encode([prompts[i] for i in np.flatnonzero(rows)], text_len)
                context[rows] = encoded.astype(ml_dtypes.bfloat16)
        return context, mask
