"""Trains and evaluates the cells of a study, several seeds each, into one table.

  python -m lightwam_jax.evaluation.ablations --config configs/ablations.py --out runs/ablations

A study is a Python file (--study, default: configs/ablations.py) with CELLS, {name: what it is},
MAIN, the names that run without --cells, and cell(c, name), which changes a config to be that cell.
A run is a directory OUT/CELL/SEED: of train.py, with result.json when it is done. The same command
continues where it was stopped; two of them with different --seeds may share OUT. The table,
ablations.md, .png and .json in OUT, has every cell with a result, also of earlier commands.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time

import jax
import numpy as np
import scipy.stats
from absl import app, flags, logging
from ml_collections import config_flags

from lightwam_jax import command_line, html_report
from lightwam_jax import config as config_lib
from lightwam_jax.data import loader
from lightwam_jax.evaluation import closed_loop, open_loop, report, rollout
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.inference.policy import Policy
from lightwam_jax.training import flops, loop, workdir

COLUMNS = ("success", "action_l1")  # of a result; the means of the table


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

    Success is closed-loop where the config names a suite; the error of the actions is open-loop
    where it holds episodes out.

    Args:
      config: `Config`. directory: pathlib.Path of the run.

    Returns:
      {"success": {"successes", "episodes"} or None, "action_l1": float or None (normalised units),
      "flops": of a training step, "steps", "seed", "evaluation", "manifest"}, also in
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
    policy = Policy.load(directory)
    success, manifest = _closed_loop(policy, directory)
    l1 = None
    if config.data.val_fraction:
        l1 = float(np.mean(open_loop.evaluate(policy, loader.val_batches(config))["l1"]))
    result = {
        "success": success,
        "action_l1": l1,
        "flops": flops.of_step(config),
        "seed": config.seed,
        "steps": config.train.steps,
        "evaluation": evaluation,
        "manifest": manifest,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _closed_loop(policy, directory):
    config, suite = policy.config, policy.config.evaluation.suite
    if not suite:
        return None, closed_loop.manifest_of(policy)
    suite_run = suites_lib.of_config(config, suite)
    manifest = closed_loop.manifest_of(policy, suite_run)
    actor = policy.deployed()
    actor.warm_up([config.evaluation.batch])
    log = directory / "episodes.jsonl", report.log_manifest(manifest, manifest["weights"])
    results = rollout.run(
        actor.act,
        suite_run.env,
        suite_run.episodes,
        config.evaluation,
        *log,
        directory.parent.name,
    )
    rate = report.rate(results)
    if rate.errors:
        raise RuntimeError(
            f"{rate.errors} of {len(suite_run.episodes)} episodes could not be run "
            f"({log[0]}); the same command tries them again"
        )
    return {"successes": rate.successes, "episodes": rate.episodes}, manifest


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


def collect(out, names):
    """Returns {cell: [result]} of all that is done in `out`, cells in the order of `names`.

    A result is that of `run` and the number of "parameters", from the run's report.
    """
    found = {}
    for name in names:
        files = sorted(out.glob(f"{name}/*/result.json"), key=lambda path: int(path.parent.name))
        if files:
            found[name] = [
                json.loads(path.read_text(encoding="utf-8"))
                | {"parameters": _parameters(path.parent)}
                for path in files
            ]
    return found


def _parameters(directory):
    rows = json.loads((directory / "params.json").read_text(encoding="utf-8"))
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


def markdown(results, about):
    """Returns the table of {cell: [result]} as Markdown; `about` is {cell: what it is}.

    FLOPs are of a training step, relative to the first cell; differences are to it, too.
    """
    first = next(iter(results))
    head = "cell|what it is|success, mean and 95 % interval|each seed|"
    head = f"{head}less {first}, seed by seed|action L1|FLOPs|parameters".split("|")
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
        flops_ratio = f"{cell[0]['flops'] / results[first][0]['flops']:.2f}"
        parameters = f"{cell[0]['parameters'] / 1e6:.2f} M"
        rows.append([name, about[name], success, each, change, l1, flops_ratio, parameters])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_table(out, about):
    """Writes ablations.md, .json and .png into `out`; returns the first. See `markdown`."""
    results = collect(out, about)
    (out / "ablations.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = markdown(results, about)
    (out / "ablations.md").write_text(table, encoding="utf-8")
    if all("success" in means(cell) for cell in results.values()):
        _chart(out / "ablations.png", results, about)
    return table


def _chart(path, results, about):
    """A row per cell; intervals (Student's t) are drawn from 0 to 100 only."""
    with html_report.chart(path, 9.4, 1.0 + 0.42 * len(results)) as axes:
        for row, cell in enumerate(results.values()):
            mean = means(cell)["success"]
            values = 100 * np.array(mean.values)
            if len(values) > 1:
                ends = np.clip([mean.value - mean.half, mean.value + mean.half], 0, 1)
                style = dict(color=report.UNTRAINED, lw=6, solid_capstyle="butt", alpha=0.6)
                axes.plot(100 * ends, [row, row], **style)
            axes.plot(values, [row] * len(values), "o", color=report.TRAINED, ms=5, alpha=0.7)
            axes.plot(100 * mean.value, row, "|", color=html_report.INK, ms=16, mew=2)
        axes.set_yticks(range(len(results)), [about[name] for name in results], fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(-2, 102)
        axes.set_xlabel("episodes solved, %: seeds, mean, 95 % interval", fontsize=10)


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
    logging.set_verbosity(logging.WARNING)
    try:
        seeds = [int(seed) for seed in given.seeds]
        study = _study(given.study)
        cells = plan(given.config, given.cells or study.MAIN, study.cell)
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
            table = write_table(out, study.CELLS)
        print(f"{table}\nwritten to {out}")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Base of the cells.", lock_config=True)
    flags.DEFINE_string("out", None, "Directory of the runs and the table.")
    flags.DEFINE_string("study", "configs/ablations.py", "Python file that defines the cells.")
    flags.DEFINE_list("cells", None, "Names of CELLS in the study; default: its MAIN.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Added to config.seed.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
