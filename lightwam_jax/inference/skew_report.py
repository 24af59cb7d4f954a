"""What the skew check writes: a line, a table, skew.json and skew.html."""

import json
import pathlib

import numpy as np

from lightwam_jax import html_report
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.inference import skew_stages

_SHOWN = 4  # windows of the page
_HEADLINES = {
    skew_stages.PASS: "The server acts as training would.",
    skew_stages.REPORT: "Nearly as training would; something is rounded differently, or changed.",
    skew_stages.FAIL: "The server does not act as training would.",
}
_TONES = {skew_stages.PASS: "good", skew_stages.REPORT: "", skew_stages.FAIL: "bad"}


def line(result):
    """Returns the result in one line."""
    by_name = {stage.name: stage for stage in result.stages}
    actions = by_name["actions physical"]
    words = f"actions within {actions.largest:.1g} of their range"
    if "latents" in by_name:
        words += f", {100 * by_name['latents'].share:.2f} % of the latents differ"
    first = "" if result.first is None else f"; first to deviate: {result.first}"
    causes = "".join(f"; {cause}" for cause in result.causes)
    count = f"{len(actions.rows)} {result.what}"
    return f"skew        {result.verdict}: {count} {result.where}, {words}{first}{causes}"


def table(result):
    """Returns the stages as rows of text, the header first."""
    rows = [("stage", "largest deviation", "share that differ", "passes", "verdict")]
    for stage in result.stages:
        share = f"{100 * stage.share:.2f} %"
        rows.append((stage.name, f"{stage.largest:.3g}", share, stage.limit, stage.verdict))
    return tuple(rows)


def text(result):
    """Returns the printable table, and what it means."""
    rows = table(result)
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    said = ["".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*said, *map(str, result.causes), *result.notes])


def write(directory, result, canvases=()):
    """Writes skew.json and skew.html.

    Args:
      directory: made if missing. result: `skew.Result`.
      canvases: (names, training's f32 [N,H,W,3], the server's, or None) of windows.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "verdict": result.verdict,
        "first": result.first,
        "causes": [cause._asdict() for cause in result.causes],
        "notes": list(result.notes),
        "stages": [s._asdict() | {"rows": s.rows.tolist()} for s in result.stages],
        "compared": result.what,
        "server": result.where,
        "about": result.about,
    }
    (directory / "skew.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sections = [
        html_report.Section(
            "Stage by stage",
            "From the picture that a robot sends to the actions it gets, beside what training "
            "computes from the cached row of the same moment. " + result.recomputed,
            table=table(result),
            whole=True,
        )
    ]
    if result.causes or result.notes:
        found = [("likely cause",), *((str(cause),) for cause in result.causes)]
        found += [(note,) for note in result.notes]
        sections.insert(0, html_report.Section("Why", "", table=tuple(found), whole=True))
    if canvases:
        html_report.save_png(directory / "skew.png", _pictures(result, *canvases))
        media = (html_report.Media(directory / "skew.png", wide=True),)
        sections.append(html_report.Section("Windows whose actions deviate most", "", media))
    title, headline = "Light-WAM JAX · skew check", (result.verdict, _HEADLINES[result.verdict])
    by_name = {stage.name: stage for stage in result.stages}
    facts = [
        (str(len(result.stages[-1].rows)), result.what),
        (f"{by_name['actions physical'].largest:.1g}", "of the actions' range"),
        (result.first or "none", "first stage that deviates"),
    ]
    html_report.write_html(
        directory / "skew.html", title, headline, facts, sections, result.about,
        "Server and checkpoint", _TONES[result.verdict],
    )  # fmt: skip


def _pictures(result, names, trained, served):
    rows = {stage.name: stage.rows for stage in result.stages}
    order = np.argsort(-rows["actions physical"], kind="stable")[:_SHOWN]
    shown = []
    for i in order:
        pair = [trained[i], served[i], 0.5 + (served[i] - trained[i]) / 2]
        tiles = [encoders_base.to_uint8(np.float32(x).clip(0, 1)) for x in pair]
        shown.append(html_report.Row(tiles, names[i]))
    return html_report.grid(shown, ("training", "server", "difference"), title="the canvas")
