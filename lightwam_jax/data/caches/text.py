"""The text cache: the embedding of every prompt of a dataset, computed once."""

import hashlib
import os
import shutil
import tokenize

import ml_dtypes
import numpy as np
import tqdm

from lightwam_jax import atomic, encoders
from lightwam_jax.data.caches import resumable

_REDO = encoders.text.ENCODE
# What index.json has to hold.
_KINDS = {"kind": str, "template": str, "id": str, "dim": int, "prompts": [str], "lengths": [int]}
_IN_MEMORY = 1 << 30  # bytes of texts as the model takes them; more stay in the file
_BATCH = 16  # prompts encoded at once, and lost at most where that is interrupted


class TextCache:
    """Text embeddings of known prompts, memory-mapped; only the rows of real text are stored.

    Attributes:
      kind, template: config.data.text_encoder and prompt_template it was made with.
      encoder_id, dim: of the encoder.
      text_len: rows it was asked for; None in caches from before that was kept.
      prompts: tuple of str.
      place: index.json, for messages.
    """

    def __init__(self, directory):
        index_path = os.path.join(directory, "index.json")
        redo = f"delete {directory} and run {_REDO}"
        index = atomic.read_json(index_path, _KINDS, redo)
        if index is None:
            raise FileNotFoundError(f"{index_path} is missing; make it with: {_REDO}")
        self.kind, self.template = index["kind"], index["template"]
        self.encoder_id, self.dim, self.prompts = index["id"], index["dim"], tuple(index["prompts"])
        self.text_len, self.place = index.get("text_len"), index_path
        self._row = {text: i for i, text in enumerate(self.prompts)}
        lengths = index["lengths"]
        if len(lengths) != len(self._row) or not all(0 <= n < 2**31 for n in lengths):
            raise ValueError(
                f"{index_path} has {len(lengths)} lengths for {len(self._row)} prompts; expected "
                f"one of 0 or more for each; delete {directory} and run {_REDO}"
            )
        self._ends = np.cumsum([0, *lengths], dtype=np.int64)
        path = os.path.join(directory, "rows.npy")
        try:
            rows = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, tokenize.TokenError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete {directory} and run {_REDO}"
            ) from error
        if rows.shape != (self._ends[-1], self.dim) or rows.dtype != np.uint16:
            raise ValueError(
                f"{path} has shape {list(rows.shape)} of {rows.dtype}, index.json says "
                f"[{self._ends[-1]}, {self.dim}] of uint16: one is damaged; delete {directory} and "
                f"run {_REDO}"
            )
        if os.path.getsize(path) != rows.offset + rows.nbytes:
            raise ValueError(f"{path} is damaged: its header is not of its size; {redo}")
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
          ValueError: a prompt is not cached, or is longer than `text_len` rows.
        """
        context = np.zeros((len(prompts), text_len, self.dim), ml_dtypes.bfloat16)
        mask = np.zeros((len(prompts), text_len), bool)
        self._check(prompts, text_len)
        for i, text in enumerate(prompts):
            rows = self.rows(text)
            context[i, : len(rows)], mask[i, : len(rows)] = rows, True
        return context, mask

    def contexts(self, prompts, text_len):
        """Returns a sequence: [number of a prompt] -> (context bf16 [L, dim], mask bool [L]).

        Many prompts stay in the file, and one is read when it is asked for: 50,000 instructions of
        128 rows are 52 GB.

        Raises:
          ValueError: see `table`.
        """
        self._check(prompts, text_len)
        if len(prompts) * text_len * self.dim * 2 > _IN_MEMORY:
            return _Contexts(self, tuple(prompts), text_len)
        return list(zip(*self.table(prompts, text_len)))

    def __reduce__(self):
        # Else a copy for another process would hold the whole of the file.
        return TextCache, (os.path.dirname(self.place),)

    def _check(self, prompts, text_len):
        for text in prompts:
            if text not in self._row:
                raise ValueError(
                    f"prompt {text!r} is not among the {len(self.prompts)} of the text "
                    f"cache; add it with: {encoders.text.ENCODE}"
                )
            if (rows := len(self.rows(text))) > text_len:
                raise ValueError(
                    f"prompt {text!r} has {rows} rows, config.data.text_len is {text_len}; raise it"
                )


class _Contexts:
    """The texts of a cache, read one by one; see `TextCache.contexts`."""

    def __init__(self, cache, prompts, text_len):
        self._cache, self._prompts, self._text_len = cache, prompts, text_len

    def __len__(self):
        return len(self._prompts)

    def __getitem__(self, number):
        context, mask = self._cache.table([self._prompts[number]], self._text_len)
        return context[0], mask[0]


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
    wanted = {
        "kind": kind,
        "template": template,
        "id": encoder.id,
        "dim": encoder.dim,
        "text_len": text_len,
        "prompts": list(prompts),
    }
    return _TextBuild(directory, encoder, wanted, process_index, process_count).run()


class _TextBuild(resumable.Build):
    """Makes a text cache: a file of rows for every prompt; `wanted` becomes index.json."""

    plan_file, finished_file = "plan.json", "index.json"

    def __init__(self, directory, encoder, wanted, process_index, process_count):
        super().__init__(os.path.abspath(directory), process_index, process_count)
        self.encoder, self.wanted = encoder, wanted

    def plan(self):
        """Returns `wanted`, and as "new" the prompts that the cache there does not hold."""
        want, known = self.wanted, ()
        if os.path.exists(self.directory):
            have = TextCache(self.directory)
            form = have.encoder_id, have.text_len, have.template
            known = have if form == (want["id"], want["text_len"], want["template"]) else ()
        return {**want, "new": [text for text in want["prompts"] if text not in known]}

    def differences(self, have):
        return ", ".join(key for key, value in self.wanted.items() if have.get(key) != value)

    def missing_bytes(self):
        return len(self.wanted["prompts"]) * self.wanted["text_len"] * self.wanted["dim"] * 2

    def make_share(self, plan):
        new = plan["new"]
        batches = [new[i : i + _BATCH] for i in range(0, len(new), _BATCH)]
        for batch in tqdm.tqdm(batches[self.index :: self.count], desc="text", unit="batch"):
            if not all(os.path.exists(self._part(text)) for text in batch):
                self._encode(batch)
        return all(os.path.exists(self._part(text)) for text in new)

    def assemble(self, plan):
        """Joins the parts and what the old cache holds; returns the new directory."""
        fresh, new = self.directory + ".new", set(plan["new"])
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)
        have = TextCache(self.directory) if new != set(plan["prompts"]) else None
        rows = [
            np.load(self._part(text), allow_pickle=False)
            if text in new
            else have.rows(text).view(np.uint16)
            for text in plan["prompts"]
        ]
        with atomic.writing(os.path.join(fresh, "rows.npy")) as path, open(path, "wb") as f:
            empty = np.zeros((0, plan["dim"]), np.uint16)  # no prompt at all is fine too
            np.save(f, np.concatenate([empty, *rows]))
        index = {**self.wanted, "lengths": [len(part) for part in rows]}
        atomic.write_json(os.path.join(fresh, "index.json"), index)
        return fresh

    def _encode(self, batch):
        """Writes the real rows [n, dim] of each prompt. Whole batches: sizes do not vary then."""
        context, mask = self.encoder.encode(batch, self.wanted["text_len"])
        for text, rows, real in zip(batch, context.astype(ml_dtypes.bfloat16), mask):
            with atomic.writing(self._part(text)) as path, open(path, "wb") as f:
                np.save(f, rows[real].view(np.uint16))

    def _part(self, text):
        name = hashlib.sha256(text.encode()).hexdigest() + ".npy"
        return os.path.join(self.growing, name)
