"""The text cache: the embedding of every prompt of a data set, computed once."""

import hashlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import tqdm

from lightwam_jax.data.caches import resumable
from lightwam_jax.encoders import text as text_lib

_BATCH = 16  # prompts encoded at once, and lost at most where that is interrupted


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
            raise FileNotFoundError(f"{index_path} is missing; make it with: {text_lib.ENCODE}")
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
                f"{text_lib.ENCODE}"
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
                    f"cache; add it with: {text_lib.ENCODE}"
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
      resumable.FullDisk: what is finished is kept.
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
        index = resumable.read_json(os.path.join(directory, "index.json"))
        return index is not None and not differences(index)

    def share(plan):
        batches = [plan["new"][i : i + _BATCH] for i in range(0, len(plan["new"]), _BATCH)]
        for batch in tqdm.tqdm(batches[process_index::process_count], desc="text", unit="batch"):
            if not all(os.path.exists(parts + _part(text)) for text in batch):
                _write_parts(parts, encoder, batch, text_len)
        return all(os.path.exists(parts + _part(text)) for text in plan["new"])

    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with resumable.explaining_full_disk(
        os.path.dirname(directory), lambda: len(prompts) * text_len * encoder.dim * 2
    ):
        return resumable.make(
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
        with resumable.writing(parts + _part(text)) as path, open(path, "wb") as f:
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
    with resumable.writing(os.path.join(fresh, "rows.npy")) as path, open(path, "wb") as f:
        empty = np.zeros((0, plan["dim"]), np.uint16)  # no prompt at all is fine too
        np.save(f, np.concatenate([empty, *rows]))
    index = {key: value for key, value in plan.items() if key != "new"}
    resumable.write_json(
        os.path.join(fresh, "index.json"), {**index, "lengths": [len(part) for part in rows]}
    )
    return fresh
