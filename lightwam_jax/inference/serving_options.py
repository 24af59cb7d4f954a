"""How a policy is served: every option with its default, and the guard they ask for."""

import dataclasses

from lightwam_jax import config as config_lib
from lightwam_jax.data import normalize
from lightwam_jax.inference import safety, wire
from lightwam_jax.inference.batching import PADDED_SIZES

_NOT_FLAGS = ("weights_hash",)


def _option(default, meaning):
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option, with its meaning; the flags of server.py are made from this."""

    name: str = _option("", "Shown to clients; default: the config's.")
    weights_hash: str = _option("", "Of the checkpoint.")
    fps: float = _option(
        0.0,
        "Control rate of the robot, for clients and --max_age_ms; 0: that of the training data.",
    )
    keys: str = _option("auto", "Key table: auto, lightwam, lerobot, openpi_..., or FILE.json.")
    default_prompt: str = _option("", "Instruction of requests without one; default: refused.")
    new_prompts: str = _option("encode", "Instructions that are not cached: encode or refuse.")
    float_images: bool = _option(False, "Accept images of floats in 0..1 too; they are rounded.")
    jpeg: bool = _option(
        False, "Accept JPEG files as images too; they change the actions a little."
    )
    frozen: str = _option("warn", "A camera that shows the same picture: off, warn or refuse.")
    image_sizes: tuple = _option((), "Image sizes to compile at the start: 480x640,240x320.")
    max_new_sizes: int = _option(16, "Other sizes of images that may follow; each is compiled.")
    max_batch: int = _option(8, "Most observations planned together: 1, 2, 4, ... 64.")
    exact: bool = _option(False, "Pad every batch to max_batch: the load changes no bit of a plan.")
    max_wait_ms: float = _option(0.0, "Wait so long for more requests; 0: ask at once.")
    limits: str = _option("", "JSON of safety.py; default: the training's range; none: no limits.")
    gripper: str = _option("off", "off, snap or hysteresis.")
    gripper_closed_within: float = _option(
        0.0, "Commands as near to closed as that close it, in its units: for position grippers."
    )
    guard: str = _option("change", "Plans beyond the limits: change or refuse.")
    max_age_ms: float = _option(0.0, "Oldest observation; 0: two plans long if fps is known.")
    request_timeout_s: float = _option(30.0, "Every request is answered within that.")
    send_timeout_s: float = _option(10.0, "A client that does not read its replies is let go.")
    idle_s: float = _option(600.0, "A connection without requests is closed.")
    drain_s: float = _option(10.0, "After SIGTERM, for what was accepted.")
    max_frame: int = _option(wire.MAX_FRAME, "Bytes of a request.")
    max_clients: int = _option(32, "Connections.")
    most_errors: int = _option(20, "Errors in a row, then a connection is closed.")
    metadata: str = _option("full", "full, or short: nothing that names the checkpoint.")
    debug: bool = _option(
        False, "Tracebacks in replies; and with the key stages, what the model was given."
    )
    taps: bool = _option(False, "Ask the policy where it looks, for the live page.")
    no_page: bool = _option(False, "No live page at GET /.")
    rerun: str = _option("", "FILE.rrd: record every request for the Rerun viewer.")

    def __post_init__(self):
        if self.max_batch not in PADDED_SIZES:
            raise ValueError(f"max_batch is {self.max_batch}; expected one of {PADDED_SIZES}")
        choices = (
            ("gripper", ("off", "snap", "hysteresis")),
            ("new_prompts", ("encode", "refuse")),
            ("frozen", ("off", "warn", "refuse")),
            ("guard", ("change", "refuse")),
            ("metadata", ("full", "short")),
        )
        at_least_0 = ("fps", "max_wait_ms", "max_age_ms", "drain_s", "max_new_sizes")
        for name in (*at_least_0, "gripper_closed_within"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("request_timeout_s", "send_timeout_s", "idle_s", "max_frame", "max_clients"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name, values in choices:
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {values}")


def control_rate(policy, options):
    """Returns control steps per second: as told, or of the training data; 0.0: nobody knows."""
    return float(options.fps or policy.assets.statistics.get("fps", 0.0))


def make_guard(policy, options):
    """Returns the `Guard` of a policy, as the options say.

    Raises:
      ValueError: a limits file, or a gripper mode, that does not fit.
    """
    config, statistics = policy.config, policy.assets.statistics
    data, width = config.data, config_lib.action_width(config)
    limits = safety.Limits.none(width)
    if statistics and options.limits != "none":
        tables = (normalize.table_of(statistics, name) for name in ("action", "state"))
        limits = safety.from_statistics(*tables, data)
    if options.limits not in ("", "none"):
        limits = safety.from_file(options.limits, limits)
    within = options.gripper_closed_within
    asked = f"--gripper={options.gripper}" if options.gripper != "off" else ""
    asked = asked or (f"--gripper_closed_within={within:g}" if within else "")
    if asked and data.gripper_snap:
        raise ValueError(
            "config.data.gripper_snap is set: the policy snaps its grippers itself, use "
            f"--gripper=off, and not {asked}"
        )
    if asked and not data.gripper_dims:
        raise ValueError(f"{asked} needs config.data.gripper_dims")
    gripper = safety.Gripper(data.gripper_dims, data.gripper_closed_open, options.gripper, within)
    return safety.Guard(limits, data.action_horizon, gripper, options.guard == "refuse")


def batch_sizes(options):
    """Returns the batch sizes that a server needs compiled."""
    return (options.max_batch,) if options.exact else tuple(range(1, options.max_batch + 1))


def define_flags(flags):
    """Defines a flag of absl for each option that a person sets."""
    make = {bool: "DEFINE_bool", int: "DEFINE_integer", float: "DEFINE_float", str: "DEFINE_string"}
    for field in dataclasses.fields(Options):
        if field.name in _NOT_FLAGS:
            continue
        if field.type is tuple:
            flags.DEFINE_list(field.name, [], field.metadata["help"])
        else:
            getattr(flags, make[field.type])(field.name, field.default, field.metadata["help"])


def from_flags(values, **others):
    """Returns the `Options` of parsed flags.

    Raises:
      ValueError: a value that is none of an option's.
    """
    names = [f.name for f in dataclasses.fields(Options) if f.name not in _NOT_FLAGS]
    given = {name: getattr(values, name) for name in names} | others
    sizes = []
    for text in given["image_sizes"]:
        height, cross, width = text.partition("x")
        if not (cross and height.isdigit() and width.isdigit()):
            raise ValueError(f"image_sizes has {text!r}; expected HEIGHTxWIDTH, such as 480x640")
        sizes.append((int(height), int(width)))
    return Options(**given | {"image_sizes": tuple(sizes)})
