"""umT5 as a text encoder: weights that the converters wrote."""

import functools
import hashlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.encoders import converted, text
from lightwam_jax.models.t5 import UMT5Encoder

_TEXTS = 16  # prompts encoded at once


class UMT5TextEncoder:
    """The umT5 encoder as a `base.TextEncoder`; its 11 GB are read when a prompt is encoded."""

    def __init__(self, weights, keep=False):
        """Args: weights: converted directory; keep: keep them in memory after a prompt.

        Raises:
          FileNotFoundError, ValueError: nothing there, or another model's weights.
        """
        self._weights, meta, fields = converted.open_converted(
            weights, "text_encoder", "data.text_weights", "t5"
        )
        path = self._weights / "assets" / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; convert again with the tokenizer of the weights: "
                f"{converted.command('t5')}"
            )
        manifest = meta["arrays"]["params"]
        dtype = jnp.dtype(manifest["token_embedding/embedding"][1])
        self._model = converted.make_module(UMT5Encoder, fields, self._weights, dtype=dtype)
        self.dim = self._model.dim
        tokenizer = hashlib.sha256(path.read_bytes()).hexdigest()
        self.id = f"umt5-{converted.checksum(fields, manifest, tokenizer)}"
        self._keep, self._params = keep, None
        self._run = jax.jit(functools.partial(encode_ids, self._model))

    def encode(self, prompts, text_len):
        """See `base.TextEncoder.encode`."""
        ids, mask = self._tokenize([text.clean(prompt) for prompt in prompts], text_len)
        params = self._params or checkpoint.load_params(self._weights).params
        self._params = params if self._keep else None
        run = lambda rows: self._run(params, ids[rows], mask[rows])
        return converted.in_parts(run, np.arange(len(ids)), _TEXTS), mask

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self._weights / "assets" / "tokenizer.json"))

    def _tokenize(self, texts, text_len):
        """Returns (ids int32 [n, L], mask bool [n, L]); warns about a text that is cut."""
        tokenizer = self._tokenizer
        pad, end = (tokenizer.token_to_id(token) for token in ("<pad>", "</s>"))
        tokenizer.enable_truncation(text_len)
        tokenizer.enable_padding(length=text_len, pad_id=pad or 0, pad_token="<pad>")
        found = tokenizer.encode_batch(texts)
        for cut, tokens in zip(texts, found):
            if tokens.overflowing:
                lost = sum(sum(part.attention_mask) - 1 for part in tokens.overflowing)
                warnings.warn(
                    f"prompt {cut!r} is {lost} tokens longer than config.data.text_len={text_len} "
                    "and was cut; raise it or shorten the prompt",
                    stacklevel=3,
                )
        ids = np.array([tokens.ids for tokens in found], np.int32)
        mask = np.array([tokens.attention_mask for tokens in found], np.int32)
        if any(row[length - 1] != end for row, length in zip(ids, mask.sum(axis=1))):
            raise ValueError(
                f"{self._weights}/assets/tokenizer.json does not end a text with </s>; expected "
                "the tokenizer.json of google/umt5-xxl"
            )
        return ids, mask.astype(bool)


def encode_ids(model, params, ids, mask):
    """Token ids [n, L] -> text rows f32 [n, L, dim], zero where the mask [n, L] is false."""
    rows = model.apply({"params": params}, ids, mask).astype(jnp.float32)
    return rows * mask[..., None]
