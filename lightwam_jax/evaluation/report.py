"""What an evaluation leaves behind: summary.json and one HTML file that works offline.

Every success rate carries its Wilson interval, and every result a manifest of what produced it.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess

import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "mujoco")


def wilson_interval(successes, n, z=1.96):
    """Returns (low, high), the Wilson score interval of a success rate; (0, 1) when n is 0.

    Raises:
      ValueError: counts that contradict each other.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} episodes: expected 0 <= successes <= episodes")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Successes among the episodes that ran; `errors` episodes did not and count for nothing."""
    successes: int
    episodes: int
    errors: int

    @property
    def value(self):
        return self.successes / self.episodes if self.episodes else float("nan")

    @property
    def interval(self):
        return wilson_interval(self.successes, self.episodes)

    def __str__(self):
        low, high = self.interval
        errors = f", {self.errors} could not run" if self.errors else ""
        return f"{100 * self.value:.0f} % ({self.successes}/{self.episodes}{errors}; 95 % interval {100 * low:.0f}-{100 * high:.0f} %)"


def rate(records):
    """Returns the `Rate` of rollout records."""
    return Rate(sum(r.success is True for r in records), sum(r.success is not None for r in records),
                sum(r.success is None for r in records))


def write_summary(path, trained, untrained, expert, seconds, manifest):
    """Writes summary.json and returns it.

    Args:
      path: file to write.
      trained, untrained, expert: `Rate`s over the same seeds.
      seconds: wall clock of the whole pipeline.
      manifest: `manifest(...)`.
    """
    summary = {
        "success_rate": trained.value, "interval": list(trained.interval),
        "untrained_success_rate": untrained.value, "untrained_interval": list(untrained.interval),
        "expert_success_rate": expert.value, "expert_interval": list(expert.interval),
        "episodes": trained.episodes, "errors": trained.errors, "seconds": round(seconds, 1),
        "manifest": manifest,
    }
    pathlib.Path(path).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def manifest(config, step, weights, device):
    """Returns what has to be equal for two results to be comparable.

    Args:
      config: `Config`.
      step: of the checkpoint.
      weights: hash of the parameters (`weights_hash`).
      device: description of the accelerator.
    """
    e = config.evaluation
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "config": config.name, "model": config.model.variant, "step": step, "weights": weights,
        "seeds": [e.first_seed, e.first_seed + e.episodes - 1], "replan": e.replan, "max_steps": e.max_steps,
        "batch": e.batch, "workers": e.workers, "device": device, "commit": _commit(),
        "python": platform.python_version(), "platform": platform.platform(), "packages": packages,
    }


def weights_hash(leaves):
    """Returns 16 hex digits over an iterable of (path, array), in its order."""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()[:16]


def read_metrics(path):
    """Returns {"{kind}/{name}": (steps [n], values [n])} of a metrics.jsonl; lists become "{kind}/{name}/{i}"."""
    series = {}
    for line in pathlib.Path(path).read_text().split("\n")[:-1]:  # without a last line that was cut short
        row = json.loads(line)
        kind, step = row.pop("kind"), row.pop("step")
        for name, value in _scalars(kind, row):
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return series


# ---------------------------------------------------------------- charts

INK, TRAINED, UNTRAINED, EXPERT = "#1d2733", "#2563eb", "#a3adba", "#2f9e6e"


def success_chart(path, rates):
    """Bars with Wilson intervals.

    Args:
      path: PNG to write.
      rates: {label: `Rate`}, in the order trained, untrained, expert.
    """
    with _figure(path, 6.4, 0.5 + 0.55 * len(rates)) as axes:
        for row, ((label, r), colour) in enumerate(zip(rates.items(), (TRAINED, UNTRAINED, EXPERT))):
            low, high = r.interval
            axes.barh(row, 100 * r.value, color=colour, height=0.58)
            axes.plot([100 * low, 100 * high], [row, row], color=INK, lw=1.4, solid_capstyle="butt")
            for end in (low, high):
                axes.plot([100 * end] * 2, [row - 0.13, row + 0.13], color=INK, lw=1.4)
            axes.text(103, row, f"{100 * r.value:.0f} %", va="center", fontsize=11, fontweight="bold", color=INK)
        axes.set_yticks(range(len(rates)), rates, fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(0, 114)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("episodes solved, % (line: 95 % Wilson interval)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)


def curve_chart(path, series, ylabel, log=False, xlabel="training step"):
    """Lines, over training steps unless `xlabel` says otherwise.

    Args:
      path: PNG to write.
      series: {label: (steps [n], values [n])}.
      ylabel: with the unit.
      log: logarithmic values.
    """
    with _figure(path, 6.4, 3.0) as axes:
        colours = (INK, TRAINED, "#d97706", EXPERT, "#9333ea", "#dc2626", "#0891b2", UNTRAINED)
        for i, (label, (steps, values)) in enumerate(series.items()):
            few = dict(marker="o", ms=3) if len(steps) < 30 else {}
            axes.plot(steps, values, label=label, color=colours[i % len(colours)], lw=1.5, **few)
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color="#e6e9ee", lw=0.8)
        axes.legend(frameon=False, fontsize=9, ncols=2 if len(series) > 4 else 1)


class _figure:
    """A chart in the house style, saved at the end of the `with` block."""

    def __init__(self, path, width, height):
        from matplotlib.figure import Figure  # no pyplot: nothing global, no display
        self._path = path
        self._figure = Figure(figsize=(width, height), dpi=200, layout="constrained")

    def __enter__(self):
        axes = self._figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
        return axes

    def __exit__(self, kind, *exc_info):
        if kind is None:
            self._figure.savefig(self._path)


# ---------------------------------------------------------------- HTML


@dataclasses.dataclass(frozen=True)
class Media:
    """A PNG or MP4 file with its caption; `tag` is a short coloured label such as "solved"."""
    path: pathlib.Path
    caption: str = ""
    tag: str = ""
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, then media and a table of rows (the first row is its header)."""
    title: str
    text: str
    media: tuple = ()
    table: tuple = ()


def write_html(path, title, headline, facts, sections, details):
    """Writes the report: one file, nothing loaded from elsewhere.

    Args:
      path: file to write.
      title: of the page.
      headline: (big number, what it means).
      facts: [(number, label)], the row below it.
      sections: `Section`s.
      details: nested dict, shown as the manifest.
    """
    body = "".join(_section(section) for section in sections)
    facts = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(label)}</span></div>" for n, label in facts)
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
                   for name, value in _scalars("", details, everything=True))
    page = _PAGE.format(title=html.escape(title), number=html.escape(headline[0]), meaning=html.escape(headline[1]),
                        facts=facts, body=body, manifest=rows, css=_CSS)
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _section(section):
    media = "".join(_media(m) for m in section.media)
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
    parts += [f'<div class="media">{media}</div>'] if media else []
    if section.table:
        head, *rows = section.table
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in head)
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>')
    return f"<section>{''.join(parts)}</section>"


def _media(media):
    data = base64.b64encode(pathlib.Path(media.path).read_bytes()).decode()
    if pathlib.Path(media.path).suffix == ".mp4":
        shown = (f'<video autoplay loop muted playsinline controls preload="auto" '
                 f'src="data:video/mp4;base64,{data}"></video>')
    else:
        shown = f'<img alt="{html.escape(media.caption)}" src="data:image/png;base64,{data}">'
    tag = f'<i class="{html.escape(media.tag.split()[0])}">{html.escape(media.tag)}</i>' if media.tag else ""
    caption = f"<figcaption>{tag}{html.escape(media.caption)}</figcaption>" if media.caption or tag else ""
    return f'<figure{" class=wide" if media.wide else ""}>{shown}{caption}</figure>'


def _scalars(prefix, value, everything=False):
    """Yields (name, value) of the leaves of nested dicts and lists; only numbers unless `everything`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(f"{prefix}/{key}" if prefix else str(key), item, everything)
    elif isinstance(value, list) and not everything:
        for i, item in enumerate(value):
            yield from _scalars(f"{prefix}/{i}", item)
    elif everything or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield prefix, value


def _commit():
    """Returns the commit of the working tree, "+" when it has changes, or None outside a repository."""
    root = pathlib.Path(__file__).parents[2]
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else None


_CSS = """
:root{--ink:#1d2733;--soft:#5d6b7c;--line:#e3e7ed;--blue:#2563eb}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1020px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0}
.number{font-size:clamp(3.4rem,9vw,5.6rem);font-weight:750;letter-spacing:-.03em;line-height:1.05;color:var(--blue)}
.meaning{font-size:1.2rem;margin:.2rem 0 1.4rem;max-width:44em}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin-bottom:28px}
.facts div{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.facts b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}.facts span{color:var(--soft);font-size:.85rem}
section{background:#fff;border:1px solid var(--line);border-radius:12px;padding:22px 26px;margin-top:18px}
h2{font-size:1.15rem;margin:0 0 .3rem}p{margin:.1rem 0 1rem;color:var(--soft);max-width:60em}
.media{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px}
figure{margin:0;min-width:0}figure.wide{grid-column:1/-1}
img,video{width:100%;display:block;border-radius:8px}video{background:#000}
figcaption{font-size:.88rem;color:var(--soft);margin-top:6px}
figcaption i{font-style:normal;font-size:.75rem;font-weight:650;border-radius:99px;padding:2px 9px;margin-right:8px;
background:#e8ecf2;color:var(--ink)}
i.solved{background:#dcf3e8!important;color:#17693f!important}i.not{background:#fde5e2!important;color:#a02a1c!important}
.scroll{max-height:420px;overflow:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{position:sticky;top:0;background:#fff}details th{font-weight:500;color:var(--soft);white-space:nowrap}
details td{overflow-wrap:anywhere}summary{cursor:pointer;font-weight:600}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{css}</style></head><body><main>
<h1>{title}</h1>
<div class="number">{number}</div><div class="meaning">{meaning}</div>
<div class="facts">{facts}</div>
{body}
<section><details><summary>Run manifest</summary><table>{manifest}</table></details></section>
</main></body></html>
"""
