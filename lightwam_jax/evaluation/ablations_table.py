"""The results of a study as one table: means over seeds, what they leave open, and two charts.

`write` makes ablations.md, .json, .png (success of each seed) and ablations_curves.png (success at
each checkpoint) of the result.json that `ablations.run` left in every run.
"""

import dataclasses
import itertools
import json

import numpy as np
import scipy.stats

from lightwam_jax import html_report
from lightwam_jax.evaluation import report

COLUMNS = ("success", "action_l1")  # of a result; the means of the table
SOLVED = 0.9  # the share of episodes whose first checkpoint is told
_RELATIVE = ("flops", "latency_ms")  # columns that are told as shares of the first cell's


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds with a 95 % interval of Student's t.

    Attributes:
      values: one per seed.
      least, most: what a value can be; the interval ends there, as nothing beyond is possible.
    """

    values: tuple
    least: float = -np.inf
    most: float = np.inf

    @property
    def value(self):
        """The mean."""
        return float(np.mean(self.values))

    @property
    def ends(self):
        """(low, high) of the interval: all that is possible for one seed."""
        n, half = len(self.values), np.inf
        if n > 1:
            half = scipy.stats.t.ppf(0.975, n - 1) * np.std(self.values, ddof=1) / n**0.5
        low, high = np.clip([self.value - half, self.value + half], self.least, self.most)
        return float(low), float(high)

    def percent(self, sign=""):
        """Returns "51 (0 to 100) %"; with sign "+" also signs."""
        low, high = self.ends
        return f"{100 * self.value:{sign}.0f} ({100 * low:{sign}.0f} to {100 * high:{sign}.0f}) %"


def collect(out, names):
    """Returns {cell: [result]} of all that is done in `out`, cells in the order of `names`.

    A result is that of `ablations.run` and the number of "parameters", from the run's report.

    Raises:
      ValueError: one of an older version, which lacks the curve.
    """
    found = {}
    for name in names:
        files = sorted(out.glob(f"{name}/*/result.json"), key=lambda path: int(path.parent.name))
        if files:
            found[name] = [_read(path) for path in files]
    return found


def _read(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    if "curve" not in result:
        raise ValueError(
            f"{path} is of an older version, which evaluated the last checkpoint only; delete it, "
            "and run the same command again"
        )
    rows = json.loads((path.parent / "params.json").read_text(encoding="utf-8"))
    return result | {"parameters": next(r["total"] for r in rows if r["group"] == "total")}


def means(results):
    """Returns {"success", "action_l1": `Mean`} of the results of a cell that have them."""
    found = {column: [_value(result, column) for result in results] for column in COLUMNS}
    most = {"success": 1.0, "action_l1": np.inf}
    return {c: Mean(tuple(v), 0.0, most[c]) for c, v in found.items() if None not in v}


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
    return Mean(tuple(new - old for new, old in pairs), -1.0, 1.0)


def solved_at(result):
    """Returns the step of the first checkpoint with `SOLVED` of its episodes solved; inf: none."""
    steps = (p["step"] for p in result["curve"] if p["successes"] >= SOLVED * p["episodes"])
    return next(steps, np.inf)


def _steps(results):
    """The median over seeds of `solved_at`, with the least and the most: "1500 (1000 to 2000)"."""
    if any(len(result["curve"]) < 2 for result in results):
        return "not evaluated"
    found = np.sort([solved_at(result) for result in results])
    last = max(point["step"] for result in results for point in result["curve"])
    # The lower of two middles: a mean with a run that never got there would be no number.
    low, middle, high = (found[i] for i in (0, (len(found) - 1) // 2, -1))
    said = [f"{step:.0f}" if np.isfinite(step) else f"> {last}" for step in (middle, low, high)]
    return f"{said[0]} ({said[1]} to {said[2]})"


def markdown(results, about):
    """Returns the table of {cell: [result]} as Markdown; `about` is {cell: what it is}.

    FLOPs (of a training step) and latency (of a plan) are relative to the first cell; differences
    are to it, too.
    """
    first = next(iter(results))
    head = ["cell", "what it is", "success, mean and 95 % interval", "each seed"]
    head += [f"less {first}, seed by seed", f"steps to {100 * SOLVED:.0f} %, median and range"]
    head += ["action L1", "FLOPs", "latency", "parameters"]
    rows = [head, ["---"] * len(head)]
    rows += [[name, about[name], *_row(results, name)] for name in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(results, name):
    first, cell = next(iter(results)), results[name]
    m, less = means(cell), difference(cell, results[first])
    success, each, l1, change = "not evaluated", "", "not evaluated", ""
    if "success" in m:
        success = m["success"].percent()
        each = ", ".join(f"{100 * value:.0f}" for value in m["success"].values)
    if less is not None and name != first:
        change = less.percent("+")
    if "action_l1" in m:
        l1 = f"{m['action_l1'].value:.4f} ({min(m['action_l1'].values):.4f} to "
        l1 += f"{max(m['action_l1'].values):.4f})"
    ratio = [f"{_middle(cell, of) / _middle(results[first], of):.2f}" for of in _RELATIVE]
    parameters = f"{cell[0]['parameters'] / 1e6:.2f} M"
    return [success, each, change, _steps(cell), l1, *ratio, parameters]


def _middle(results, column):
    return float(np.median([result[column] for result in results]))


def write(out, about):
    """Writes ablations.md, .json and the charts into `out`; returns the first. See `markdown`."""
    results = collect(out, about)
    (out / "ablations.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = markdown(results, about)
    (out / "ablations.md").write_text(table, encoding="utf-8")
    if all("success" in means(cell) for cell in results.values()):
        _chart(out / "ablations.png", results, about)
        _curves(out / "ablations_curves.png", results, about)
    return table


def _chart(path, results, about):
    """A row per cell: each seed, the mean and its interval."""
    with html_report.chart(path, 9.4, 1.0 + 0.42 * len(results)) as axes:
        for row, cell in enumerate(results.values()):
            mean = means(cell)["success"]
            values = 100 * np.array(mean.values)
            if len(values) > 1:
                style = dict(color=report.UNTRAINED, lw=6, solid_capstyle="butt", alpha=0.6)
                axes.plot(100 * np.array(mean.ends), [row, row], **style)
            axes.plot(values, [row] * len(values), "o", color=report.TRAINED, ms=5, alpha=0.7)
            axes.plot(100 * mean.value, row, "|", color=html_report.INK, ms=16, mew=2)
        axes.set_yticks(range(len(results)), [about[name] for name in results], fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(-2, 102)
        axes.set_xlabel("episodes solved, %: seeds, mean, 95 % interval", fontsize=10)


def _curves(path, results, about):
    """A line per cell: the mean over seeds at each checkpoint they share; a band of their range."""
    with html_report.chart(path, 9.4, 5.0) as axes:
        colours = itertools.cycle(html_report.COLOURS)
        for (name, cell), colour in zip(results.items(), colours):
            seeds = [_shares(result) for result in cell]
            steps = sorted(set.intersection(*map(set, seeds)))
            table = 100 * np.array([[seed[step] for step in steps] for seed in seeds])
            axes.plot(steps, table.mean(0), "o-", color=colour, ms=3, lw=1.5, label=about[name])
            axes.fill_between(steps, table.min(0), table.max(0), color=colour, alpha=0.1, lw=0)
        axes.set_ylim(-2, 102)
        axes.set_xlabel("training step", fontsize=10)
        axes.set_ylabel("episodes solved, %: mean and range over seeds", fontsize=10)
        axes.legend(frameon=False, fontsize=8)


def _shares(result):
    return {point["step"]: point["successes"] / point["episodes"] for point in result["curve"]}
