"""Converted weights, a config and statistics together: a checkpoint that acts.

A released checkpoint holds the networks only. What a policy needs besides (cameras, prompt
template, normalisation, the VAE, the text encoder) is said here once and kept with the weights.
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from converters import files
from lightwam_jax import command_line
from lightwam_jax import config as config_lib
from lightwam_jax import encoders as encoders_lib
from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import assets as assets_lib
from lightwam_jax.data.caches import text as text_cache
from lightwam_jax.encoders import text as text_lib
from lightwam_jax.encoders import wan


def assemble(weights, config, vae, text, out, stats=None, prompts=None, say=print):
    """Writes a policy checkpoint, which `Policy.load` reads.

    Args:
      weights: directory that `converters lightwam` wrote.
      config: config file, such as configs/libero.py:all; its model section is replaced by the
        sizes of the weights; `_CHOSEN` stays.
      vae, text: directories that `converters vae` and `converters t5` wrote.
      out: directory; must not exist.
      stats: dataset_stats.json of the release; None: the one kept with the weights.
      prompts: file of instructions, one per line, to encode now; others are encoded when they come.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: something is there, absent, or does not fit.
    """
    out = files.absent(out)
    stored = checkpoint.load_params(weights)
    fields = (stored.meta["config"] or {}).get("model", {})
    if "action_dim" not in fields:
        raise ValueError(
            f"{weights} holds no whole Light-WAM; expected what python -m converters lightwam wrote"
        )
    config = _config(config, fields, str(vae), str(text))
    stats = _statistics(stats, stored.assets, weights)
    with tempfile.TemporaryDirectory(dir=out.parent) as assets:
        shutil.copyfile(stats, Path(assets, "dataset_stats.json"))
        wan.WanCodec(vae, config.data.codec, config.model.dtype).save(Path(assets, "codec"))
        _write_texts(Path(assets, "text"), config, prompts)
        assets_lib.load_assets(assets, config)  # whether all of it fits together
        meta = {key: stored.meta.get(key) for key in ("step", "source", "checkpoint")}
        meta["config"] = dataclasses.asdict(config)
        checkpoint.save_params(out, stored.params, meta, assets)
    say(f"{out}: a policy of {config.name}; lightwam_jax.inference.policy.Policy.load reads it")


def _statistics(given, assets, weights):
    """The dataset_stats.json that --stats names, or that lies with the weights."""
    if given:
        return files.existing(given)
    kept = Path(assets, "dataset_stats.json") if assets else None
    if kept is None or not kept.is_file():
        raise FileNotFoundError(
            f"{weights} keeps no dataset_stats.json, which says how its actions are normalised "
            "(`converters lightwam` takes along the one that lies beside --in): give that of the "
            "release with --stats FILE"
        )
    return kept


# Keys of config.model that no weight tells: the config file's hold.
_CHOSEN = ("dtype", "flow_steps", "flow_shift", "flow_reads", "flow_noise")


def _config(place, fields, vae, text):
    """The `Config` of a file, with the weights' model and where the others come from."""
    tree = command_line.load(place).to_dict()
    chosen = {key: tree["model"][key] for key in _CHOSEN}
    tree["model"] = {**json.loads(json.dumps(fields)), **chosen}
    tree["data"].update(codec_weights=vae, text_weights=text)
    return config_lib.from_config_dict(tree)


def _write_texts(directory, config, prompts):
    data = config.data
    lines = files.existing(prompts).read_text(encoding="utf-8").split("\n") if prompts else []
    tasks = filter(None, map(str.strip, lines))
    prompts = [text_lib.prompt(task, data.prompt_template) for task in tasks]
    encoder = encoders_lib.make_text_encoder(
        data.text_encoder, config.model.text_dim, data.text_weights
    )
    text_cache.write_cache(
        directory, encoder, prompts, data.text_len, data.text_encoder, data.prompt_template
    )
