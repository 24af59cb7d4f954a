"""Trains and evaluates the cells of a study, several seeds each, into one table.

  python -m lightwam_jax.evaluation.ablations --config configs/ablations.py --out runs/ablations

A study is a Python file (--study, default: configs/ablations.py) with CELLS, {name: what it is},
MAIN, the names that run without --cells, and cell(c, name), which changes a config to be that cell.
A run is a directory OUT/CELL/SEED: of train.py, with result.json when it is done. The same command
continues where it was stopped; two of them with different --seeds may share OUT. The table
(`ablations_table`) in OUT has every cell with a result, also of earlier commands.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from lightwam_jax import command_line
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
from lightwam_jax.evaluation import ablations_table, closed_loop, open_loop, report, rollout
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference import latency
from lightwam_jax.inference.policy import Policy
from lightwam_jax.training import flops, loop, workdir

_TIMED_CALLS = 50


def plan(base, names, cell):
    """Returns {name: ConfigDict}, all checked before anything is trained.

    Args:
      base: ConfigDict. names: of cells. cell: function (base, name) -> ConfigDict.

    Raises:
      ValueError: an unknown cell, one the base cannot have, or two that are the same.
    """
    cells = {name: cell(base, name) for name in names}
    seen = {}
    for name, c in cells.items():
        config_lib.from_config_dict(c)
        same = seen.setdefault(c.to_json_best_effort(), name)
        if same != name:
            raise ValueError(f"--cells: {name} is what {same} is, with this config; leave it out")
    return cells


def run(config, directory):
    """Trains and evaluates one seed of one cell, or continues; returns its result.

    Success is closed-loop where the config names a suite, of every checkpoint where all are kept
    (`config.train.keep_last=0`), else of the last alone. The error of the actions is open-loop
    where the config holds episodes out.

    Args:
      config: `Config`. directory: pathlib.Path of the run.

    Returns:
      {"success": {"successes", "episodes"} or None, "curve": [that and "step"] of what was
      evaluated, "action_l1": float or None (normalised units), "flops": of a training step,
      "latency_ms": of a plan at batch 1, "steps", "seed", "evaluation", "manifest"}, also in
      `result.json`.

    Raises:
      ValueError: the run there is of another config. RuntimeError: episodes could not be run.
      SystemExit: a signal stopped the training; 128 + its number.
    """
    path = directory / "result.json"
    evaluation = json.loads(json.dumps(dataclasses.asdict(config.evaluation)))
    if path.exists():
        workdir.check_same_run(config, directory)
        result = json.loads(path.read_text(encoding="utf-8"))
        if (result["steps"], result["evaluation"]) == (config.train.steps, evaluation):
            return result
    if stopped := loop.train(config, directory).signal:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + stopped)
    policy, curve = Policy.load(directory), []
    for step in _steps(config) if config.evaluation.suite else ():
        success, manifest = _closed_loop(directory, step)
        curve.append(success | {"step": step})
    if not curve:
        success, manifest = None, closed_loop.manifest_of(policy)
    l1 = None
    if config.data.val_fraction:
        l1 = float(np.mean(open_loop.evaluate(policy, loader.val_batches(config))["l1"]))
    result = {
        "success": success,
        "curve": curve,
        "action_l1": l1,
        "flops": flops.of_step(config),
        "latency_ms": _latency(policy),
        "seed": config.seed,
        "steps": config.train.steps,
        "evaluation": evaluation,
        "manifest": manifest,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _steps(config):
    """The checkpoints to evaluate, also of a run that was interrupted and so saved at others."""
    t = config.train
    early = range(t.checkpoint_every, t.steps, t.checkpoint_every) if t.checkpoint_every else ()
    return [*(early if t.keep_last == 0 else ()), t.steps]


def _latency(policy):
    actor, observed = policy.deployed(), latency.observation(policy.config, 1)
    latency.measure(actor, observed, calls=1)  # may compile
    return latency.percentiles(latency.measure(actor, observed, _TIMED_CALLS))["p50_ms"]


def _closed_loop(directory, step):
    """Returns {"successes", "episodes"} of a checkpoint, and the manifest."""
    policy = Policy.load(directory, step)
    config = policy.config
    suite_run = suites_lib.of_config(config, config.evaluation.suite)
    manifest = closed_loop.manifest_of(policy, suite_run)
    actor = policy.deployed()
    actor.warm_up([config.evaluation.batch])
    results = rollout.run(
        actor.act,
        suite_run.env,
        suite_run.episodes,
        config.evaluation,
        directory / f"episodes_{step}.jsonl",
        report.log_manifest(manifest, manifest["weights"]),
        f"{directory.parent.name}, step {step}",
    )
    rate = report.rate(results)
    if rate.errors:
        raise RuntimeError(
            f"{rate.errors} of {len(suite_run.episodes)} episodes could not be run "
            f"({directory}/episodes_{step}.jsonl); the same command tries them again"
        )
    return {"successes": rate.successes, "episodes": rate.episodes}, manifest


# ---- the command line --------------------------------------------------------------------------


def _study(path):
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv):
    """See the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
    try:
        seeds = [int(seed) for seed in given.seeds]
        study = _study(given.study)
        cells = plan(given.config, given.cells or study.MAIN, study.cell)
        ablations_table.collect(out, study.CELLS)  # complains of what the table could not have
        jobs = [(name, seed) for seed in seeds for name in cells]
        for k, (name, seed) in enumerate(jobs):
            c = cells[name].copy_and_resolve_references()
            c.seed += seed
            print(f"[{k + 1}/{len(jobs)}] {name}, seed {seed}", flush=True)
            began = time.monotonic()
            result = run(config_lib.from_config_dict(c), out / name / str(seed))
            print(
                f"{name}, seed {seed}: {result['success']}, action L1 {result['action_l1']} "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            jax.clear_caches()  # of other shapes; the next seed finds them on the disk
            table = ablations_table.write(out, study.CELLS)
        print(f"{table}\nwritten to {out}")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Base of the cells.", lock_config=True)
    flags.DEFINE_string("out", None, "Directory of the runs and the table.")
    flags.DEFINE_string("study", "configs/ablations.py", "Python file that defines the cells.")
    flags.DEFINE_list("cells", None, "Names of CELLS in the study; default: its MAIN.")
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Added to config.seed.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
