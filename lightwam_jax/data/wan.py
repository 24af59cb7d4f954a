"""The pretrained Wan parts as data: the video VAEs behind `Codec`, umT5 behind `TextEncoder`.

Both read directories that the converters wrote (`checkpoint.save_params`), whose meta item holds
the fields of the module: {"config": {"vae": {"version": "wan21", "dim": 96, ...}}} or
{"config": {"text_encoder": {"vocab": 256384, ...}}}.
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lightwam_jax import checkpoint, storage
from lightwam_jax.data import codec as codec_lib
from lightwam_jax.data import text as text_lib
from lightwam_jax.data import transforms
from lightwam_jax.models.t5 import UMT5Encoder
from lightwam_jax.models.vae import WanVAE
from lightwam_jax.models.vae22 import Wan22VAE

VAES = {"wan21": WanVAE, "wan22": Wan22VAE}  # by codec kind
HALVES = {"encode": ("encoder", "conv1"), "decode": ("decoder", "conv2")}
_ENCODING_BYTES = 4 << 30  # of activations; more clips than fit go one part after the other
_TEXTS = 16  # prompts encoded at once


class WanCodec:
    """A Wan VAE as a `Codec`. The weights are read when they are first needed.

    Only the encoder half stays for encoding, only the decoder half for decoding. Weights and
    activations are of `dtype`; a cache and the policies that learnt from it share it, since the id
    names it.

    Attributes:
      kind: of `VAES`. latent_channels, stride, id, arrays: see `Codec`; arrays is the encoder half.
    """

    def __init__(self, weights, kind, dtype):
        """Args: weights: converted directory; kind: the VAE expected there; dtype: name.

        Raises:
          FileNotFoundError, ValueError: nothing there, or another model's weights.
        """
        self._weights, meta, fields = _converted(weights, "vae", "data.codec_weights", "vae")
        version = fields.pop("version", "absent")
        if version != kind:
            raise ValueError(
                f"config.data.codec_weights={str(weights)!r} holds VAE {version!r}, "
                f"config.data.codec is {kind!r}: change one of them"
            )
        self.kind, self.dtype = kind, dtype
        self.model = _module(VAES[kind], fields, self._weights, dtype=jnp.dtype(dtype))
        self.latent_channels, self.stride = self.model.z_dim, codec_lib.STRIDES[kind]
        encoder = {
            path: account
            for path, account in meta["arrays"]["params"].items()
            if path.split("/")[0] in HALVES["encode"]
        }
        self.id = f"{kind}-{dtype}-{_digest(fields, encoder)}"
        self._encode, self._decode = jax.jit(self.encode_with), jax.jit(self.decode_with)

    @classmethod
    def load(cls, directory, description):
        """Returns the codec that `save` wrote; description: its codec.json."""
        codec = cls(os.path.join(directory, "weights"), description["kind"], description["dtype"])
        if codec.id != description["id"]:
            raise ValueError(
                f"{directory}/weights are {codec.id}, codec.json says "
                f"{description['id']}: one of them was replaced; restore the "
                "directory, or run python -m lightwam_jax.precompute --config CONFIG "
                "--what latents"
            )
        return codec

    @functools.cached_property
    def arrays(self):
        return self._half("encode")

    @functools.cached_property
    def _decoder(self):
        return self._half("decode")

    def _half(self, name):
        whole = checkpoint.load_params(self._weights).params
        return half(whole, name, self.dtype)

    def encode_with(self, arrays, video):
        """Canvases [B, T, H, W, 3] -> f32 [B, F, H/stride, W/stride, C]; a pure function."""
        pixels = (transforms.to_float(video) - 0.5) / 0.5
        with jax.default_matmul_precision("highest"):  # where dtype is float32, it is meant
            return self.model.apply({"params": arrays}, pixels, method="encode")

    def decode_with(self, arrays, latents):
        """[B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3]; a pure function."""
        with jax.default_matmul_precision("highest"):
            video = self.model.apply({"params": arrays}, latents, method="decode")
        return ((video + 1) * 127.5).astype(jnp.uint8)  # truncated, as the reference does

    def encode(self, video):
        """Canvases [B, T, H, W, 3] -> latents f32 [B, 1 + (T-1)//4, H/stride, W/stride, C].

        Raises:
          ValueError: see `codec.check_video`.
        """
        codec_lib.check_video(video, self.stride)
        return _in_parts(
            functools.partial(self._encode, self.arrays), video, self._rows(video.shape[1:4])
        )

    def decode(self, latents):
        """Latents [B, F, h, w, C] -> uint8 [B, 4F - 3, h * stride, w * stride, 3]."""
        latents = np.asarray(latents)
        if latents.ndim != 5 or latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; expected "
                f"[B, F, h, w, {self.latent_channels}]"
            )
        frames, height, width = latents.shape[1:4]
        shape = (4 * frames - 3, height * self.stride, width * self.stride)
        return _in_parts(functools.partial(self._decode, self._decoder), latents, self._rows(shape))

    def _rows(self, shape):
        """Clips of `shape` [T, H, W] whose activations fit: a power of two."""
        widest = max(self.model.dim, getattr(self.model, "decoder_dim", 0))
        pixels = np.prod(shape) / (self.stride // 8) ** 2  # 2.2 first folds pixels into channels
        rows = _ENCODING_BYTES / (pixels * widest * 16)  # four float32 copies live at once
        return 1 << max(0, int(np.log2(max(rows, 1))))

    def save(self, directory):
        """Writes codec.json and weights/ (large files hard-linked) into `directory`."""
        os.makedirs(directory, exist_ok=True)
        storage.copy_files(self._weights, os.path.join(directory, "weights"), storage.LARGE)
        with open(os.path.join(directory, "codec.json"), "w") as f:
            json.dump(
                {
                    "kind": self.kind,
                    "id": self.id,
                    "dtype": self.dtype,
                    "latent_channels": self.latent_channels,
                },
                f,
                indent=2,
            )


def half(params, name, dtype):
    """The part of a VAE's parameters that "encode" or "decode" needs, in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), {key: params[key] for key in HALVES[name]})


class UMT5TextEncoder:
    """The umT5 encoder as a `TextEncoder`; 11 GB at full size, read when a prompt is encoded.

    Attributes: dim, id: see `TextEncoder`.
    """

    def __init__(self, weights, keep=False):
        """Args: weights: converted directory; keep: keep them in memory after a prompt.

        Raises:
          FileNotFoundError, ValueError: nothing there, or another model's weights.
        """
        self._weights, meta, fields = _converted(weights, "text_encoder", "data.text_weights", "t5")
        path = self._weights / "assets" / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; convert again with the tokenizer of the "
                f"weights: {_command('t5')}"
            )
        account = meta["arrays"]["params"]
        dtype = account["token_embedding/embedding"][1]
        self._model = _module(UMT5Encoder, fields, self._weights, dtype=jnp.dtype(dtype))
        self.dim = self._model.dim
        tokenizer = hashlib.sha256(path.read_bytes()).hexdigest()
        self.id = f"umt5-{_digest(fields, account, tokenizer)}"
        self._keep, self._params = keep, None
        self._run = jax.jit(functools.partial(encode_ids, self._model))

    def encode(self, prompts, text_len):
        """Returns (context f32 [n, L, dim], zero past the text; mask bool [n, L])."""
        ids, mask = self._tokenize([text_lib.clean(prompt) for prompt in prompts], text_len)
        params = self._params or checkpoint.load_params(self._weights).params
        self._params = params if self._keep else None
        rows = np.arange(len(ids))
        return _in_parts(lambda i: self._run(params, ids[i], mask[i]), rows, _TEXTS), mask

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self._weights / "assets" / "tokenizer.json"))

    def _tokenize(self, texts, text_len):
        """Returns (ids int32 [n, L], mask bool [n, L]); a text that is cut is warned about."""
        tokenizer = self._tokenizer
        pad, end = (tokenizer.token_to_id(token) for token in ("<pad>", "</s>"))
        tokenizer.enable_truncation(text_len)
        tokenizer.enable_padding(length=text_len, pad_id=pad or 0, pad_token="<pad>")
        found = tokenizer.encode_batch(texts)
        for text, tokens in zip(texts, found):
            if tokens.overflowing:
                lost = sum(sum(part.attention_mask) - 1 for part in tokens.overflowing)
                warnings.warn(
                    f"prompt {text!r} is {lost} tokens longer than config.data.text_len="
                    f"{text_len} and was cut; raise it or shorten the prompt",
                    stacklevel=3,
                )
        ids, mask = (
            np.array([getattr(tokens, name) for tokens in found], np.int32)
            for name in ("ids", "attention_mask")
        )
        if any(row[length - 1] != end for row, length in zip(ids, mask.sum(axis=1))):
            raise ValueError(
                f"{self._weights}/assets/tokenizer.json does not end a text with "
                "</s>; expected the tokenizer.json of google/umt5-xxl"
            )
        return ids, mask.astype(bool)


def encode_ids(model, params, ids, mask):
    """Token ids [n, L] -> text rows f32 [n, L, dim], zero where the mask [n, L] is false."""
    rows = model.apply({"params": params}, ids, mask).astype(jnp.float32)
    return rows * mask[..., None]


# ---- shared --------------------------------------------------------------------------------------


def _converted(directory, section, key, command):
    """Opens converted weights: (checkpoint directory, meta item, the section of its config).

    Raises:
      FileNotFoundError: nothing there. ValueError: it holds something else.
    """
    if not directory:
        raise ValueError(
            f"config.{key} is empty; give the directory that {_command(command)} wrote"
        )
    try:
        path = checkpoint.find_checkpoint(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config.{key}={str(directory)!r} holds no converted weights; make "
            f"them with: {_command(command)}"
        ) from error
    meta = storage.read_meta(path)
    sections = meta["config"] or {}
    if section not in sections:
        raise ValueError(
            f"config.{key}={str(directory)!r} holds weights of "
            f"{', '.join(sections) or 'something unnamed'}, expected {section}: "
            f"{_command(command)}"
        )
    return path, meta, dict(sections[section])


def _command(kind):
    return f"python -m converters {kind} --in FILE --out DIR"


def _module(kind, fields, path, **given):
    """A module from JSON fields, whose lists were tuples."""
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - names)
    if unknown:
        raise ValueError(
            f"{path} was converted by another version: {kind.__name__} has no field "
            f"{', '.join(unknown)}; convert again"
        )
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return kind(**{**fields, **given})


def _digest(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _in_parts(function, rows, most):
    """function(rows) in parts of at most `most` (a power of two) rows, on the host.

    Parts are filled up to a power of two with repeated rows: few sizes are ever compiled.
    """
    out = []
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        size = 1 << (len(part) - 1).bit_length()
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        out.append(np.asarray(function(filled))[: len(part)])
    return np.concatenate(out)
