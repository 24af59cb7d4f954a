"""Prompts, the text encoders that need no weights, and the one that asks a cache first."""

import functools
import hashlib
import html
import re
import string

import ftfy
import ml_dtypes
import numpy as np

CLEANING = ("whitespace", "lower", "canonicalize")
ENCODE = "python -m lightwam_jax.precompute --config CONFIG --what text"


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
      mode: of the Wan tokenizer. The release uses "whitespace"; "lower" also lowers case;
        "canonicalize" also drops punctuation.

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


class HashedTextEncoder:
    """Fixed random vectors per word: deterministic, nothing to download or to fit.

    Row i, of deviation `_AMPLITUDE`, is the vector of word i plus a weaker one of position i.
    Without positions, "the red cube in the blue bowl" and "the blue cube in the red bowl" would be
    the same set of rows. An empty prompt has no rows.
    """

    _AMPLITUDE = 4.0  # the demo's backbone, trained from scratch, learned words sooner than at 1
    _POSITION = 0.35  # amplitude of the position vector: it tells order, it does not hide the word

    def __init__(self, dim):
        self.dim = dim
        self.id = f"hashed-v2-{dim}"

    def encode(self, prompts, text_len):
        """Returns (context f32 [n, L, dim], mask bool [n, L]).

        Raises:
          ValueError: a prompt that is not empty and has no words, or more than L.
        """
        context = np.zeros((len(prompts), text_len, self.dim), np.float32)
        mask = np.zeros((len(prompts), text_len), bool)
        for row, text in enumerate(prompts):
            words = re.findall(r"[a-z0-9']+", text.lower())
            if (text.strip() and not words) or len(words) > text_len:
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
    counter = (f"{word}/{i}".encode() for i in range((dim + 3) // 4))
    digests = b"".join(hashlib.sha256(text).digest() for text in counter)
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


class CachedTextEncoder:
    """A `TextEncoder` that looks into a `TextCache` and asks `encoder` only for new prompts.

    Attributes:
      prompts: texts of the cache.
    """

    def __init__(self, encoder, cache):
        if cache.encoder_id != encoder.id:
            raise ValueError(
                f"the text cache ({cache.place}) was made by {cache.encoder_id}, the encoder is "
                f"{encoder.id}; run: {ENCODE}"
            )
        self.dim, self.id = encoder.dim, encoder.id
        self._encoder, self._cache, self.prompts = encoder, cache, cache.prompts

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
