"""What reports are made of: the page, one HTML file that needs nothing else; charts; image grids.

Charts of `svg_chart` show their values under the pointer. Others are drawn by matplotlib, image
grids by PIL; both become PNG files that a page includes.
"""

import base64
import contextlib
import dataclasses
import functools
import html
import itertools
import math
import pathlib
import typing

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightwam_jax import svg_chart

INK, SOFT, PAPER = "#1d2733", "#5d6b7c", "white"
BLUE, GREY, GREEN = "#2563eb", "#a3adba", "#2f9e6e"
COLOURS = (BLUE, "#d97706", GREEN, "#9333ea", "#dc2626", "#0891b2", INK, GREY)  # of curves
GAP = 8  # pixels between images of a grid
TALLEST = 224  # pixels of a tile whose size is chosen
PAGE = 926  # width of what a section shows, in pixels of a screen that is wide enough


# ---- the page ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Media:
    """A PNG or MP4 file and its caption.

    Attributes:
      tag: short coloured label, e.g. "solved". wide: as wide as the page.
      drawn: shown pixel by pixel, as large as it was drawn; images scroll on a narrow screen.
      places: of a video beside charts of a section: steps of their axis per second.
    """

    path: pathlib.Path
    caption: str = ""
    tag: str = ""
    wide: bool = False
    drawn: bool = False
    places: float = 0.0


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, then media (`Media`, `svg_chart.Chart`) and a table.

    The table's first row is its header; a long one scrolls unless it is shown `whole`. A section
    that is `folded` shows its heading, until one clicks at it.
    """

    title: str
    text: str
    media: tuple = ()
    table: tuple = ()
    whole: bool = False
    folded: bool = False


def write_html(path, title, headline, facts, sections, manifest, folded="Run manifest", tone=""):
    """Writes the report.

    Args:
      path: file to write.
      title: of the page.
      headline: (big number, what it means).
      facts: [(number, label)], the row below it.
      sections: `Section`s.
      manifest: nested dict, folded away at the end under the heading `folded`.
      tone: colour of the headline: "" (neutral), "good" or "bad".
    """
    text = html.escape
    cards = [f"<div><b>{text(n)}</b><span>{text(label)}</span></div>" for n, label in facts]
    rows = [
        f"<tr><th>{text(name)}</th><td>{text(str(value))}</td></tr>"
        for name, value in _leaves("", manifest)
    ]
    body = "".join(map(_section, sections))
    page = _PAGE.format(
        title=text(title),
        number=text(headline[0]),
        meaning=text(headline[1]),
        css=_CSS + svg_chart.CSS,
        facts="".join(cards),
        body=body,
        script=svg_chart.SCRIPT if 'class="chart"' in body else "",
        manifest="".join(rows),
        folded=text(folded),
        tone=tone + " words" * (len(headline[0]) > 12),
    )
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _section(section):
    parts = []
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.media:
        parts.append(f'<div class="media">{"".join(map(_media, section.media))}</div>')
    if section.table:
        head, *rows = section.table
        body = "".join(_row("td", row) for row in rows)
        kind = "whole" if section.whole else "scroll"
        parts.append(
            f'<div class="{kind}"><table><thead>{_row("th", head)}</thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    title, body = html.escape(section.title), "".join(parts)
    if section.folded:
        return f"<section><details><summary>{title}</summary>{body}</details></section>"
    return f"<section><h2>{title}</h2>{body}</section>"


def _row(tag, cells):
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def _media(media):
    if isinstance(media, svg_chart.Chart):
        return svg_chart.figure(media, COLOURS)
    data = base64.b64encode(pathlib.Path(media.path).read_bytes()).decode()
    if pathlib.Path(media.path).suffix == ".mp4":
        linked = f'data-places="{media.places:g}"' if media.places else "autoplay"
        shown = (
            f"<video {linked} loop muted playsinline controls "
            f'src="data:video/mp4;base64,{data}"></video>'
        )
    else:
        shown = f'<img alt="{html.escape(media.caption)}" src="data:image/png;base64,{data}">'
    caption = html.escape(media.caption)
    if media.tag:
        kind = html.escape(media.tag.split()[0])  # "not solved" is of class "not"
        caption = f'<i class="{kind}">{html.escape(media.tag)}</i>{caption}'
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    kinds = "wide drawn" if media.drawn else "wide" if media.wide else ""
    return f'<figure class="{kinds}"><div>{shown}</div>{caption}</figure>'


def _leaves(prefix, value):
    """Yields (dotted name, value) of nested dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value


_CSS = """
:root { --ink: #1d2733; --soft: #5d6b7c; --line: #e3e7ed; --blue: #2563eb }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 }
h2 { font-size: 1.15rem; margin: 0 0 .3rem }
p { margin: .1rem 0 1rem; color: var(--soft); max-width: 60em }
.number { font-size: clamp(3.4rem, 9vw, 5.6rem); font-weight: 750; letter-spacing: -.03em;
  line-height: 1.05; color: var(--blue) }
.number.words { font-size: clamp(2.2rem, 6vw, 3.4rem) }
.number.good { color: #17693f }
.number.bad { color: #a02a1c }
.meaning { font-size: 1.2rem; margin: .2rem 0 1.4rem; max-width: 44em }
.facts { display: grid; gap: 12px; margin-bottom: 28px;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)) }
.facts div, section { background: #fff; border: 1px solid var(--line); border-radius: 12px }
.facts div { padding: 12px 16px }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.facts span { color: var(--soft); font-size: .85rem; line-height: 1.35; display: block }
section { padding: 22px 26px; margin-top: 18px }
.media { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.media + div { margin-top: 14px }
figure { margin: 0; min-width: 0 }
figure.wide { grid-column: 1 / -1 }
img, video { width: 100%; display: block; border-radius: 8px }
.drawn div { overflow-x: auto }
.drawn img { width: auto; max-width: none; border-radius: 0 }
.drawn video { width: auto; max-width: 100%; border-radius: 0 }
figcaption { font-size: .88rem; color: var(--soft); margin-top: 6px }
figcaption i { font-style: normal; font-size: .75rem; font-weight: 650; border-radius: 99px;
  padding: 2px 9px; margin-right: 8px; background: #e8ecf2; color: var(--ink) }
figcaption i.solved { background: #dcf3e8; color: #17693f }
figcaption i.not { background: #fde5e2; color: #a02a1c }
.scroll, .whole { overflow: auto }
.scroll { max-height: 420px }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
thead th { position: sticky; top: 0; background: #fff }
details th { font-weight: 500; color: var(--soft); white-space: nowrap }
details td { overflow-wrap: anywhere }
summary { cursor: pointer; font-weight: 600 }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head><body><main>
<h1>{title}</h1>
<div class="number {tone}">{number}</div>
<div class="meaning">{meaning}</div>
<div class="facts">{facts}</div>
{body}
<section><details><summary>{folded}</summary><table>{manifest}</table></details></section>
</main><script>{script}</script></body></html>
"""


# ---- charts --------------------------------------------------------------------------------------


@contextlib.contextmanager
def chart(path, width, height, rows=1, columns=1):
    """Gives axes in the house style, [rows, columns] of them if more than one.

    The chart, `width` x `height` inches, is written as PNG at the end of the `with` block.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, nothing global

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=INK, labelsize=9)
    yield axes if axes.size > 1 else axes[0, 0]
    figure.savefig(path)


def curve_chart(path, series, ylabel, log=False, xlabel="training step", width=6.4):
    """Writes a PNG of curves.

    Args:
      path: file to write.
      series: {label: (x [n], values [n])}.
      ylabel, xlabel: with their units. log: logarithmic values. width: inches.
    """
    from matplotlib import ticker

    with chart(path, width, 3.0) as axes:
        for (label, (x, values)), colour in zip(series.items(), itertools.cycle(COLOURS)):
            few = {"marker": "o", "ms": 3} if len(x) < 30 else {}
            axes.plot(x, values, label=label, color=colour, lw=1.5, **few)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color="#e6e9ee", lw=0.8)
        axes.legend(frameon=False, fontsize=9, ncols=2 if len(series) > 4 else 1)


# ---- image grids ---------------------------------------------------------------------------------


class Row(typing.NamedTuple):
    """One row of a grid: tiles uint8 [h,w,3], a label left of it, a title above, notes below."""

    tiles: list
    label: str = ""
    title: str = ""
    notes: tuple = ()


def grid(rows, header=(), edge=128, title=""):
    """Lays out labelled rows of tiles on white.

    Args:
      rows: `Row`s. header: text above each column.
      edge: height of a tile; widths follow. None: what makes the image as wide as a page (`PAGE`)
        shows it, at most `TALLEST`.
      title: of the whole image.

    Returns:
      uint8 [H,W,3].
    """
    margin = GAP + max(_width(row.label, 14) for row in rows) + GAP
    if edge is None:
        ratios = [[np.shape(tile)[1] / np.shape(tile)[0] for tile in row.tiles] for row in rows]
        columns = [max(column) for column in itertools.zip_longest(*ratios, fillvalue=0)]
        room = PAGE - margin - (GAP + 1) * len(columns)  # 1: widths are rounded
        edge = min(TALLEST, int(room / sum(columns)))
    tiles = [[_fit(tile, edge) for tile in row.tiles] for row in rows]
    widths = [max(t.width for t in column if t) for column in itertools.zip_longest(*tiles)]
    lefts = [margin, *(margin + np.cumsum([width + GAP for width in widths])).tolist()]
    above = [28 if row.title else 0 for row in rows]
    heights = [a + edge + (22 if row.notes else 0) + GAP for row, a in zip(rows, above)]
    top = (40 if title else GAP) + (24 if any(header) else 0)
    width = max(lefts[-1], 2 * GAP + _width(title, 20))
    canvas = Image.new("RGB", (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, INK, _font(20))
    for left, text in zip(lefts, header):
        draw.text((left, top - 22), text, SOFT, _font(14))
    for row, line, lift, height in zip(rows, tiles, above, heights):
        draw.text((GAP, top + 5), row.title, INK, _font(16))
        draw.text((GAP, top + lift + edge // 2 - 9), row.label, SOFT, _font(14))
        for left, tile in zip(lefts, line):
            canvas.paste(tile, (left, top + lift))
        for left, note in zip(lefts, row.notes):
            draw.text((left, top + lift + edge + 2), note, SOFT, _font(14))
        top += height
    return np.asarray(canvas)


def save_png(path, image):
    """Writes uint8 [H,W,3]."""
    Image.fromarray(np.asarray(image)).save(path)


def _fit(tile, edge):
    image = Image.fromarray(np.asarray(tile))
    # Small images are shown as the pixels they are.
    how = Image.Resampling.NEAREST if edge > 2 * image.height else Image.Resampling.LANCZOS
    return image.resize((round(image.width * edge / image.height), edge), how)


@functools.cache
def _font(size):
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # the same on every machine
    return ImageFont.truetype(path, size)


def _width(text, size):
    return math.ceil(_font(size).getlength(text))
