"""Does a served policy act as it was trained? Compares, stage by stage, and names the mistake.

    python -m lightwam_jax.inference.skew --workdir runs/x                      in this process
    python -m lightwam_jax.inference.skew --workdir runs/x --url ws://gpu:8000  the server that runs
    python -m lightwam_jax.inference.skew --workdir runs/x --record DIR         what a robot sent

Recorded moments are sent as a robot sends its own, through wire and key table, and what comes back
is compared with what training computes from the cached row of the same moment. Exit status 1: they
differ. docs/skew.md has the stages, the limits and the mistakes that are told apart.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys

from absl import app, flags

from lightwam_jax import bucket, command_line

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Run directory of train.py, or a checkpoint.")
    flags.DEFINE_integer("step", None, "Checkpoint to compare with; default: the newest.")
    flags.DEFINE_string("embodiment", "", "Whose cameras and units, where a mixture had several.")
    flags.DEFINE_string("text_weights", "", "Where the text encoder is, if elsewhere.")
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "In which this side computes.")
    flags.DEFINE_string("url", "", "ws://HOST:PORT of the server; default: one in this process.")
    flags.DEFINE_integer("samples", 64, "Windows of the validation split.", lower_bound=1)
    flags.DEFINE_string("record", "", "Compare what a server recorded with --record=DIR instead.")
    flags.DEFINE_string("keys", "auto", "Key table of a server in this process, or that recorded.")
    flags.DEFINE_string(
        "adapter", "", "FILE.py:NAME, a robot's function (images, state, prompt) -> request."
    )
    flags.DEFINE_string("out", "", "Directory of the report; default: WORKDIR/skew.")
    flags.DEFINE_bool("mistakes", False, "Make the usual mistakes, too: how large, are they named?")
    flags.DEFINE_bool("brief", False, "Print one line.")
    flags.mark_flag_as_required("workdir")
    command_line.check()

from lightwam_jax import config as config_lib
from lightwam_jax.inference import (
    skew_check,
    skew_recorded,
    skew_report,
    skew_sizes,
    skew_stages,
    skew_windows,
)


def main(argv):
    """Checks, writes the report and prints it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given = flags.FLAGS
    if given.record and given.url:
        raise app.UsageError("--record compares what was sent before; give it without --url")
    from lightwam_jax import sharding

    sharding.enable_compilation_cache()
    if bucket.is_address(given.workdir) and not given.out:
        command_line.fail(f"--workdir={given.workdir} is an address: give --out DIR for the report")
    try:
        result, table = _run(given)
    except (ValueError, OSError) as error:  # of a file, or of --url
        command_line.fail(error)
    out = pathlib.Path(given.out or os.path.join(given.workdir, "skew"))
    skew_report.write(out, result, result.canvases)
    if not given.brief:
        print(skew_report.text(result))
        print("".join(f"{row}\n" for row in table), end="")
    print(f"{skew_report.line(result)}; {out / 'skew.html'}")
    sys.exit(int(result.verdict == skew_stages.FAIL))


def _run(given):
    from lightwam_jax.checkpoint import run, storage
    from lightwam_jax.inference.policy import Policy

    directory = given.workdir
    if given.step is not None:
        directory = os.path.join(directory, "checkpoints", str(given.step))
    meta = storage.read_meta(run.find_checkpoint(directory))
    checksum = f"{meta['checksum']:08x}"
    where = {"text_weights": given.text_weights, "embodiment": given.embodiment}
    policy = Policy.load(given.workdir, given.step, dtype=given.dtype, **where)
    run_config = config_lib.from_config_dict(meta["config"], made_in=directory)
    if given.record:
        found = skew_recorded.check(
            policy, run_config, given.record, given.samples, checksum, given.keys
        )
        return found, ()
    windows = skew_windows.draw(run_config, policy, given.samples)
    if given.url:
        from lightwam_jax.inference import access
        from lightwam_jax.inference.client import Client

        key, where = access.key_of_environment(), f"over {given.url}"
        server = Client(given.url, key, timeout_s=600, connect_s=60)
    else:
        deployed, where = skew_windows.deployed_form(policy), "in process"
        server = skew_check.InProcess(deployed, given.keys, weights_hash=checksum)
    with contextlib.closing(server):
        adapter = _adapter(given.adapter)
        found = skew_check.check_windows(policy, windows, server, where, adapter, checksum)
        table = skew_sizes.table(policy, windows, server) if given.mistakes else ()
        return found, table


def _adapter(place):
    """A robot's own function (images, state, prompt) -> request, of FILE.py:NAME."""
    if not place:
        return None
    path, _, name = place.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--adapter={place!r}; expected FILE.py:NAME")
    spec = importlib.util.spec_from_file_location("skew_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    return lambda window, request: function(*window.moment())


if __name__ == "__main__":
    command_line.run(main, again="run the same command again")
