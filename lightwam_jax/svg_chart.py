"""Charts of curves as SVG in a page. They show the values under the pointer.

Charts of one section move together: each shows its values at the same place. A video in the section
that says how many of these places it has per second goes there too.
"""

import dataclasses
import html
import itertools
import json
import math

import numpy as np

WIDTH, HEIGHT = 460, 190  # of the drawing; a page shows it about as wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 36  # margins


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves with a common axis.

    Attributes:
      title, xlabel: what is shown, and over what, with units.
      series: {name: (x [n], y [n])}; values that are not finite leave a gap.
      low, high: the axis of the values reaches from one to the other at least.
      marks: places of faint vertical lines. log: logarithmic values, above 0.
      colours: of the series, in their order; default: those of the page.
    """

    title: str
    series: dict
    xlabel: str = ""
    low: float = math.inf
    high: float = -math.inf
    marks: tuple = ()
    log: bool = False
    colours: tuple = ()


def limits(values, low, high, share=0.25):
    """Returns (low, high) of an axis that never enlarges noise.

    Args:
      values: what is shown; those that are not finite do not count.
      low, high: range of the training data.
      share: of this range that the axis spans at least, around the values.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    least, most = (values.min(), values.max()) if values.size else (low, high)
    missing = share * (high - low) - (most - least)
    return (least - missing / 2, most + missing / 2) if missing > 0 else (least, most)


def figure(chart, colours):
    """Returns the <figure> of a `Chart`, for a page that has `CSS` and `SCRIPT`."""
    series = {name: tuple(np.asarray(each) for each in pair) for name, pair in chart.series.items()}
    series = {name: _drawable(*pair, chart.log) for name, pair in series.items()}
    xs = np.concatenate([x for x, _ in series.values()])
    x0, x1 = _wide(*_ends(xs))
    y0, y1 = _value_axis(np.concatenate([y for _, y in series.values()]), chart)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    across = lambda x: _LEFT + (np.asarray(x, float) - x0) / (x1 - x0) * (right - _LEFT)
    up = lambda y: bottom - (_scaled(y, chart.log) - y0) / (y1 - y0) * (bottom - _TOP)
    drawn = [_line("mark", across(x), _TOP, across(x), bottom) for x in chart.marks]
    for y in _ticks(y0, y1, chart.log):
        drawn += [_line("tick", _LEFT, up(y), right, up(y)), _text(_LEFT - 6, up(y) + 4, y, "end")]
    drawn += [_text(across(x), bottom + 15, x, "middle") for x in _ticks(x0, x1, whole=True)]
    drawn.append(_text((_LEFT + right) / 2, HEIGHT - 4, chart.xlabel, "middle"))
    legend, colours = [], itertools.cycle(chart.colours or colours)
    for (name, (x, y)), colour in zip(series.items(), colours):
        drawn.append(_curve(across(x), up(y), colour))
        key = f'<i style="background:{colour}"></i>{html.escape(name)} <output></output>'
        legend.append(f"<span>{key}</span>")
    drawn.append(f'<line class="cursor" y1="{_TOP}" y2="{bottom}" visibility="hidden"/>')
    data = {"x": [float(x0), float(x1)], "at": [_LEFT, right, WIDTH]}
    data["series"] = [[_numbers(x), _numbers(y)] for x, y in series.values()]
    data = html.escape(json.dumps(data, separators=(",", ":")))
    title = html.escape(chart.title)
    return (
        f'<figure class="chart" data-chart="{data}"><b>{title}</b>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(drawn)}'
        f'</svg><figcaption>{"".join(legend)}<output class="place"></output></figcaption></figure>'
    )


def _drawable(x, y, log):
    """Points in an order; what cannot be drawn is NaN."""
    y = np.where(np.isfinite(y) & ((y > 0) | (not log)), y, np.nan).astype(float)
    return x.astype(float), y


def _value_axis(values, chart):
    """(bottom, top) of the axis, as `_scaled`."""
    values = np.append(values, [v for v in (chart.low, chart.high) if math.isfinite(v)])
    low, high = (_scaled(end, chart.log) for end in _ends(values[~np.isnan(values)]))
    low, high = _wide(low, high)
    edge = 0.04 * (high - low)  # a curve at the limit is not cut
    return low - edge, high + edge


def _scaled(y, log):
    return np.log10(y) if log else np.asarray(y, float)


def _ends(values):
    return (values.min(), values.max()) if values.size else (1.0, 1.0)


def _wide(low, high):
    """The same ends; of a single value, some room around it."""
    room = 0.5 * abs(low) or 0.5
    return (low, high) if high > low else (low - room, high + room)


def _ticks(low, high, log=False, whole=False):
    """At most seven round numbers between the ends of an axis."""
    if log:
        powers = 10.0 ** np.arange(math.floor(low), math.ceil(high) + 1)
        few = powers if high - low > 2 else np.outer(powers, [1, 2, 5]).ravel()
        return [y for y in few if low <= np.log10(y) <= high]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    step = max(1.0, step) if whole else step
    return [
        n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _curve(across, up, colour):
    """A line that is broken where there is no value."""
    pieces = np.ma.clump_unmasked(np.ma.masked_invalid(up))
    path = "".join(
        "M"
        + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across[piece], up[piece]))
        + ("h.01" if piece.stop - piece.start == 1 else "")  # a point
        for piece in pieces
    )
    return f'<path d="{path}" stroke="{colour}"/>'


def _line(kind, x1, y1, x2, y2):
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x, y, said, anchor):
    said = said if isinstance(said, str) else f"{said:.4g}" if abs(said) < 1e4 else f"{said:,.0f}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(said)}</text>'


def _numbers(values):
    return [None if math.isnan(v) else float(f"{v:.4g}" if abs(v) < 1e4 else v) for v in values]


CSS = """
.chart b { font-size: .88rem; font-weight: 600 }
.chart svg { width: 100%; display: block; overflow: visible; touch-action: pan-y }
.chart text { font-size: 12px; fill: var(--soft) }
@media (max-width: 600px) { .chart text { font-size: 15px } }
.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round }
.chart .tick { stroke: var(--line) } .chart .mark { stroke: #f0f2f5 }
.chart .cursor { stroke: var(--ink); stroke-width: 1 }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; min-height: 1.5em;
  font-variant-numeric: tabular-nums }
.chart figcaption i { display: inline-block; width: 14px; height: 3px; padding: 0;
  margin: 0 6px 0 0; vertical-align: middle; border-radius: 2px }
.chart output { color: var(--ink) }
.chart .place { margin-left: auto; color: var(--soft) }
"""

SCRIPT = """
const charts = [...document.querySelectorAll("figure.chart")].map(figure => {
  const data = JSON.parse(figure.dataset.chart), [x0, x1] = data.x, [left, right, width] = data.at;
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const outputs = figure.querySelectorAll("span output"), place = figure.querySelector(".place");
  const show = x => {
    const at = left + (x - x0) / (x1 - x0) * (right - left);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    place.textContent = x === null ? "" : "at " + x;
    data.series.forEach(([xs, ys], k) => {
      let i = 0;
      xs.forEach((each, j) => { if (Math.abs(each - x) < Math.abs(xs[i] - x)) i = j; });
      outputs[k].textContent = x === null || ys[i] === null ? "" : ys[i];
    });
  };
  return { section: figure.closest("section"), svg, show, place: event => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * width / box.width - left) / (right - left);
    const x = x0 + share * (x1 - x0);
    const all = data.series.flatMap(([xs]) => xs);
    return all.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a, all[0]);
  } };
});
for (const chart of charts) {
  const all = charts.filter(other => other.section === chart.section);
  const video = chart.section.querySelector("video[data-places]");
  const move = event => {
    const x = chart.place(event);
    all.forEach(other => other.show(x));
    if (video) { video.pause(); video.currentTime = (x + 0.5) / video.dataset.places; }
  };
  chart.svg.addEventListener("pointermove", move);
  chart.svg.addEventListener("pointerdown", move);
  chart.svg.addEventListener("pointerleave", () => all.forEach(other => other.show(null)));
}
for (const video of document.querySelectorAll("video[data-places]")) {
  const all = charts.filter(chart => chart.section === video.closest("section"));
  video.addEventListener("timeupdate", () => {
    const x = Math.floor(video.currentTime * video.dataset.places);
    if (!video.paused) all.forEach(chart => chart.show(x));
  });
}
"""
