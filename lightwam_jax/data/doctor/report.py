"""What the dataset doctor found, for the terminal, for programs and for eyes."""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile

import numpy as np
from PIL import Image

from lightwam_jax import html_report
from lightwam_jax.data.doctor import examine

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
    return f"{_counts(report)} in {_many(len(report.ids), 'episode')}"


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
    """Returns the flag that leaves the episodes with errors out; "" if there is none to leave."""
    broken = tuple(dict.fromkeys(p.episode for p in report.errors if p.episode))
    every = (*report.data.exclude, *broken)
    return f'--config.data.exclude="{every}"' if broken else ""


def write(report, directory):
    """Writes report.html and report.json into `directory`; returns the paths of both."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "report.html", directory / "report.json"
    paths[1].write_text(json.dumps(to_json(report), indent=2, allow_nan=False) + "\n")
    tone = "bad" if report.errors else "" if report.warnings else "good"
    with tempfile.TemporaryDirectory() as images:
        sections = _sections(report, pathlib.Path(images))
        html_report.write_html(
            paths[0],
            f"Dataset doctor · {report.data.source} · {report.data.path}",
            _headline(report),
            _cards(report),
            sections,
            {"config.data": dataclasses.asdict(report.data)},
            "Examined with",
            tone,
        )
    return paths


def to_json(report):
    """Returns the report without its images as plain JSON types."""

    def plain(histogram):
        return histogram and {
            "label": histogram.label,
            "guessed": histogram.guessed,
            "edges": histogram.edges.tolist(),
            "counts": histogram.counts.tolist(),
        }

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
        "fps": [{"fps": fps, "episodes": n} for fps, n in report.fps.items()],
        "tasks": report.tasks,
        "cameras": [dataclasses.asdict(c) for c in report.images.cameras],
        "images": {
            "which": report.images.which,
            "decoded": report.images.decoded,
            "total": report.images.total,
        },
        "columns": [dataclasses.asdict(c) for c in report.columns],
        "grippers": [plain(h) for h in report.grippers],
        "normalized": plain(report.normalized),
        "drift": report.drift and dataclasses.asdict(report.drift),
        "seconds": round(report.seconds, 2),
        "config.data": dataclasses.asdict(report.data),
    }


# ---- words ---------------------------------------------------------------------------------------


def _counts(report):
    errors, warnings = len(report.errors), _many(len(report.warnings), "warning")
    if errors:
        return f"{_many(errors, 'error')}, {warnings}"
    return f"No error, {warnings}" if report.warnings else "No problem found"


def _many(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _advice(kind):
    return examine.ADVICE.get(kind, _DEFAULT)


def _where(problem, root=""):
    """The episode, its file (without `root`) and the frame."""
    place = [str(problem.file).removeprefix(root)] if problem.file else []
    place += [f"frame {problem.frame}"] if problem.frame is not None else []
    return (problem.episode or "the data set") + (f" ({', '.join(place)})" if place else "")


def _by_kind(problems):
    return [
        (key, list(group))
        for key, group in itertools.groupby(problems, lambda p: (p.severity, p.kind))
    ]


def _length(lengths):
    return (
        f"{lengths.min()} / {np.median(lengths):g} / {lengths.max()} steps"
        if len(lengths)
        else "none readable"
    )


def _time(hours):
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _rates(report):
    return ", ".join(f"{fps:g}" for fps in sorted(report.fps)) or "unknown"


def _cameras(report):
    return "; ".join(
        " ".join([c.name, ", ".join(c.sizes) or "not seen", *sorted(c.codecs)])
        for c in report.images.cameras
    ) or ", ".join(report.data.cameras)


def _seen(images):
    return (
        f"{images.decoded:,} of {images.total:,} decoded: {images.which}"
        if images.decoded
        else images.which
    )


def _drifts(report):
    d = report.drift
    if d is None:
        return "not recorded"
    off = f"{d.seconds:.3g} s" if d.seconds >= 1 else f"{d.seconds * 1000:.3g} ms"
    return f"at most {off} off ({d.episode}, frame {d.frame})"


def _facts(report):
    """[(label, value)] of the terminal."""
    tasks = list(report.tasks)
    named = "; ".join(tasks[:3]) + ("; ..." if len(tasks) > 3 else "")
    return [
        ("data", f"{report.data.source}, {report.data.path}"),
        (
            "recorded",
            f"{_many(int(report.lengths.sum()), 'step')}, {_time(report.hours)} at "
            f"{_rates(report)} fps; min / median / max {_length(report.lengths)}",
        ),
        ("cameras", _cameras(report)),
        ("tasks", f"{len(tasks)}: {named}"),
        ("times", _drifts(report)),
        ("images", _seen(report.images)),
    ]


# ---- the page ------------------------------------------------------------------------------------


def _headline(report):
    return _counts(report), (
        f"in {_many(len(report.ids), 'episode')}. Images: {_seen(report.images)}."
    )


def _cards(report):
    lengths = report.lengths
    return [
        (f"{len(report.ids):,}", "episodes"),
        (f"{int(lengths.sum()):,}", "steps"),
        (_time(report.hours), f"at {_rates(report)} fps"),
        (
            f"{lengths.min()} to {lengths.max()}" if len(lengths) else "-",
            f"steps long, median {np.median(lengths):g}" if len(lengths) else "none readable",
        ),
        (f"{len(report.tasks):,}", "instructions"),
        (f"{report.seconds:.1f} s", "to examine"),
    ]


def _sections(report, directory):
    sections = [
        _problems(report, severity, title)
        for severity, title in (("error", "Errors"), ("warning", "Warnings"))
        if any(p.severity == severity for p in report.problems)
    ]
    if report.images.examples:
        sections.append(
            html_report.Section(
                "What the cameras saw, and the canvas the model will see",
                "First, middle and last step. Is every image upright, are its colours right, "
                "does the canvas show what matters?",
                tuple(
                    itertools.chain.from_iterable(
                        _example(example, report, directory) for example in report.images.examples
                    )
                ),
            )
        )
    if len(report.lengths):
        sections.append(
            html_report.Section(
                "Lengths and tasks",
                f"Timestamps: {_drifts(report)}.",
                (
                    html_report.Media(
                        _lengths_chart(report, directory),
                        "Steps per episode; the dashed line is a window.",
                        wide=True,
                    ),
                ),
                _task_table(report),
            )
        )
    if report.columns:
        sections.append(
            html_report.Section(
                "Actions",
                _actions_text(report),
                tuple(html_report.Media(*shown) for shown in _action_charts(report, directory)),
            )
        )
        sections.append(
            html_report.Section(
                "State and action, dimension by dimension",
                "Over all steps of the episodes without errors, each step counting the same, in "
                "physical units. Beyond 5σ: share of steps further from the mean. Moves: share of "
                "steps unlike the one before. Clipped: share that normalisation cuts at ±5.",
                table=_column_table(report),
            )
        )
    return sections


def _problems(report, severity, title):
    rows = [("kind", "where", "what was found", "what to do")]
    root = report.data.path.rstrip("/") + "/"
    for (level, kind), found in _by_kind(report.problems):
        if level != severity:
            continue
        for number, problem in enumerate(found[:_ROWS]):
            first = number == 0
            rows.append(
                (
                    f"{kind} ({len(found):,})" if first else "",
                    _where(problem, root),
                    problem.message,
                    _advice(kind) if first else "",
                )
            )
        if len(found) > _ROWS:
            rows.append(("", f"... and {len(found) - _ROWS:,} more", "all are in report.json", ""))
    flag = exclude_flag(report)
    advice = {
        "error": "Nothing is computed from these data until they are repaired"
        + (f", or left out with {flag}" if flag else "")
        + ".",
        "warning": "Training is possible; look at these first.",
    }[severity]
    return html_report.Section(title, advice, table=tuple(rows), whole=severity == "error")


def _example(example, report, directory):
    """The strips of one episode: a camera each, and the canvas."""
    strips = {f"{name}, {p.shape[1]}x{p.shape[2]}": p for name, p in example.raw.items()}
    height, width = example.canvas.shape[1:3]
    strips[f"canvas, {height}x{width}"] = example.canvas
    for name, images in strips.items():
        path = directory / f"{len(list(directory.iterdir()))}.png"
        _strip(images).save(path)
        canvas = images is example.canvas
        caption = f"{name} · steps {', '.join(map(str, example.steps))} of {example.episode}"
        yield html_report.Media(
            path,
            caption + (f" · “{example.task}”" if canvas else ""),
            "canvas" if canvas else "camera",
            wide=canvas,
        )


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
    """Yields (path, caption[, tag, wide])."""
    if report.images.examples:
        example = report.images.examples[0]
        yield (
            _curves(directory / "actions.png", example),
            f"Actions of {example.episode}, in physical units.",
            "",
            True,
        )
    for number, histogram in enumerate(report.grippers):
        guess = " A guess: config.data.gripper_dims names none, and this dimension has two sides."
        yield (
            _histogram(directory / f"gripper_{number}.png", histogram),
            f"Gripper: {histogram.label}.{guess if histogram.guessed else ''}",
        )
    if report.normalized is not None:
        yield (
            _histogram(directory / "normalized.png", report.normalized, log=True),
            "All dimensions of the action after normalisation; the count is logarithmic.",
        )


def _curves(path, example):
    width = example.action.shape[1]
    columns = min(4, width)
    rows = -(-width // columns)
    seconds = np.arange(len(example.action)) / example.fps
    with html_report.chart(path, 9.6, 0.5 + 1.3 * rows, rows, columns) as axes:
        for dim, one in itertools.zip_longest(range(width), np.ravel(axes)):
            if dim is None:
                one.set_visible(False)
                continue
            one.plot(seconds, example.action[:, dim], color=_BLUE, lw=1.2)
            one.set_title(f"action[{dim}]", fontsize=9, color=html_report.INK)
            if dim >= width - columns:
                one.set_xlabel("seconds", fontsize=9)
    return path


def _histogram(path, histogram, log=False):
    with html_report.chart(path, 6.4, 2.6) as axes:
        axes.stairs(
            histogram.counts,
            histogram.edges,
            fill=True,
            color=_SOFT if histogram.guessed else _BLUE,
        )
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
