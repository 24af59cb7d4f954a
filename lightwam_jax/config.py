"""Every config key, once: type, default and meaning. `docs/config.md` is made from this file.

Those of config.model are in `config_model.py`.

A comment above a key, or behind it, is its meaning there; `make docs` writes the page. Configs are
ConfigDicts (`configs/*.py`) down to `from_config_dict`; everything below works with these frozen
dataclasses. A key that is missing, unknown or of another type is an error before anything else
happens (`config_read.py`); `config_checks.py` has which values may be together.
"""

import dataclasses
import json
import typing
from typing import Literal

from lightwam_jax import config_checks, config_read
from lightwam_jax.config_model import ModelConfig
from lightwam_jax.models import variants

# Video frames that the codec packs into each latent frame after the first.
FRAMES_PER_LATENT = 4


@dataclasses.dataclass(frozen=True)
class LossConfig:
    downsample: Literal[1, 2, 4] = 2  # spatial average pooling of the video latents
    lambda_video: float = 1.0  # weight of the video loss
    lambda_action: float = 1.0  # weight of the action loss
    residual_target: bool = False  # predict latents minus the first frame
    temporal_weighting: bool = True  # weight the steps of the action chunk by the next three keys
    prefix_steps: int = 8  # the first prefix_steps get prefix_weight
    prefix_weight: float = 1.0  # weight of the first steps
    tail_weight: float = 0.0  # weight of the other steps
    shift: float = 5.0  # of the flow-matching schedule
    mask_text_padding: bool = False  # False: attention sees padding rows (zeros), as in the release


@dataclasses.dataclass(frozen=True)
class FieldsConfig:
    """Where state, action, images and instruction are stored; "" and (): the source's own names."""

    episodes: str = ""  # hdf5: pattern of the groups that are episodes; "": a file is one
    state: tuple[str, ...] = ()  # concatenated, in this order
    action: tuple[str, ...] = ()  # concatenated, in this order
    image: str = ""  # with {camera}, e.g. "observation.images.{camera}"
    task: str = ""  # the instruction
    fps: float = 0.0  # where the data do not say
    # "bgr": images with red and blue swapped (RoboTwin's HDF5).
    channel_order: Literal["rgb", "bgr"] = "rgb"


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Changes of the images, only with data.encode_online."""

    crop: float = 1.0  # smallest side of a random crop, as a share; 1: none
    brightness: float = 0.0  # largest relative change
    contrast: float = 0.0  # largest relative change
    saturation: float = 0.0  # largest relative change


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Format of the episodes: "lerobot" is v2.0, v2.1 and v3.0, "fake" makes random values.
    source: Literal["", "lerobot", "rlds", "hdf5", "fake"] = ""
    path: str = ""  # directory of the episodes; several, between commas, are read as one dataset
    cache: str = ""  # directory of the latent and text caches and of the statistics
    exclude: tuple[str, ...] = ()  # ids of episodes to leave out; nothing else is ever left out
    # What `precompute --what stats` decodes of each episode.
    check_frames: Literal["none", "ends", "all"] = "ends"
    tolerance_s: float = 0.0  # seconds from a LeRobot row to its frame; 0: 1/4 frame; LeRobot: 1e-4
    fields: FieldsConfig = FieldsConfig()
    state_dim: int = 0  # width in the data where it is less than the model's; 0: equal
    action_dim: int = 0  # the same for actions

    cameras: tuple[str, ...] = ("",)  # names, in layout order
    # Per camera, before anything else; rotations are counter-clockwise; (): as recorded.
    orientation: tuple[
        Literal["", "rotate_90", "rotate_180", "rotate_270", "flip_vertical", "flip_horizontal"],
        ...,
    ] = ()
    camera_size: tuple[int, ...] = ()  # (height, width) each is first resized to; (): as its region
    # "robotwin": the first camera above the two others.
    layout: Literal["single", "horizontal", "vertical", "robotwin"] = "horizontal"
    canvas: tuple[int, int] = (224, 448)  # height, width in pixels of the laid-out cameras

    # Per dimension, actions as the model sees them; the policy gives back the data's; (): as is.
    action_as: tuple[Literal["absolute", "delta_state", "delta_previous"], ...] = ()
    # Per dimension: the state that "delta_state" subtracts; (): the one of the same number.
    action_state_dims: tuple[int, ...] = ()
    gripper_dims: tuple[int, ...] = ()  # action dimensions that are grippers
    gripper_closed_open: tuple[float, float] = (0.0, 1.0)  # their values in the data, made 0 and 1
    gripper_snap: bool = False  # the policy gives fully closed or fully open, nothing between
    # Per dimension, what the robot is sent (a velocity is a delta); (): from the keys above.
    action_kinds: tuple[Literal["delta", "absolute", "gripper"], ...] = ()

    codec: Literal["wan21", "wan22", "pca"] = "wan21"  # "pca": fitted on the data; for the demo
    codec_weights: str = ""  # directory of converted VAE weights (python -m converters vae)
    text_encoder: Literal["umt5", "hashed"] = "umt5"  # "hashed": deterministic; for the demo
    text_weights: str = ""  # directory of converted umT5 weights (python -m converters t5)
    # What the text encoder reads; {task} is the instruction.
    prompt_template: str = (
        "A video recorded from a robot's point of view executing the following instruction: {task}"
    )
    text_len: int = 128  # rows of the text embedding
    num_frames: int = 33  # raw frames a window spans
    frame_stride: int = 4  # raw frames between the video frames of a window
    action_horizon: int = 32  # actions per chunk
    # "quantile": 1 % to 99 %; "z_score_reference": the release's, which divides even by a deviation
    # near 0.
    normalization: Literal[
        "min_max", "quantile", "z_score", "z_score_reference", "constants", "none"
    ] = "min_max"
    normalization_range: tuple[float, float] = (-1.0, 1.0)  # of "constants": mapped to -1 and 1
    delta_mask: tuple[bool, ...] = ()  # per dimension: True for a delta (zeroed when padded)
    val_fraction: float = 0.0  # share of episodes held out for open-loop validation
    # Several datasets: {name: {"weight": 1.0, "embodiment": "", and keys that differ}}. Those of
    # one embodiment (default: its name) share statistics.
    mixture: dict = dataclasses.field(default_factory=dict)
    dataset: str = ""  # set by the program for each dataset of a mixture
    embodiment: str = ""  # names the statistics where there are several
    encode_online: bool = False  # frames are read and encoded during training; no latent cache
    augment: AugmentConfig = AugmentConfig()
    workers: int = 0  # Grain worker processes; 0: threads in this process
    threads: int = 4  # read threads
    prefetch: int = 256  # samples buffered ahead of the step

    @property
    def video_frames(self):
        """Video frames of a window: raw frames 0, stride, 2 stride, ..."""
        return (self.num_frames - 1) // self.frame_stride + 1

    @property
    def latent_frames(self):
        """Latent frames of a window: the first video frame, then one per `FRAMES_PER_LATENT`."""
        return 1 + (self.video_frames - 1) // FRAMES_PER_LATENT


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-4  # at its peak
    warmup_steps: int = 1000  # linear from lr / warmup_steps
    final_lr_ratio: float = 0.01  # cosine down to lr * final_lr_ratio
    b1: float = 0.9  # of AdamW, as b2 and eps
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-2  # on everything that learns, as in the release
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping, as the release effectively ran
    accum_steps: int = 1  # micro-batches per optimizer step; batch_size is the sum over them
    ema_decay: float = 0.0  # exponential moving average of the trainable parameters; 0: none


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # Regular expressions on parameter paths; what matches learns, the rest is frozen.
    trainable: tuple[str, ...] = (
        r"/lora_[ab]$",
        r"^dit/adapters_",
        r"^dit/head/",
        r"^expert/",
        r"^proprio_encoder/",
    )
    init: str = ""  # checkpoint directory of base weights to start from; "": random
    steps: int = 150_000  # optimizer steps
    batch_size: int = 64  # samples per optimizer step, over all devices and micro-batches
    log_every: int = 50  # steps
    eval_every: int = 2000  # steps; open-loop validation; 0: never
    eval_batches: int = 16  # of a validation
    checkpoint_every: int = 2000  # steps; 0: only at the end
    keep_last: int = 2  # newest checkpoints on disk; 0: all
    keep_every: int = 0  # besides, multiples of this step are never deleted; 0: none
    stuck_after_s: float = 300.0  # seconds without progress until a run says where it is; 0: never
    # Project at Weights & Biases that gets the metrics too (requirements-wandb.txt); "": none.
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # devices over the batch; -1: all that are left
    fsdp: int = 1  # devices over the parameters
    # Frozen weights: "sharded" over fsdp too and gathered block by block, or "replicated": whole on
    # every device (3 GiB in bfloat16), nothing to gather.
    frozen: Literal["sharded", "replicated"] = "sharded"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    suite: str = ""  # simulated suite, of `envs/__init__.py`; "": none
    tasks: tuple[str, ...] = ()  # names of its tasks; (): all
    # Arguments of the suite's make(): image size, protocol, ...
    env: dict = dataclasses.field(default_factory=dict)
    episodes: int = 50  # of each task
    first_seed: int = 1_000_000  # held-out seeds: first_seed, first_seed + 1, ...
    replan_steps: int = 10  # executed steps per predicted chunk
    max_steps: int = 400  # of an episode
    workers: int = 2  # simulator processes
    batch: int = 8  # episodes at once = rows of the policy's batch, for any number of workers
    videos: int = 4  # episodes kept as MP4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    name: str = ""  # shown in logs and reports
    seed: int = 42  # initialisation, shuffling, noise
    model: ModelConfig
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def model_variant(name, **overrides):
    """Returns the `ModelConfig` of a table of `models/variants.py`, with `overrides`.

    Raises:
      ValueError: unknown variant or unknown override.
    """
    if name not in variants.VARIANTS:
        raise ValueError(
            f"model variant {name!r} is unknown; expected one of {', '.join(variants.VARIANTS)}"
        )
    for key in overrides:
        config_read.check_known(key, ModelConfig, "config.model")
    return ModelConfig(**{"variant": name, **variants.VARIANTS[name], **overrides})


def defaults(variant, **model_overrides):
    """Returns every key with its default, as a nested dict; see `model_variant`."""
    return dataclasses.asdict(Config(model=model_variant(variant, **model_overrides)))


def from_config_dict(tree, made_in=None):
    """Returns the `Config` of a ConfigDict (or plain nested dict), checked key by key.

    Args:
      made_in: of a config that a run wrote: the run's place, for errors.

    Raises:
      ValueError: unknown or missing key, a value of another type, or values that contradict
        each other; the message names the key and what was expected.
    """
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if made_in:
        config_read.refuse_old(tree, made_in)
        tree = config_read.with_added(tree)
    config = config_read.section(Config, tree, "config")
    config_checks.check(config, FRAMES_PER_LATENT)
    datasets(config)
    return config


class Dataset(typing.NamedTuple):
    """One dataset of a run: its share of the samples, and the `Config` that describes it alone."""

    name: str
    weight: float
    config: Config


def datasets(config):
    """Returns the `Dataset`s of config.data.mixture; without one, the run's dataset alone.

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
        data = config_read.section(DataConfig, keys | changes | {"mixture": {}}, path)
        dataset = dataclasses.replace(config, data=data)
        config_checks.check(dataset, FRAMES_PER_LATENT)
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
_SHARED = {
    *("dataset", "cache", "canvas", "codec", "codec_weights", "text_encoder", "text_weights"),
    *("prompt_template", "text_len", "num_frames", "frame_stride", "action_horizon", "mixture"),
    *("encode_online", "augment", "workers", "threads", "prefetch"),
}


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
