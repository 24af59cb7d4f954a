"""What turns images and physical units into model inputs and back: the assets of a policy.

The directory travels inside every checkpoint, so that a checkpoint is a policy by itself:

  dataset_stats.json   normalisation statistics
  codec/               latent codec, with its weights
  text/                embeddings of the known prompts, and which encoder made them
"""

import dataclasses
import os

from lightwam_jax import config as config_lib
from lightwam_jax import encoders
from lightwam_jax.data import normalize
from lightwam_jax.data.caches import text as text_cache


@dataclasses.dataclass(frozen=True, eq=False)
class Assets:
    """Loaded assets.

    Attributes:
      state: Normalizer of the proprioception [P].
      action: Normalizer of the actions [A].
      codec: Codec.
      text_encoder: CachedTextEncoder: known prompts from the cache, new ones encoded.
      statistics: dataset_stats.json.
    """

    state: normalize.Normalizer
    action: normalize.Normalizer
    codec: encoders.base.Codec
    text_encoder: encoders.text.CachedTextEncoder
    statistics: dict


def assets_directory(config):
    """Returns the assets directory of a run: in the cache of its data; None for source "fake"."""
    return None if config.data.source == "fake" else os.path.join(config.data.cache, "assets")


def load_assets(directory, config):
    """Returns the `Assets` in `directory` (of a cache or a checkpoint), checked.

    Raises:
      FileNotFoundError: something is missing; says how to make it.
      ValueError: widths, codec channels or text encoder are not the config's.
    """
    statistics, state, action = load_normalizers(directory, config)
    codec = encoders.load_codec(os.path.join(directory, "codec"))
    if codec.latent_channels != config.model.latent_channels:
        raise ValueError(
            f"the codec in {directory}/codec has {codec.latent_channels} channels, "
            f"config.model.latent_channels is {config.model.latent_channels}: run python -m "
            "lightwam_jax.precompute --config CONFIG --what latents, or change the config"
        )
    cache, data = load_text(directory, config), config.data
    encoder = encoders.make_text_encoder(
        data.text_encoder, config.model.text_dim, data.text_weights, cache
    )
    cached = encoders.text.CachedTextEncoder(encoder, cache)
    return Assets(state, action, codec, cached, statistics)


def load_normalizers(directory, config):
    """Returns (statistics, state Normalizer, action Normalizer) of an assets directory.

    Raises:
      FileNotFoundError: no statistics. ValueError: of other widths, or of actions in another form.
    """
    path = os.path.join(directory, statistics_file(config))
    statistics = normalize.read_statistics(
        path, config_lib.state_width(config), config_lib.action_width(config)
    )
    # Statistics without "made_from" were put there by hand (a released file): taken as they are.
    have = statistics.get("made_from", {"config": {}})["config"]
    lines = [
        f"{key}: statistics {have[key]!r}, config {value!r}"
        for key, value in statistics_keys(config).items()
        if have.get(key, value) != value
    ]
    _refuse(lines, f"{path} was computed", "stats")
    state = normalize.from_statistics(statistics, "state", config.data)
    return statistics, state, normalize.from_statistics(statistics, "action", config.data)


def statistics_file(config):
    """Returns the file name of the statistics of a dataset in the assets."""
    embodiment = config.data.embodiment
    return f"dataset_stats_{embodiment}.json" if embodiment else "dataset_stats.json"


def statistics_keys(config):
    """Returns {"config.data.key": JSON} of the keys that decide statistics, beside the data."""
    keys = "action_as", "action_state_dims", "gripper_dims", "gripper_closed_open"
    tuples = {f"config.data.{key}": list(getattr(config.data, key)) for key in keys}
    return {"config.data.action_horizon": config.data.action_horizon, **tuples}


def load_text(directory, config):
    """Returns the `TextCache` of an assets directory, checked against the config.

    Raises:
      ValueError: made with another encoder, width or template; every difference is listed.
    """
    cache = text_cache.TextCache(os.path.join(directory, "text"))
    pairs = {
        "data.text_encoder": (cache.kind, config.data.text_encoder),
        "data.prompt_template": (cache.template, config.data.prompt_template),
        "model.text_dim": (cache.dim, config.model.text_dim),
    }
    lines = [
        f"config.{key}: cache {have!r}, config {want!r}"
        for key, (have, want) in pairs.items()
        if have != want
    ]
    _refuse(lines, f"the text embeddings of {cache.place} were made", "text")
    return cache


def _refuse(differing, what, step):
    """Raises ValueError where there are lines that say what differs from the config."""
    if differing:
        raise ValueError(
            f"{what} for another config:\n  " + "\n  ".join(differing) + "\nMake it again with: "
            f"python -m lightwam_jax.precompute --config CONFIG --what {step}"
        )
