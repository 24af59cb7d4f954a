"""What the dataset doctor found: as text for the terminal, as JSON, and as a page."""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile

import numpy as np
from PIL import Image

from lightwam_jax import html_report
from lightwam_jax.data.doctor import examine, player
from lightwam_jax.data.episodes import many

_LISTED = 3  # warnings of a kind that the terminal shows; errors are all shown
_ROWS = 50  # problems of a kind on the page
_BLUE, _SOFT = "#2563eb", "#a3adba"
_DEFAULT = "Repair the file, or list the episode in config.data.exclude."


def directory(config):
    """Returns where the report of a `Config` belongs: <config.data.cache>/doctor[_MEMBER]."""
    dataset = config.data.dataset
    return os.path.join(config.data.cache, f"doctor_{dataset}" if dataset else "doctor")


def verdict(report):
    """Returns e.g. "2 errors, 3 warnings in 50 episodes" or "No problem found in 50 episodes"."""
    return f"{_counts(report)} in {many(len(report.ids), 'episode')}"


def text(report):
    """Returns the report as lines for a terminal: every error, the first warnings of each kind."""
    lines = [verdict(report)]
    lines += [f"  {label:<10}{value}" for label, value in _facts(report)]
    for (severity, kind), found in _by_kind(report.problems):
        shown = found if severity == "error" else found[:_LISTED]
        lines.append(f"{severity.upper()} {kind} ({len(found)}): {_advice(kind)}")
        lines += [f"  {_where(p)}: {p.message}" for p in shown]
        if len(found) > len(shown):
            lines.append(f"  ... and {len(found) - len(shown)} more, all in report.json")
    if flag := exclude_flag(report):
        lines.append(f"To leave the episodes with errors out: {flag}")
    return "\n".join(lines)


def exclude_flag(report):
    """Returns the flag that leaves the episodes with errors out; "" where that helps nothing.

    It does not where the whole set has an error, or no episode would be left.
    """
    broken = tuple(dict.fromkeys(p.episode for p in report.errors if p.episode))
    if len(broken) == len(report.ids) or not all(p.episode for p in report.errors):
        return ""
    every = (*report.data.exclude, *broken)
    return f'--config.data.exclude="{every}"' if broken else ""


def refuse_errors(report, page):
    """Raises ValueError where there are errors; it does not list them: `text` was printed."""
    if report.errors:
        raise ValueError(
            f"{many(len(report.errors), 'error')} in the episodes of config.data.path="
            f"{report.data.path!r}, listed above and in {page}: nothing is computed from them; "
            "repair the data, and run the same command again"
        )


def write(report, directory):
    """Writes report.html and report.json into `directory`; returns the paths of both."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "report.html", directory / "report.json"
    paths[1].write_text(
        json.dumps(to_json(report), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    tone = "bad" if report.errors else "" if report.warnings else "good"
    title = f"Dataset doctor · {report.data.source} · {report.data.path}"
    meaning = f"in {many(len(report.ids), 'episode')}. Images: {_seen(report.images)}."
    headline, used = (_counts(report), meaning), {"config.data": dataclasses.asdict(report.data)}
    with tempfile.TemporaryDirectory() as images:
        page = headline, _cards(report), _sections(report, pathlib.Path(images)), used
        html_report.write_html(paths[0], title, *page, "Examined with", tone)
    return paths


def to_json(report):
    """Returns the report without its images as plain JSON types."""

    def plain(histogram):
        if histogram is None:
            return None
        edges, counts = histogram.edges.tolist(), histogram.counts.tolist()
        known = {"label": histogram.label, "guessed": histogram.guessed}
        return known | {"edges": edges, "counts": counts}

    images = report.images
    problems = [p._asdict() | {"advice": _advice(p.kind)} for p in report.problems]
    return {
        "verdict": verdict(report),
        "errors": len(report.errors),
        "warnings": len(report.warnings),
        "problems": problems,
        "episodes": len(report.ids),
        "steps": int(report.lengths.sum()),
        "hours": report.hours,
        "lengths": report.lengths.tolist(),
        "short_on_purpose": [{"steps": s, "episodes": n} for s, n in report.begun.items()],
        "fps": [{"fps": fps, "episodes": n} for fps, n in report.fps.items()],
        "tasks": report.tasks,
        "cameras": [dataclasses.asdict(c) for c in images.cameras],
        "images": {"which": images.which, "decoded": images.decoded, "total": images.total},
        "columns": [dataclasses.asdict(c) for c in report.columns],
        "grippers": [plain(h) for h in report.grippers],
        "normalized": plain(report.normalized),
        "drift": report.drift and dataclasses.asdict(report.drift),
        "seconds": round(report.seconds, 2),
        "config.data": dataclasses.asdict(report.data),
    }


# ---- words ---------------------------------------------------------------------------------------


def _counts(report):
    errors, warnings = len(report.errors), many(len(report.warnings), "warning")
    if errors:
        return f"{many(errors, 'error')}, {warnings}"
    return f"No error, {warnings}" if report.warnings else "No problem found"


def _advice(kind):
    return examine.ADVICE.get(kind, _DEFAULT)


def _where(problem, root=""):
    """The episode, its file (without `root`) and the frame."""
    place = [str(problem.file).removeprefix(root)] if problem.file else []
    place += [f"frame {problem.frame}"] if problem.frame is not None else []
    return (problem.episode or "the dataset") + (f" ({', '.join(place)})" if place else "")


def _by_kind(problems):
    """[((severity, kind), its problems)]."""
    groups = itertools.groupby(problems, lambda p: (p.severity, p.kind))
    return [(key, list(group)) for key, group in groups]


def _time(hours):
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _rates(report):
    return ", ".join(f"{fps:g}" for fps in sorted(report.fps)) or "unknown"


def _seen(images):
    if not images.decoded:
        return images.which
    return f"{images.decoded:,} of {images.total:,} decoded: {images.which}"


def _drift(drift):
    if drift is None:
        return "not recorded"
    off = f"{drift.seconds:.3g} s" if drift.seconds >= 1 else f"{drift.seconds * 1000:.3g} ms"
    return f"at most {off} off ({drift.episode}, frame {drift.frame})"


def _begun(report):
    return ", ".join(f"{many(n, 'episode')} of {many(s, 'step')}" for s, n in report.begun.items())


def _facts(report):
    """[(label, value)] of the terminal."""
    tasks, lengths = list(report.tasks), report.lengths
    named = "; ".join(tasks[:3]) + ("; ..." if len(tasks) > 3 else "")
    steps, long = many(int(lengths.sum()), "step"), "none readable"
    if len(lengths):
        long = f"{lengths.min()} / {np.median(lengths):g} / {lengths.max()} steps"
    recorded = f"{steps}, {_time(report.hours)} at {_rates(report)} fps; min / median / max {long}"
    cameras = [
        " ".join([c.name, ", ".join(c.sizes) or "not seen", *sorted(c.codecs)])
        for c in report.images.cameras
    ]
    begun = [("short", f"{_begun(report)}, on purpose")] if report.begun else []
    return [
        ("data", f"{report.data.source}, {report.data.path}"),
        ("recorded", recorded),
        *begun,
        ("cameras", "; ".join(cameras) or ", ".join(report.data.cameras)),
        ("tasks", f"{len(tasks)}: {named}"),
        ("times", _drift(report.drift)),
        ("images", _seen(report.images)),
    ]


# ---- the page ------------------------------------------------------------------------------------


def _cards(report):
    lengths, long, median = report.lengths, "-", "none readable"
    if len(lengths):
        long = f"{lengths.min()} to {lengths.max()}"
        median = f"steps long, median {np.median(lengths):g}"
    return [
        many(len(report.ids), "episode").split(),
        many(int(lengths.sum()), "step").split(),
        (_time(report.hours), f"at {_rates(report)} fps"),
        (long, median),
        many(len(report.tasks), "instruction").split(),
        (f"{report.seconds:.1f} s", "to examine"),
    ]


def _sections(report, directory):
    """The sections of the page; charts and images are written into `directory`."""
    found = {p.severity for p in report.problems}
    if "error" in found:
        yield _problems(report, "error", "Errors")
    if "warning" in found:
        yield _problems(report, "warning", "Warnings")
    if report.images.examples:
        yield html_report.Section(
            "What the cameras saw, and the canvas the model will see",
            "First, middle and last step. Is every image upright, are its colours right, "
            "does the canvas show what matters?",
            tuple(media for e in report.images.examples for media in _example(e, directory)),
        )
    if report.images.played:
        yield player.section(report.images.played, directory)
    if len(report.lengths):
        caption = "Steps per episode; the dashed line is a window."
        chart = html_report.Media(_lengths_chart(report, directory), caption, wide=True)
        text = f"Timestamps: {_drift(report.drift)}."
        text += f" Short on purpose: {_begun(report)}." if report.begun else ""
        yield html_report.Section("Lengths and tasks", text, (chart,), _task_table(report))
    if report.columns:
        yield html_report.Section(
            "Actions", _actions_text(report), tuple(_action_charts(report, directory))
        )
        yield html_report.Section(
            "State and action, dimension by dimension",
            "Over all steps of the episodes without errors, each step counting the same, in "
            "physical units. Beyond 5σ: share of steps further from the mean. Moves: share of "
            "steps unlike the one before. Clipped: share that normalisation cuts at ±5.",
            table=_column_table(report),
        )


def _problems(report, severity, title):
    rows = [("kind", "where", "what was found", "what to do")]
    root = report.data.path.rstrip("/") + "/"
    for (level, kind), found in _by_kind(report.problems):
        if level != severity:
            continue
        name, advice = f"{kind} ({len(found):,})", _advice(kind)
        for problem in found[:_ROWS]:
            rows.append((name, _where(problem, root), problem.message, advice))
            name = advice = ""  # once per kind
        if len(found) > _ROWS:
            rows.append(("", f"... and {len(found) - _ROWS:,} more", "all are in report.json", ""))
    text, flag = "Training is possible; look at these first.", exclude_flag(report)
    if severity == "error":
        instead = f", or left out with {flag}" if flag else ""
        text = f"Nothing is computed from these data until they are repaired{instead}."
    return html_report.Section(title, text, table=tuple(rows), whole=severity == "error")


def _example(example, directory):
    """Yields the strips of one episode: one for each camera, and the canvas."""
    steps = f"steps {', '.join(map(str, example.steps))} of {example.episode}"
    for name, images in (example.raw | {"canvas": example.canvas}).items():
        path = directory / f"{len(list(directory.iterdir()))}.png"
        _strip(images).save(path)
        caption = f"{name}, {images.shape[1]}x{images.shape[2]} · {steps}"
        if images is example.canvas:
            yield html_report.Media(path, f"{caption} · “{example.task}”", "canvas", wide=True)
        else:
            yield html_report.Media(path, caption, "camera")


def _strip(images, height=200, gap=6):
    """uint8 [k, H, W, 3] -> Image, side by side. Small ones are enlarged by whole pixels."""
    _, h, w, _ = images.shape
    scale = height // h if h <= height else height / h
    size = round(w * scale), round(h * scale)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (len(images) * (size[0] + gap) - gap, size[1]), "white")
    for i, image in enumerate(images):
        strip.paste(Image.fromarray(image).resize(size, how), (i * (size[0] + gap), 0))
    return strip


def _lengths_chart(report, directory):
    path = directory / "lengths.png"
    window = max(report.data.num_frames, report.data.action_horizon)
    with html_report.chart(path, 9.6, 2.2) as axes:
        spread = int(np.ptp(report.lengths)) + 1
        axes.hist(report.lengths, bins=min(40, spread), color=_BLUE)
        axes.axvline(window, color=html_report.INK, lw=1, ls="--")
        axes.set_xlabel("steps")
        axes.set_ylabel("episodes")
    return path


def _task_table(report):
    ranked = sorted(report.tasks.items(), key=lambda item: -item[1])
    rows = [(task, f"{count:,}") for task, count in ranked[:_ROWS]]
    if len(ranked) > _ROWS:
        rows.append((f"... and {len(ranked) - _ROWS:,} more, all in report.json", ""))
    return (("instruction", "episodes"), *rows)


def _actions_text(report):
    if report.normalized is None:
        return (
            "Values before config.data.action_as; their normalised histogram is not shown, "
            "because normalisation comes after it."
        )
    return f"Normalised by {report.data.normalization!r}, with statistics over all steps."


def _action_charts(report, directory):
    """Yields the charts of the actions as `Media`."""
    if report.images.examples:
        example = report.images.examples[0]
        path = _curves(directory / "actions.png", example)
        caption = f"Actions of {example.episode}, in physical units."
        yield html_report.Media(path, caption, wide=True)
    guess = " A guess: config.data.gripper_dims names none, and this dimension has two sides."
    for number, histogram in enumerate(report.grippers):
        path = _histogram(directory / f"gripper_{number}.png", histogram)
        caption = f"Gripper: {histogram.label}.{guess if histogram.guessed else ''}"
        yield html_report.Media(path, caption)
    if report.normalized is not None:
        path = _histogram(directory / "normalized.png", report.normalized, log=True)
        caption = "All dimensions of the action after normalisation; the count is logarithmic."
        yield html_report.Media(path, caption)


def _curves(path, example):
    width = example.action.shape[1]
    columns = min(4, width)
    rows = -(-width // columns)
    seconds = np.arange(len(example.action)) / example.fps
    with html_report.chart(path, 9.6, 0.5 + 1.3 * rows, rows, columns) as axes:
        for dim, one in enumerate(np.ravel(axes)):
            if dim >= width:
                one.set_visible(False)
                continue
            one.plot(seconds, example.action[:, dim], color=_BLUE, lw=1.2)
            one.set_title(f"action[{dim}]", fontsize=9, color=html_report.INK)
            if dim >= width - columns:
                one.set_xlabel("seconds", fontsize=9)
    return path


def _histogram(path, histogram, log=False):
    with html_report.chart(path, 6.4, 2.6) as axes:
        color = _SOFT if histogram.guessed else _BLUE
        axes.stairs(histogram.counts, histogram.edges, fill=True, color=color)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(histogram.label)
        axes.set_ylabel("values")
    return path


def _column_table(report):
    head = ("", "min", "max", "mean", "std", "q01", "q99", "beyond 5σ", "moves", "clipped", "")
    rows = [
        (
            f"{c.name}[{c.dim}]",
            *(f"{v:.4g}" for v in (c.min, c.max, c.mean, c.std, c.q01, c.q99)),
            f"{c.beyond:.3%}",
            f"{c.moves:.1%}",
            "" if c.clipped is None else f"{c.clipped:.3%}",
            c.flag,
        )
        for c in report.columns
    ]
    return (head, *rows)
