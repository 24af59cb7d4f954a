"""From a ConfigDict to frozen dataclasses: below this file no ConfigDict exists.

The dataclasses mirror `configs/base.py` section by section. A key that is missing, unknown or of
another type is an error before anything else happens.
"""

import dataclasses
import difflib
import json
import typing

from lightwam_jax import config_checks


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and dtypes; see `models/variants.py`."""

    variant: str
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    text_dim: int
    freq_dim: int
    latent_channels: int
    eps: float
    attention_mask: str
    gate_init: float
    lora_rank: int
    lora_alpha: float
    lora_layers: tuple
    lora_targets: tuple
    adapter_layers: tuple
    adapter_dim: int
    adapter_scale: float
    pooling: str
    num_queries: int
    query_init: float
    pool_heads: int
    merge_dim: int
    merge_slots: int
    sources: tuple
    layer_sources: tuple
    per_layer_dim: int
    trunk_dim: int
    trunk_blocks: int
    step_pos_dim: int
    action_dim: int
    proprio_dim: int
    dtype: str
    frozen_dtype: str
    attention: str
    remat: str
    scan_unroll: int


@dataclasses.dataclass(frozen=True)
class LossConfig:
    downsample: int
    lambda_video: float
    lambda_action: float
    residual_target: bool
    temporal_weighting: bool
    prefix_steps: int
    prefix_weight: float
    tail_weight: float
    shift: float
    mask_text_padding: bool


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    episodes: str
    state: tuple
    action: tuple
    image: str
    task: str
    fps: float
    channel_order: str


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    crop: float
    brightness: float
    contrast: float
    saturation: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    path: str
    cache: str
    exclude: tuple
    check_frames: str
    fields: KeysConfig
    state_dim: int
    action_dim: int
    cameras: tuple
    orientation: tuple
    camera_size: tuple
    layout: str
    canvas: tuple
    action_as: tuple
    action_state_dims: tuple
    gripper_dims: tuple
    gripper_closed_open: tuple
    gripper_snap: bool
    codec: str
    codec_weights: str
    text_encoder: str
    text_weights: str
    prompt_template: str
    text_len: int
    num_frames: int
    frame_stride: int
    action_horizon: int
    normalization: str
    normalization_range: tuple
    delta_mask: tuple
    val_fraction: float
    mixture: dict
    dataset: str
    embodiment: str
    encode_online: bool
    augment: AugmentConfig
    workers: int
    threads: int
    prefetch: int

    @property
    def video_frames(self):
        """Video frames of a window: raw frames 0, stride, 2 stride, ..."""
        return (self.num_frames - 1) // self.frame_stride + 1

    @property
    def latent_frames(self):
        """Latent frames of a window: 1 + one per four further video frames."""
        return 1 + (self.video_frames - 1) // 4


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float
    warmup_steps: int
    final_lr_ratio: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    accum_steps: int
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    trainable: tuple
    init: str
    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    eval_batches: int
    checkpoint_every: int
    keep_last: int
    keep_every: int
    stuck_after_s: float


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    frozen: str


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    suite: str
    tasks: tuple
    env: dict
    episodes: int
    first_seed: int
    replan_steps: int
    max_steps: int
    workers: int
    batch: int
    videos: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Fields are the sections of `configs/base.py`."""

    name: str
    seed: int
    model: ModelConfig
    loss: LossConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    evaluation: EvaluationConfig


def from_config_dict(tree):
    """Returns the `Config` of a ConfigDict (or plain nested dict), checked key by key.

    Raises:
      ValueError: unknown or missing key, a value of another type, or values that contradict
        each other; the message names the key and what was expected.
    """
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    config = _section(Config, tree, "config")
    config_checks.check(config)
    datasets(config)
    return config


class Dataset(typing.NamedTuple):
    """One data set of a run: its share of the samples, and the `Config` that describes it alone."""

    name: str
    weight: float
    config: Config


def datasets(config):
    """Returns the `Dataset`s of config.data.mixture; without one, the run's data set alone.

    A dataset's config has the keys of its entry in place of the run's, no mixture, its name as
    config.data.dataset, which is where its latents lie, and its embodiment (default: its name).

    Raises:
      ValueError: an entry with an unknown key or a weight that is not positive, or a dataset whose
        batches would have other shapes than the run's.
    """
    if not config.data.mixture:
        return [Dataset("", 1.0, config)]
    found = []
    for name, entry in config.data.mixture.items():
        path = f"config.data.mixture.{name}"
        weight = float(entry.get("weight", 1.0))
        if not weight > 0:
            raise ValueError(f"{path}.weight is {weight}; expected a number above 0")
        changes = {key: value for key, value in entry.items() if key != "weight"}
        fixed = sorted(_SHARED & set(changes))
        if fixed:
            raise ValueError(
                f"{path} sets {', '.join(fixed)}, which all datasets of a mixture "
                "share: set it in config.data"
            )
        keys = dataclasses.asdict(config.data) | {"dataset": name, "embodiment": name}
        keys["fields"] |= changes.pop("fields", {})
        data = _section(DataConfig, keys | changes | {"mixture": {}}, path)
        dataset = dataclasses.replace(config, data=data)
        config_checks.check(dataset)
        found.append(Dataset(name, weight, dataset))
    return found


def of_embodiment(config, embodiment=""):
    """Returns the `Config` of the (first) dataset of a mixture with an embodiment.

    Without a mixture that is the run's own.

    Raises:
      ValueError: no such embodiment, or several and none given.
    """
    configs = [dataset.config for dataset in datasets(config)]
    known = list(dict.fromkeys(c.data.embodiment for c in configs))
    if not embodiment and len(known) == 1:
        return configs[0]
    if embodiment not in known:
        raise ValueError(
            f"embodiment {embodiment!r} is none of those of this run: "
            f"{', '.join(map(repr, known))}; say whose units and cameras are meant"
        )
    return next(c for c in configs if c.data.embodiment == embodiment)


# What decides the shapes of a batch, or is there once for the whole run.
_SHARED = frozenset(
    (
        "dataset",
        "cache",
        "canvas",
        "codec",
        "codec_weights",
        "text_encoder",
        "text_weights",
        "prompt_template",
        "text_len",
        "num_frames",
        "frame_stride",
        "action_horizon",
        "mixture",
        "encode_online",
        "augment",
        "workers",
        "threads",
        "prefetch",
    )
)


def state_width(config):
    """Returns the width of the state in the data, before it is padded to the model's."""
    return config.data.state_dim or config.model.proprio_dim


def action_width(config):
    """Returns the width of the actions in the data, before they are padded to the model's."""
    return config.data.action_dim or config.model.action_dim


def to_json(config):
    """Returns the resolved config as indented JSON; `from_json` is its inverse."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text):
    """Returns the `Config` that `to_json` wrote."""
    return from_config_dict(json.loads(text))


def _section(cls, tree, path):
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            known = f"known keys: {', '.join(sorted(hints))}"
            advice = f"did you mean {near[0]!r}?" if near else known
            raise ValueError(f"{path}.{key} is not a config key; {advice}")
    missing = sorted(set(hints) - set(tree))
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; configs/base.py has every key with its default"
        )
    return cls(**{key: _value(kind, tree[key], f"{path}.{key}") for key, kind in hints.items()})


def _value(kind, value, path):
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, path)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}); expected {kind.__name__}")
    return value
