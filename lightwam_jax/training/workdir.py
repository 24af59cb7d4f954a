"""The directory of a run: what it was started with, and what travels into its checkpoints.

config.json      the resolved config; a contradicting one is refused (see `MAY_CHANGE`)
params.json      parameters per group, total and trainable
metrics.jsonl    one row per log window and per validation; tensorboard/ holds the same
not_finite.json  only where a step was not finite: its samples, losses and norms
assets/          what inference needs besides the parameters, and an example batch
checkpoints/     see `checkpoint/run.py`
"""

import filecmp
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lightwam_jax import atomic, config_read, folders
from lightwam_jax import config as config_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.checkpoint import storage

# Config keys that may differ when a run is continued: they leave the next step what it was, up to
# rounding. (`train.steps` also stretches the learning-rate schedule; the loop says so.)
MAY_CHANGE = re.compile(
    r"^(name|evaluation\..*|mesh\..*|optimizer\.accum_steps|"
    r"data\.(workers|threads|prefetch|codec_weights|text_weights|action_kinds)|"
    r"model\.(remat|scan_unroll|attention)|"
    r"train\.(steps|log_every|eval_every|eval_batches|checkpoint_every|keep_last|keep_every|"
    r"stuck_after_s|wandb))$"
)


def check_same_run(config, workdir, started=None):
    """Refuses to continue a run under another config, or on caches rebuilt since it started.

    Args:
      started: whether the run has a checkpoint, wherever it is; None: if `workdir` has one.

    Raises:
      ValueError: names the keys (old and new value) or the file.
    """
    path = workdir / "config.json"
    if started is None:
        started = any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))
    if not path.exists() or not started:
        return
    old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(config_lib.to_json(config))
    config_read.refuse_old(old, workdir)
    changed = checkpoint.config_differences(old, new)
    fatal = {key: values for key, values in changed.items() if not MAY_CHANGE.match(key)}
    if fatal:
        lines = "".join(
            f"\n  config.{key}: {old!r} so far, {new!r} now" for key, (old, new) in fatal.items()
        )
        raise ValueError(
            f"{workdir} holds a run with another config:{lines}\nset these back to continue it, or "
            "choose another --workdir (config.train.init can start from its checkpoint)"
        )
    if "train.steps" in changed:
        logging.warning(
            "config.train.steps changed from %s to %s: the learning-rate schedule changes with it",
            *changed["train.steps"],
        )
    source, kept = _cache_assets(config), workdir / "assets"
    for file in folders.files_below(source) if source else ():
        copy = kept / file.relative_to(source)
        if file.is_file() and copy.is_file() and not _same_content(file, copy):
            raise ValueError(
                f"{file} is not what the run in {workdir} started with ({copy}): the cache was "
                "rebuilt. Choose another --workdir, or put the old cache back"
            )


def write_reports(config, workdir, table):
    """Writes config.json, and params.json from the rows of `params.count_table`."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(workdir / "config.json", config_lib.to_json(config) + "\n")
        rows = [dict(zip(("group", "total", "trainable"), row)) for row in table]
        atomic.write_json(workdir / "params.json", rows)


def write_assets(config, workdir, batch):
    """Collects in `<workdir>/assets` what a policy needs besides its parameters.

    Args:
      config: `Config`; `<data.cache>/assets` is copied.
      workdir: run directory.
      batch: numpy batch, of which one row is kept as example_batch.npz (bfloat16 as float32).
    """
    if jax.process_index():
        return
    target, scratch = workdir / "assets", workdir / "assets.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if source := _cache_assets(config):
        storage.copy_files(source, scratch, storage.LARGE)
    example = {name: x[:1] for name, x in batch.items()}
    wide = {name: x.astype(np.float32) for name, x in example.items() if x.dtype == jnp.bfloat16}
    np.savez(scratch / "example_batch.npz", **(example | wide))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def _same_content(file, copy):
    return file.samefile(copy) or filecmp.cmp(file, copy, shallow=False)


def _cache_assets(config):
    folder = pathlib.Path(config.data.cache) / "assets"
    return folder if config.data.cache and folder.is_dir() else None
