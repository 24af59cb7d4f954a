"""Two evaluations side by side, if they measured the same thing."""

import json
import pathlib

from lightwam_jax.data.caches import journal
from lightwam_jax.evaluation import report

# The policies may differ, that is what is compared, and so may what cannot change a result.
FREE = (
    *("config", "model", "step", "weights", "commit", "workers", "demonstrated_seeds"),
    "remote.url",
)


def compare(one, other, may_differ=()):
    """Returns a table of both success rates with intervals, per task and over all.

    Args:
      one, other: summary.json files, or directories that hold one.
      may_differ: dotted keys of the manifest (a key stands for all below it) that may differ too.

    Raises:
      FileNotFoundError: no summary there.
      ValueError: manifests that differ in anything else.
    """
    files = [pathlib.Path(path) for path in (one, other)]
    files = [path / "summary.json" if path.is_dir() else path for path in files]
    summaries = [_summary(path, given) for path, given in zip(files, (one, other))]
    unlike = journal.differences(*(summary["manifest"] for summary in summaries))
    allowed = (*FREE, *may_differ)
    told = {
        key: values
        for key, values in unlike.items()
        if any(key == free or key.startswith(f"{free}.") for free in allowed)
    }
    if refused := {key: values for key, values in unlike.items() if key not in told}:
        raise ValueError(
            f"these evaluations did not measure the same thing:\n{_listed(refused)}\n"
            f"If that is meant, say so: --may_differ={','.join(refused)}"
        )
    rows = [("", str(files[0]), str(files[1]))]
    tasks = dict.fromkeys(task for summary in summaries for task in summary["tasks"])
    for task in tasks if len(tasks) > 1 else ():
        found = [summary["tasks"].get(task, {}).get("trained") for summary in summaries]
        rows.append((task, *map(_rate, found)))
    totals = [
        summary | {"successes": round(summary["success_rate"] * summary["episodes"])}
        for summary in summaries
    ]
    rows.append(("all", *map(_rate, totals)))
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
    table = "\n".join(
        "".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows
    )
    return table + (f"\n\nThey differ in:\n{_listed(told)}" if told else "")


def _summary(path, given):
    """The content of a summary.json.

    Raises:
      FileNotFoundError: none there. ValueError: another file.
    """
    if not path.is_file():
        if not pathlib.Path(given).exists():
            raise FileNotFoundError(f"--compare {given}: no such file or directory")
        raise FileNotFoundError(
            f"--compare {given}: no summary.json in it; a closed-loop evaluation writes it "
            "(python evaluate.py --workdir RUN --mode demo|libero|metaworld)"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--compare {given}: {path} is no JSON file: {error}") from error
    needed = {"manifest", "tasks", "success_rate", "episodes"}
    if not isinstance(summary, dict) or needed - set(summary):
        raise ValueError(
            f"--compare {given}: {path} is no summary.json of a closed-loop evaluation; expected "
            f"{', '.join(sorted(needed))} in it"
        )
    return summary


def _rate(numbers):
    if numbers is None:
        return "not evaluated"
    return str(report.Rate(*(numbers[name] for name in ("successes", "episodes", "errors"))))


def _listed(unlike):
    return "\n".join(f"  {key}: {one!r} against {other!r}" for key, (one, other) in unlike.items())
