"""Evaluates a trained policy.

python evaluate.py --workdir runs/demo --mode demo     closed loop in the embedded simulator; report
python evaluate.py --workdir runs/x --mode metaworld   the same in Meta-World (make setup-sim)
python evaluate.py --workdir runs/x --mode libero      or in LIBERO (docs/libero.md)
python evaluate.py --workdir runs/x --mode open_loop   action errors on held-out recordings
python evaluate.py --workdir runs/x --mode visualize   attention and imagined video on them
python evaluate.py --workdir runs/x --mode realtime    plans that come late (docs/realtime.md)
python evaluate.py ... --server ws://gpu:8000          closed loop with a policy that runs elsewhere
python evaluate.py ... --instruction other             does it read its instruction? (or: empty)
python evaluate.py --compare runs/x runs/y             two closed-loop results with intervals

Closed-loop modes append every episode to report/*.jsonl; run again, they continue there.
"""

import contextlib
import dataclasses
import pathlib
import time

from absl import app, flags, logging

from lightwam_jax import bucket, command_line, next_command

# Simulator processes import this file again, so jax is imported inside the functions only. The
# flags are checked before that.

CLOSED_LOOP = ("demo", "libero", "metaworld")
MODES = (*CLOSED_LOOP, "open_loop", "realtime", "visualize")
ELSEWHERE = {"robotwin": "RoboTwin runs policies itself: docs/robotwin.md"}

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Run directory of train.py, its gs:// or s3:// address, or an exported policy (policies/NAME).",
)
_SCRATCH = flags.DEFINE_string(
    "scratch",
    "",
    "Of a --workdir that is an address: directory of this machine for its working copy; default: "
    "~/.cache/lightwam_jax/buckets.",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Directory of the results; default: the run directory, or runs/policies/NAME of policies/NAME.",
)
_MODE = flags.DEFINE_string("mode", None, f"One of {', '.join(MODES)}.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; default: the newest.")
_TASKS = flags.DEFINE_list("tasks", None, "Of the suite; default: config.evaluation.tasks.")
_EPISODES = flags.DEFINE_integer(
    "episodes",
    None,
    "Of each task; default: config.evaluation.episodes. Of open_loop: whole episodes that are "
    "shown, in all; default: 12.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    "seed", None, "First episode seed; default: config.evaluation.first_seed."
)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Default: config.evaluation.workers.", lower_bound=1
)
_ENV = flags.DEFINE_string(
    "env", "{}", "Arguments of the suite's make, JSON, over those of config.evaluation.env."
)
_INSTRUCTION = flags.DEFINE_enum(
    "instruction",
    "right",
    ["right", "empty", "other"],
    "What the policy is told in every episode: its instruction, none, or that of another task.",
)
_EMBODIMENT = flags.DEFINE_string(
    "embodiment", "", "Whose cameras and units, where a mixture of datasets had several."
)
_SERVER = flags.DEFINE_string(
    "server", "", "ws://HOST:PORT of a policy server that serves --workdir's checkpoint: it plans."
)
_STARTED = flags.DEFINE_float(
    "started", None, "Unix time at which the pipeline began; default: now."
)
_LATENCY = flags.DEFINE_list(
    "latency",
    ["0", "1", "2", "3", "4"],
    "Of realtime: control steps that a plan takes, ranges of them (1-3: drawn for each plan) or "
    "JSON files with measured milliseconds.",
)
_EXECUTION = flags.DEFINE_list(
    "execution",
    ["sync", "index", "conserve"],
    "Of realtime: how late plans are executed; also append.",
)
_SPREAD = flags.DEFINE_integer(
    "spread", 1, "Of realtime: steps over which conserve makes up.", lower_bound=1
)
_ACTION_KINDS = flags.DEFINE_list(
    "action_kinds", [], "Of realtime: per action dimension, in place of config.data.action_kinds."
)
_REAL = flags.DEFINE_bool(
    "real",
    False,
    "Of realtime: one episode per fault of a network, through a real server, in real time.",
)
_SUITE = flags.DEFINE_string(
    "suite", None, "Of realtime; default: config.evaluation.suite, the only one it can be."
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "Compare this result (summary.json, or its directory) with the one after it."
)
_MAY_DIFFER = flags.DEFINE_list("may_differ", [], "Keys of the manifest that --compare overlooks.")


def main(argv):
    """Checks the flags, loads the policy and runs one mode."""
    began = time.time() if _STARTED.value is None else _STARTED.value
    if _COMPARE.value is not None:
        return compare(argv[1:])
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _WORKDIR.value is None:
        raise app.UsageError("--workdir is needed, the run directory of train.py")
    if _MODE.value not in MODES:
        problem = f"{_MODE.value}: {ELSEWHERE.get(_MODE.value, 'unknown')}"
        problem = problem if _MODE.value else "is needed"
        command_line.fail(f"--mode {problem}; the modes are {', '.join(MODES)}")
    if _INSTRUCTION.value != "right" and _MODE.value not in (*CLOSED_LOOP, "realtime"):
        command_line.fail(f"--instruction acts in the modes {', '.join(CLOSED_LOOP)} and realtime")
    if _SERVER.value and _MODE.value not in CLOSED_LOOP:
        command_line.fail(f"--server acts in the closed-loop modes: {', '.join(CLOSED_LOOP)}")
    _check_flags()
    from lightwam_jax import sharding
    from lightwam_jax.checkpoint import places
    from lightwam_jax.inference.policy import Policy

    sharding.enable_compilation_cache()
    try:
        with places.reading(_WORKDIR.value, _STEP.value, _SCRATCH.value) as workdir:
            policy = Policy.load(workdir, _STEP.value, embodiment=_EMBODIMENT.value)
            policy.config = _with_flags(policy.config)
            others = {"open_loop": open_loop, "visualize": visualize, "realtime": realtime}
            run = others.get(_MODE.value, closed_loop)
            out = pathlib.Path(_OUT.value or _beside(workdir))
            run(policy, workdir, out, began)
        if bucket.is_address(_WORKDIR.value) and not _OUT.value:
            print(f"copied to   {_WORKDIR.value}")
    except (ValueError, ImportError, OSError) as error:  # of a file, or of --server
        logging.debug("Where it was found:", exc_info=True)  # shown by --verbosity=1
        command_line.fail(error)


def _check_flags():
    """What can be wrong with the flags alone."""
    from lightwam_jax import envs

    try:
        envs.parse_arguments(_ENV.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if not bucket.is_address(_WORKDIR.value) and not pathlib.Path(_WORKDIR.value).is_dir():
        raise app.UsageError(
            f"--workdir={_WORKDIR.value}: no such directory; give the run directory of train.py"
        )
    if in_bucket := bucket.is_address(_WORKDIR.value):
        command_line.check_directory(_WORKDIR.value, "--workdir", bucket=True)
    if _OUT.value or not in_bucket:
        command_line.check_directory(_OUT.value or _WORKDIR.value, "--out")


def closed_loop(policy, workdir, out, began):
    """Trained policy, untrained policy and expert on the same episodes."""
    from lightwam_jax.evaluation import closed_loop as closed_loop_lib
    from lightwam_jax.evaluation import instructions
    from lightwam_jax.inference import latency

    with _remote(policy.config.evaluation.batch, workdir) as remote:
        rates = closed_loop_lib.evaluate(
            policy, _MODE.value, workdir, out, began, remote, _INSTRUCTION.value
        )
    out = instructions.directory(out, _INSTRUCTION.value)
    for name, by_task in rates.items():
        for task, rate in by_task.items():
            print(f"{name:<12}{f'{task:<30}  ' if len(by_task) > 1 else ''}{rate}")
    here = remote is None
    batch = policy.config.evaluation.batch
    print(latency.line(policy.deployed(), batch) if here else remote.line())
    print(f"summary     {out / 'summary.json'}\nreport      {out / 'report.html'}")


def realtime(policy, workdir, out, began):
    """The trained policy with plans that come late, executed in several ways."""
    del workdir
    from lightwam_jax.evaluation import instructions
    from lightwam_jax.evaluation import realtime as realtime_lib

    suite = _SUITE.value or policy.config.evaluation.suite
    if not suite:
        raise ValueError("--mode realtime needs a simulator; config.evaluation.suite names none")
    how = dict(kinds=_ACTION_KINDS.value, spread=_SPREAD.value)
    if _REAL.value:
        from lightwam_jax.evaluation import realtime_faults

        outcomes = realtime_faults.evaluate(policy, suite, out, **how)
        print(realtime_faults.text_table(outcomes))
        print(f"numbers     {out / 'realtime_real.json'}")
        if any(outcome.wrong for outcome in outcomes):
            command_line.fail("something reached the robot that must not; see above")
        return
    how["instruction"] = _INSTRUCTION.value
    cells = realtime_lib.evaluate(
        policy, suite, out, _LATENCY.value, _EXECUTION.value, began, **how
    )
    out = instructions.directory(out, _INSTRUCTION.value)
    print(realtime_lib.text_table(cells))
    print(f"numbers     {out / 'realtime.json'}\nreport      {out / 'realtime.html'}")


def _remote(batch, directory):
    """The `RemotePolicy` of --server, or a context of None."""
    if not _SERVER.value:
        return contextlib.nullcontext()
    from lightwam_jax.checkpoint import run, storage
    from lightwam_jax.evaluation import remote
    from lightwam_jax.inference import access

    if _STEP.value is not None:
        directory = directory / "checkpoints" / str(_STEP.value)
    checksum = storage.read_meta(run.find_checkpoint(directory))["checksum"]
    key = access.key_of_environment()
    return remote.RemotePolicy(_SERVER.value, f"{checksum:08x}", batch, key)


def compare(others):
    """Two results of closed-loop modes."""
    from lightwam_jax.evaluation import compare as compare_lib

    if len(others) != 1:
        raise app.UsageError("--compare takes two results: --compare runs/x runs/y")
    for place in filter(bucket.is_address, (_COMPARE.value, *others)):
        command_line.fail(f"--compare {place}: expected a directory or file; copy it here first")
    try:
        print(compare_lib.compare(_COMPARE.value, others[0], _MAY_DIFFER.value))
    except (ValueError, FileNotFoundError) as error:
        command_line.fail(error)


def open_loop(policy, workdir, out, began):
    """Action errors per dimension and step, and gripper timing, on the validation split."""
    del workdir, began
    from lightwam_jax.data import loader
    from lightwam_jax.evaluation import open_loop as open_loop_lib

    errors = open_loop_lib.evaluate(policy, loader.val_batches(policy.config))
    print(open_loop_lib.report(out / "open_loop", errors, policy, _EPISODES.value))
    print(f"report      {out / 'open_loop' / 'open_loop.html'}")
    print(next_command.after_open_loop(policy.config, _WORKDIR.value))


def visualize(policy, workdir, out, began):
    """Attention and imagined video on episodes of the validation split."""
    del workdir, began
    from lightwam_jax.evaluation import visualize as visualize_lib

    path, lines = visualize_lib.write(policy, out / "visualize")
    print("\n".join([*lines, f"report      {path}"]))


def _beside(workdir):
    """Where results go by default: into the run; those of an exported policy stay out of it."""
    from lightwam_jax.checkpoint import compact

    return f"runs/policies/{workdir.name}" if compact.is_compact(workdir) else workdir


def _with_flags(config):
    from lightwam_jax import envs

    tasks = tuple(_TASKS.value) if _TASKS.value else None
    env = {**config.evaluation.env, **envs.parse_arguments(_ENV.value)}
    given = dict(tasks=tasks, env=env, episodes=_EPISODES.value)
    given |= dict(first_seed=_SEED.value, workers=_WORKERS.value)
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))


if __name__ == "__main__":
    command_line.run(main)
