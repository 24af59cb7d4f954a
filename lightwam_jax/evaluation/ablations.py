"""Trains and evaluates the cells of `configs/ablations.py`, several seeds each, into one table.

  python -m lightwam_jax.evaluation.ablations --config configs/ablations.py --out runs/ablations

A run is a directory OUT/CELL/SEED: of train.py, with result.json when it is done. The same command
continues where it was stopped; two of them with different --seeds may share OUT. The table,
ablations.md, .png and .json in OUT, has every cell with a result, also of earlier commands.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import numpy as np
import scipy.stats
from absl import app, flags, logging
from ml_collections import config_flags

from configs import ablations as ablations_lib
from lightwam_jax import build, html_report
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
from lightwam_jax.evaluation import closed_loop, open_loop, report, rollout
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference.policy import Policy
from lightwam_jax.training import flops, loop, optimizer, workdir
from lightwam_jax.training import step as step_lib

COLUMNS = ("success", "action_l1")  # of a result; the means of the table


def plan(base, names):
    """Returns {cell: ConfigDict}, all checked before anything is trained.

    Raises:
      ValueError: an unknown cell, one the base cannot have, or two that are the same.
    """
    cells = {name: ablations_lib.cell(base, name) for name in names}
    seen = {}
    for name, c in cells.items():
        config_lib.from_config_dict(c)
        same = seen.setdefault(c.to_json_best_effort(), name)
        if same != name:
            raise ValueError(f"--cells: {name} is what {same} is, with this config; leave it out")
    return cells


def run(config, directory):
    """Trains and evaluates one seed of one cell, or continues; returns its result.

    Success is closed-loop where the config names a suite; the error of the actions is open-loop
    where it holds episodes out.

    Args:
      config: `Config`. directory: pathlib.Path of the run.

    Returns:
      {"success": {"successes", "episodes"} or None, "action_l1": float or None (normalised units),
      "flops": of a training step, "steps", "seed", "evaluation", "manifest"}, also in
      `result.json`; None if a signal stopped the training.

    Raises:
      ValueError: the run there is of another config. RuntimeError: episodes could not be run.
    """
    path = directory / "result.json"
    evaluation = json.loads(json.dumps(dataclasses.asdict(config.evaluation)))
    if path.exists():
        workdir.check_same_run(config, directory)
        result = json.loads(path.read_text())
        if (result["steps"], result["evaluation"]) == (config.train.steps, evaluation):
            return result
    if loop.train(config, directory).signal:
        return None
    policy = Policy.load(directory)
    success, manifest = _closed_loop(policy, directory)
    l1 = None
    if config.data.val_fraction:
        l1 = float(np.mean(open_loop.evaluate(policy, loader.val_batches(config))["l1"]))
    result = {
        "success": success,
        "action_l1": l1,
        "flops": _flops(config),
        "seed": config.seed,
        "steps": config.train.steps,
        "evaluation": evaluation,
        "manifest": manifest,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _closed_loop(policy, directory):
    config, suite = policy.config, policy.config.evaluation.suite
    if not suite:
        return None, closed_loop.manifest_of(policy)
    suite_run = suites_lib.of_config(config, suite)
    manifest = closed_loop.manifest_of(policy, suite_run)
    policy.warm_up([config.evaluation.batch])
    rate = report.rate(
        rollout.run(
            policy.act,
            suite_run.env,
            suite_run.episodes,
            config.evaluation,
            directory / "episodes.jsonl",
            report.log_manifest(manifest, manifest["weights"]),
            directory.parent.name,
        )
    )
    if rate.errors:
        raise RuntimeError(
            f"{rate.errors} of {len(suite_run.episodes)} episodes could not be run "
            f"({directory / 'episodes.jsonl'}); the same command tries them again"
        )
    return {"successes": rate.successes, "episodes": rate.episodes}, manifest


def _flops(config):
    model = build.build_model(config.model)
    update = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(
        lambda: step_lib.init_state(
            build.init_params(model, jax.random.key(0), config.model), config, update
        )
    )
    return flops.of_step(config, update, state)


# ---- the table ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds with a 95 % interval of Student's t; it may reach beyond 0 and 1.

    Attributes:
      values: one per seed.
    """

    values: tuple

    @property
    def value(self):
        """The mean."""
        return float(np.mean(self.values))

    @property
    def half(self):
        """Half of the interval's width; infinite for one seed."""
        n = len(self.values)
        if n < 2:
            return float("inf")
        return float(scipy.stats.t.ppf(0.975, n - 1) * np.std(self.values, ddof=1) / n**0.5)


def collect(out):
    """Returns {cell: [result]} of all that is done in `out`, cells in their order.

    A result is that of `run` and the number of "parameters", from the run's report.
    """
    found = {}
    for name in ablations_lib.CELLS:
        files = sorted(out.glob(f"{name}/*/result.json"), key=lambda path: int(path.parent.name))
        if files:
            found[name] = [
                json.loads(path.read_text()) | {"parameters": _parameters(path.parent)}
                for path in files
            ]
    return found


def _parameters(directory):
    rows = json.loads((directory / "params.json").read_text())
    return next(row["total"] for row in rows if row["group"] == "total")


def means(results):
    """Returns {"success", "action_l1": `Mean`} of the results of a cell that have them."""
    found = {column: [_value(result, column) for result in results] for column in COLUMNS}
    return {column: Mean(tuple(v)) for column, v in found.items() if None not in v}


def _value(result, column):
    value = result[column]
    return value["successes"] / value["episodes"] if isinstance(value, dict) else value


def difference(cell, base):
    """Returns the `Mean` over the seeds that both have of success in `cell` less that in `base`.

    One seed draws the same parameters (where both have them) and the same batches in both. None
    where they share no seed or have no success.
    """
    before = {result["seed"]: _value(result, "success") for result in base}
    pairs = [(_value(r, "success"), before[r["seed"]]) for r in cell if r["seed"] in before]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return Mean(tuple(new - old for new, old in pairs))


def markdown(results):
    """Returns the table of {cell: [result]} as Markdown.

    FLOPs are of a training step, relative to the first cell; differences are to it, too.
    """
    first = next(iter(results))
    head = [
        "cell",
        "what it is",
        "success, mean and 95 % interval",
        "each seed",
        f"less {first}, seed by seed",
        "action L1",
        "FLOPs",
        "parameters",
    ]
    rows = [head, ["---"] * len(head)]
    for name, cell in results.items():
        m, less = means(cell), difference(cell, results[first])
        success, each, l1, change = "not evaluated", "", "not evaluated", ""
        if "success" in m:
            success = f"{100 * m['success'].value:.0f} ± {100 * m['success'].half:.0f} %"
            each = ", ".join(f"{100 * value:.0f}" for value in m["success"].values)
        if less and name != first:
            change = f"{100 * less.value:+.0f} ± {100 * less.half:.0f} %"
        if "action_l1" in m:
            l1 = f"{m['action_l1'].value:.4f} ± {m['action_l1'].half:.4f}"
        rows.append(
            [
                name,
                ablations_lib.CELLS[name],
                success,
                each,
                change,
                l1,
                f"{cell[0]['flops'] / results[first][0]['flops']:.2f}",
                f"{cell[0]['parameters'] / 1e6:.2f} M",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_table(out):
    """Writes ablations.md, ablations.json and ablations.png into `out`; returns the first."""
    results = collect(out)
    (out / "ablations.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (out / "ablations.md").write_text(table)
    if all("success" in means(cell) for cell in results.values()):
        _chart(out / "ablations.png", results)
    return table


def _chart(path, results):
    """A row per cell; intervals (Student's t) are drawn from 0 to 100 only."""
    with html_report.chart(path, 9.4, 1.0 + 0.42 * len(results)) as axes:
        for row, cell in enumerate(results.values()):
            mean = means(cell)["success"]
            values = 100 * np.array(mean.values)
            if len(values) > 1:
                ends = np.clip([mean.value - mean.half, mean.value + mean.half], 0, 1)
                axes.plot(
                    100 * ends,
                    [row, row],
                    color=report.UNTRAINED,
                    lw=6,
                    solid_capstyle="butt",
                    alpha=0.6,
                )
            axes.plot(values, [row] * len(values), "o", color=report.TRAINED, ms=5, alpha=0.7)
            axes.plot(100 * mean.value, row, "|", color=html_report.INK, ms=16, mew=2)
        axes.set_yticks(
            range(len(results)), [ablations_lib.CELLS[name] for name in results], fontsize=10
        )
        axes.invert_yaxis()
        axes.set_xlim(-2, 102)
        axes.set_xlabel("episodes solved, %: seeds, mean, 95 % interval", fontsize=10)


# ---- the command line --------------------------------------------------------------------------


def main(argv):
    """See the top of this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
    logging.set_verbosity(logging.WARNING)
    try:
        seeds = [int(seed) for seed in given.seeds]
        cells = plan(given.config, given.cells)
        jobs = [(name, seed) for seed in seeds for name in cells]
        for k, (name, seed) in enumerate(jobs):
            c = cells[name].copy_and_resolve_references()
            c.seed += seed
            print(f"[{k + 1}/{len(jobs)}] {name}, seed {seed}", flush=True)
            began = time.monotonic()
            result = run(config_lib.from_config_dict(c), out / name / str(seed))
            if result is None:
                sys.exit("stopped; the same command continues")
            print(
                f"{name}, seed {seed}: {result['success']}, action L1 {result['action_l1']} "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            jax.clear_caches()  # of other shapes; the next seed finds them on the disk
            table = write_table(out)
        print(f"{table}\nwritten to {out}")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Base of the cells.", lock_config=True)
    flags.DEFINE_string("out", None, "Directory of the runs and the table.")
    flags.DEFINE_list(
        "cells", list(ablations_lib.MAIN), f"Some of {', '.join(ablations_lib.CELLS)}."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Added to config.seed.")
    flags.mark_flags_as_required(["config", "out"])
    app.run(main)
