"""The contract between data and training: what a batch is.

  latents        [B, F, H, W, C]  bfloat16  normalised video latents, channels last
  video   [B, frames, H, W, 3]    uint8     the canvases; with data.encode_online, for latents
  context        [B, L, text_dim] bfloat16  text rows; rows past the text are zero
  context_mask   [B, L]           bool      true on text rows
  proprio        [B, P]           float32   normalised, of the window's first step
  actions        [B, T, A]        float32   normalised
  action_is_pad  [B, T]           bool      step lies past the end of the episode
  image_is_pad   [B, frames]      bool      video frame lies past the end of the episode
  index          [B]              int64     sample id: row of the split
  dataset        [B]              int32     only in a mixture: number of the dataset, in its order

Validation batches also have valid [B] bool: false on rows repeated to fill the last batch.
"""

import jax
import ml_dtypes
import numpy as np

from lightwam_jax import encoders

FAKE_TASKS = 4


def batch_spec(config, batch):
    """Returns {name: jax.ShapeDtypeStruct} of a training batch of `batch` rows (index is int64).

    Raises:
      ValueError: see `latents_shape`.
    """
    data, model = config.data, config.model
    latents = latents_shape(config)
    shapes = {
        "latents": (latents, ml_dtypes.bfloat16),
        "video": ((data.video_frames, *data.canvas, 3), np.uint8),
        "context": ((data.text_len, model.text_dim), ml_dtypes.bfloat16),
        "context_mask": ((data.text_len,), np.bool_),
        "proprio": ((model.proprio_dim,), np.float32),
        "actions": ((data.action_horizon, model.action_dim), np.float32),
        "action_is_pad": ((data.action_horizon,), np.bool_),
        "image_is_pad": ((data.video_frames,), np.bool_),
        "index": ((), np.int64),
        "dataset": ((), np.int32),
    }
    del shapes["latents" if data.encode_online else "video"]
    if not data.mixture or data.source == "fake":
        del shapes["dataset"]
    return {name: _struct((batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def model_batch_spec(config, rows):
    """Returns {name: ShapeDtypeStruct} of what the losses read: latents, whatever is loaded."""
    latents = _struct((rows, *latents_shape(config)), ml_dtypes.bfloat16)
    batch = batch_spec(config, rows) | {"latents": latents}
    return {k: x for k, x in batch.items() if k not in ("index", "dataset", "video")}


def latents_shape(config):
    """Returns (F, H, W, C) of the latents of a window.

    Raises:
      ValueError: the canvas does not divide into latent cells, pooled cells and 2x2 patches.
    """
    data = config.data
    stride = encoders.base.STRIDES[data.codec]
    unit = stride * config.loss.downsample * 2
    if any(side <= 0 or side % unit for side in data.canvas) or len(data.canvas) != 2:
        raise ValueError(
            f"config.data.canvas={tuple(data.canvas)}: both sides must be multiples of {unit} "
            f"({stride} pixels per latent cell x config.loss.downsample={config.loss.downsample} x "
            "patches of 2)"
        )
    height, width = (side // stride for side in data.canvas)
    return data.latent_frames, height, width, config.model.latent_channels


def check_batch(batch, config):
    """Raises ValueError, naming every key, shape or dtype of a batch that breaks the contract."""
    wrong, rows = [], len(batch.get("index", ()))
    spec = batch_spec(config, rows)
    if "valid" in batch:
        spec["valid"] = _struct((rows,), np.bool_)
    for name in sorted(set(spec) | set(batch)):
        if name not in batch:
            wrong.append(f"{name} is missing; expected {_show(spec[name])}")
        elif name not in spec:
            wrong.append(f"{name} is not part of a batch; known: {', '.join(spec)}")
        elif (batch[name].shape, batch[name].dtype) != (spec[name].shape, spec[name].dtype):
            wrong.append(f"{name} is {_show(batch[name])}; expected {_show(spec[name])}")
    if wrong:
        raise ValueError("the batch does not fit the config:\n  " + "\n  ".join(wrong))


def fake_record(config, seed):
    """Returns one random record, as a cache or the episodes give them; a function of `seed`."""
    rng = np.random.default_rng(seed)
    shape = {name: struct.shape[1:] for name, struct in batch_spec(config, 1).items()}
    if config.data.encode_online:
        images = {"video": rng.integers(0, 256, shape["video"], np.uint8)}
    else:
        latents = rng.standard_normal(shape["latents"], np.float32)
        images = {"latents": latents.astype(ml_dtypes.bfloat16)}
    past = rng.integers(1, config.data.action_horizon + 1)  # padding occurs in real data too
    return {
        **images,
        "proprio": rng.standard_normal(shape["proprio"], np.float32),
        "actions": rng.uniform(-1, 1, shape["actions"]).astype(np.float32),
        "action_is_pad": np.arange(config.data.action_horizon) >= past,
        "image_is_pad": np.arange(config.data.video_frames) * config.data.frame_stride > past,
        "task": int(rng.integers(FAKE_TASKS)),
    }


def fake_context(config, seed):
    """Returns random texts: context bf16 [FAKE_TASKS, L, text_dim], mask bool [FAKE_TASKS, L]."""
    rng = np.random.default_rng(seed)
    shape = (FAKE_TASKS, config.data.text_len, config.model.text_dim)
    lengths = rng.integers(1, config.data.text_len + 1, FAKE_TASKS)
    mask = np.arange(config.data.text_len) < lengths[:, None]
    context = rng.standard_normal(shape, np.float32) * mask[..., None]
    return context.astype(ml_dtypes.bfloat16), mask


def fake_batch(config, batch, seed=0):
    """Returns a random batch of `batch` rows that `check_batch` accepts; a function of `seed`."""
    records = [fake_record(config, (seed, i)) for i in range(batch)]
    stacked = {name: np.stack([record[name] for record in records]) for name in records[0]}
    context, mask = fake_context(config, seed)
    task = stacked.pop("task")
    made = {
        **stacked,
        "context": context[task],
        "context_mask": mask[task],
        "index": np.arange(batch),
        "dataset": np.zeros(batch, np.int32),
    }
    return {name: made[name] for name in batch_spec(config, batch)}


def _struct(shape, dtype):
    # A 64-bit dtype survives in ShapeDtypeStruct whatever jax_enable_x64 says.
    return jax.ShapeDtypeStruct(shape, dtype)


def _show(x):
    return f"{x.dtype} {list(x.shape)}"
