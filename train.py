"""Trains a Light-WAM policy; the same command again continues an interrupted run.

python train.py --config configs/libero.py:spatial --workdir runs/spatial [--config.key=value ...]

docs/config.md lists the keys, with defaults, allowed values and meaning.
"""

import errno
import sys

from absl import app, flags, logging

from lightwam_jax import bucket, command_line, next_command
from lightwam_jax import config as config_lib

# jax and the rest are imported when flags and config are right: they take seconds, and more where
# PyTorch is installed (tensorboardX imports it).

command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of checkpoints, metrics and reports, or gs:// or s3:// address (docs/pods.md).",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where TPU, SLURM or Open MPI do not tell it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --coordinator: of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: this one's number.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_s", None, "Silence after which another process counts as dead.", lower_bound=1
)
_SCRATCH = flags.DEFINE_string(
    "scratch",
    "",
    "Of a --workdir that is an address: directory of this machine for its working copy; default: "
    "~/.cache/lightwam_jax/buckets.",
)
_PROFILE = flags.DEFINE_string(
    "profile", "", "FIRST:LAST: records these steps with jax.profiler, in WORKDIR/profile."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    """Checks the flags and trains."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; config values are set as --config.key=value"
        )
    profile = _profile_steps()
    command_line.check_directory(_WORKDIR.value, "--workdir", bucket=True)
    import jax

    from lightwam_jax import distributed
    from lightwam_jax.checkpoint import storage
    from lightwam_jax.data.caches import latents
    from lightwam_jax.training import loop, metrics

    if not flags.FLAGS["verbosity"].present:
        _hush_failing_writes()
    try:
        distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _HEARTBEAT.value or distributed.HEARTBEAT_S,
        )
        config = config_lib.from_config_dict(flags.FLAGS.config)
        run = loop.prepare(config, _WORKDIR.value, profile, _SCRATCH.value)
    except (ValueError, OSError, MemoryError) as error:
        logging.debug("Where it was found:", exc_info=True)  # shown by --verbosity=1
        command_line.fail(error)
    try:
        outcome = loop.run(run)
    except (FloatingPointError, MemoryError, storage.SaveError, latents.DamagedRecord) as error:
        command_line.fail(error)
    except bucket.BucketError as error:
        command_line.fail(f"{error}; the same command continues from the newest checkpoint there")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        command_line.fail(f"{error}; make room and run the same command again")
    if outcome.signal:  # so that `train.py ... && evaluate.py ...` stops too
        sys.exit(128 + outcome.signal)
    if jax.process_index() == 0:
        rows = metrics.read_rows(run.workdir / "metrics.jsonl")
        print(next_command.after_training(run.config, _WORKDIR.value, rows))


def _profile_steps():
    """(first, last) of --profile, or None."""
    if not _PROFILE.value:
        return None
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise app.UsageError(f"--profile={_PROFILE.value}; expected FIRST:LAST, such as 10:14")
    return int(first), int(last)


def _hush_failing_writes():
    """One full disk fails hundreds of writes; what is raised in the end says it in one line."""
    logging.get_absl_logger().addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore, as Orbax gave up
            before(unraisable)

    before = sys.unraisablehook
    sys.unraisablehook = hook


if __name__ == "__main__":
    command_line.run(main)
