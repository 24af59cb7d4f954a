"""Charts of a page: limits of their axes, what is drawn, and the values behind it."""

import html
import json
import re

import numpy as np
import pytest

from lightwam_jax import html_report, svg_chart


def drawn(**given):
    chart = svg_chart.Chart("a <b>", **{"series": {"x & y": ([0, 1, 2], [1.0, 2.0, 3.0])}} | given)
    return svg_chart.figure(chart, html_report.COLOURS)


def data(text):
    return json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', text).group(1)))


def path(text, which=0):
    """The points of a curve, its pieces apart."""
    pieces = re.findall(r'<path d="([^"]*)"', text)[which].split("M")[1:]
    return [[tuple(map(float, p.split())) for p in q.split("h")[0].split("L")] for q in pieces]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.01], (-0.245, 0.255)),  # noise is not enlarged
        ([0.5, 0.5], (0.25, 0.75)),
        ([-0.9, 0.8], (-0.9, 0.8)),  # wider than the share: as it is
        ([0.5, np.nan], (0.25, 0.75)),
        ([np.nan], (-1, 1)),
    ],
)
def test_an_axis_covers_a_share_of_the_training_range(values, expected):
    assert svg_chart.limits(values, -1, 1) == pytest.approx(expected)


def test_values_are_where_the_axis_says_and_under_the_pointer():
    text = drawn(low=0.0, high=4.0)
    ((left, middle, right),) = path(text)
    assert left[0] == 54 and right[0] == 450 and middle[0] == (54 + 450) / 2
    # 10 to 154 is 0 to 4, with 4 % more at both ends
    per_unit = 144 / (4 * 1.08)
    np.testing.assert_allclose(
        [left[1], right[1]], [154 - 1.16 * per_unit, 154 - 3.16 * per_unit], atol=0.06
    )
    assert data(text) == {"x": [0, 2], "at": [54, 450, 460], "series": [[[0, 1, 2], [1, 2, 3]]]}
    assert "a &lt;b&gt;" in text and "x &amp; y" in text and "<b>a <b>" not in text


def test_what_is_not_finite_leaves_a_gap():
    text = drawn(series={"a": (range(5), [1.0, np.nan, 2.0, 3.0, np.inf])})
    assert [len(piece) for piece in path(text)] == [1, 2]
    assert data(text)["series"][0][1] == [1, None, 2, 3, None]
    assert "nan" not in text.lower() and "inf" not in text.lower().replace("info", "")


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    text = drawn(series={"loss": ([0, 1, 2, 3], [100.0, 10.0, 1.0, 0.0])}, log=True)
    (((_, a), (_, b), (_, c)),) = path(text)
    assert b - a == pytest.approx(c - b, abs=0.2) and b > a
    assert all(f">{tick}</text>" in text for tick in (1, 10, 100))


@pytest.mark.parametrize("values", ([2.0, 2.0], [0.0, 0.0], [np.nan, np.nan]))
def test_an_axis_of_one_value_or_none_has_some_room(values):
    text = drawn(series={"flat": ([5, 5], values)})
    assert "nan" not in re.sub("data-chart", "", text).lower()


def test_ticks_are_round_and_few():
    np.testing.assert_allclose(svg_chart._ticks(-1.08, 1.08), [-1, 0, 1])
    np.testing.assert_allclose(svg_chart._ticks(0, 0.3), [0, 0.1, 0.2, 0.3])
    assert svg_chart._ticks(0, 3, whole=True) == [0, 1, 2, 3]
    for low, high in ((0, 1), (-3.3, 7), (1e-4, 3e-4), (0, 12345)):
        assert 2 <= len(svg_chart._ticks(low, high)) <= 7


def test_a_page_with_charts_is_still_one_file(tmp_path):
    chart = svg_chart.Chart("curve", {"a": ([0, 1], [0, 1])})
    sections = [
        html_report.Section("one", "", (chart,)),
        html_report.Section("two", "", folded=True),
    ]
    given = tmp_path / "a.html", "title", ("1", "of 1"), [], sections, {}
    html_report.write_html(*given)
    text = given[0].read_text(encoding="utf-8")
    assert text.count('<figure class="chart"') == 1 and "pointermove" in text
    assert "<details><summary>two</summary></details>" in text and "http" not in text
    html_report.write_html(*given[:4], sections[1:], {})
    assert "<script></script>" in given[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("shape, columns", [((64, 64), 3), ((48, 160), 5), ((32, 32), 12)])
def test_a_grid_is_as_wide_as_a_page_shows_it(shape, columns):
    row = html_report.Row([np.zeros((*shape, 3), np.uint8)] * columns, "scene camera")
    height, width, _ = html_report.grid([row], edge=None).shape
    tallest = height - 2 * html_report.GAP == html_report.TALLEST
    assert width <= html_report.PAGE and (tallest or width > html_report.PAGE - 40)
