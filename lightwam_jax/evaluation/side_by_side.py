"""Evaluations of one policy beside each other: language controls, perturbed suites.

A run's results and those in directories below it (`instruction_other`, or `--out` of another
suite's tasks) are of one policy if their manifests have the hash of the same weights.
"""

import json

from lightwam_jax import html_report
from lightwam_jax.evaluation import instructions, report

WHO = ("trained", "untrained", "expert")
_MOST = 60  # tasks with rows of their own


def found(base):
    """Returns {name of the directory: summary} of the results in `base` and directly below it.

    That of `base`, as "", is the first. Only those of the weights that were evaluated last.

    Args:
      base: pathlib.Path.
    """
    summaries = {}
    for file in (base / "summary.json", *sorted(base.glob("*/summary.json"))):
        if file.exists():
            name = "" if file.parent == base else file.parent.name
            summaries[name] = json.loads(file.read_text(encoding="utf-8"))
    if not summaries:
        return {}
    age = lambda name: (base / name / "summary.json").stat().st_mtime
    weights = summaries[max(summaries, key=age)]["manifest"]["weights"]
    return {n: s for n, s in summaries.items() if s["manifest"]["weights"] == weights}


def columns(summaries):
    """Returns {what was run: {label: `report.Rate`}} of `found`.

    What was run: "trained", "untrained", "expert", or what the trained policy was given instead of
    its instruction. A label is "all", a directory's name where its tasks are others than the
    first's, or a task. Of summaries of the same tasks, those with other settings than the first's
    are left out: their numbers are not comparable.
    """
    table, first = {}, next(iter(summaries.values()))["manifest"] if summaries else None
    for name, summary in summaries.items():
        manifest = summary["manifest"]
        same = manifest["tasks"] == first["tasks"]
        if same and _settings(manifest) != _settings(first):
            continue
        control = manifest.get("instruction", "right")
        for who in WHO:
            if (total := _total(summary, who)) is None:
                continue
            column = who if control == "right" else f"given {instructions.LABELS[control]}"
            rates = table.setdefault(column, {})
            rates["all" if same else name] = total
            if len(summary["tasks"]) in range(2, _MOST):
                rates |= {
                    task: _rate(by[who]) for task, by in summary["tasks"].items() if who in by
                }
    return table


def rows(table):
    """Returns the rows of a table of `columns`, the first of them its header."""
    labels = dict.fromkeys(label for rates in table.values() for label in rates)
    cells = lambda label: [report.brief(r[label]) if label in r else "" for r in table.values()]
    return (("", *table), *((label, *cells(label)) for label in labels))


def sections(base, out, directory):
    """Returns [the section of a report], or [] where there is nothing to compare with.

    Args:
      base: pathlib.Path of the policy's results. out: of those that the report is of.
      directory: of its images.
    """
    summaries = found(base)
    table = columns(summaries)
    if len(summaries) < 2 or out.name not in (*summaries, base.name):
        return []
    totals = {who: rates["all"] for who, rates in table.items() if "all" in rates}
    chart = directory / "side_by_side.png"
    report.success_chart(chart, totals)
    text = (
        "All evaluations of this policy that lie in this directory. Given no instruction, or that "
        "of another task, a policy that reads its instruction fails; one that succeeds as often as "
        "before does not need it here. Success is always that of the episode's own task."
    )
    media = (html_report.Media(chart, wide=True),)
    return [html_report.Section("Side by side", text, media, rows(table), whole=True)]


def _settings(manifest):
    return {key: manifest.get(key) for key in (*report.DECISIVE, "seeds")}


def _total(summary, who):
    by_task = [by[who] for by in summary["tasks"].values() if who in by]
    if not by_task:
        return None
    names = ("successes", "episodes", "errors")
    return report.Rate(*(sum(numbers[name] for numbers in by_task) for name in names))


def _rate(numbers):
    return report.Rate(*(numbers[name] for name in ("successes", "episodes", "errors")))
