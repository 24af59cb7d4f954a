"""The page of a run: training.html, from metrics.jsonl."""

import pathlib

from lightwam_jax import html_report, svg_chart
from lightwam_jax.training import metrics

# title: ({label: series}, logarithmic)
_TRAINED = {
    "Loss, mean of each log window": (
        {"total": "loss", "video": "loss_video", "action": "loss_action"},
        True,
    ),
    "Learning rate": ({"lr": "lr"}, False),
    "Gradient norm before clipping": ({"gradient norm": "grad_norm"}, True),
}
_SPEED = {
    "Samples per second": ({"samples/s": "samples_per_s"}, False),
    "Milliseconds per step": (
        {"step": "ms_step", "waiting for data": "ms_data", "device": "ms_device"},
        False,
    ),
}


def write(workdir, config):
    """Writes training.html into a run directory.

    Args: workdir: of the run, with its metrics.jsonl. config: `Config`.

    Returns:
      its path; None where nothing is logged yet.
    """
    workdir = pathlib.Path(workdir)
    series = metrics.read_series(workdir / "metrics.jsonl")
    if "train/loss" not in series:
        return None
    path, (steps, losses) = workdir / "training.html", series["train/loss"]
    sections = [html_report.Section("Training", "", tuple(_charts(series, "train", _TRAINED)))]
    if held_out := _validation(series):
        sections.insert(0, held_out)
    text = "The first window is left out: it holds what is compiled."
    later = {name: (x[1:], y[1:]) for name, (x, y) in series.items() if len(x) > 1}
    if speed := tuple(_charts(later, "train", _SPEED)):
        sections.append(html_report.Section("Speed", text, speed))
    facts = [(f"{steps[-1]:,}", f"of {config.train.steps:,} steps"), (f"{losses[-1]:.4g}", "loss")]
    if "eval/l1_mean" in series:
        facts.append((f"{min(series['eval/l1_mean'][1]):.4g}", "lowest validation L1"))
    if "train/samples_per_s" in later:
        facts.append((f"{later['train/samples_per_s'][1][-1]:.4g}", "samples per second"))
    manifest = {"run": config.name, "seed": config.seed, "batch_size": config.train.batch_size}
    headline, title = _headline(series, losses), f"Training · {config.name}"
    html_report.write_html(path, title, headline, facts, sections, manifest, "What was trained")
    return path


def _headline(series, losses):
    if "eval/l1_mean" in series:
        steps, values = series["eval/l1_mean"]
        said = "mean L1 of the actions on held-out data after step"
        return f"{values[-1]:.4g}", f"is the {said} {steps[-1]:,}, in normalised units."
    return f"{losses[-1]:.4g}", "is the last training loss. No data are held out."


def _validation(series):
    names = [name for name in series if name.startswith("eval/l1/")]
    errors = {f"action[{name.rsplit('/', 1)[1]}]": series[name] for name in names}
    if not errors:
        return None
    title = "L1 of each action dimension, normalised units"
    mean = svg_chart.Chart("Mean over dimensions", {"L1": series["eval/l1_mean"]}, "step", low=0.0)
    each = svg_chart.Chart(title, errors, "step", low=0.0)
    text = "Open-loop errors of the averaged weights, over whole chunks of held-out data."
    return html_report.Section("Validation", text, (mean, each))


def _charts(series, kind, wanted):
    """The charts of those series that were logged."""
    for title, (names, log) in wanted.items():
        found = {label: series.get(f"{kind}/{name}") for label, name in names.items()}
        found = {label: each for label, each in found.items() if each is not None}
        if found:
            low = {} if log else {"low": 0.0}
            yield svg_chart.Chart(title, found, "step", log=log, **low)
