import base64
import collections
import contextlib
import json
import re
import types

import numpy as np
import pytest

from lightwam_jax import html_report
from lightwam_jax.envs import base as envs_base
from lightwam_jax.evaluation import compare, draw, report, suites, tables, worker
from tests.inference.test_policy import make_config


def result(seed, success, prompt="put the red cube in the tray"):
    episode = envs_base.EpisodeSpec("tray", 0, seed)
    if success is None:
        return worker.failed_to_run(episode, "Traceback: the simulator broke")
    return worker.EpisodeResult(episode, success, 40, prompt, None, 1.0, seed, np.zeros((40, 4)))


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert report.wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)
    assert report.wilson_interval(50, 50)[1] == 1.0
    assert report.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="6 successes in 5 episodes"):
        report.wilson_interval(6, 5)


def test_episodes_that_could_not_run_count_for_nothing():
    rate = report.rate([result(i, s) for i, s in enumerate([True, True, False, None])])
    assert (rate.successes, rate.episodes, rate.errors) == (2, 3, 1)
    assert rate.value == pytest.approx(2 / 3)
    assert str(rate) == " 67 %  2/3, 95 % interval 21 to 94 %; 1 could not run"
    assert str(report.Rate(2, 3, 0)) == " 67 %  2/3, 95 % interval 21 to 94 %"
    assert np.isnan(report.Rate(0, 0, 2).value) and report.Rate(0, 3, 0).value == 0


@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo 550.54.15; echo 550.54.15", "550.54.15"),
        ("echo 560.1; echo 550.2", "550.2, 560.1"),
        ("echo no devices were found; exit 6", "unknown"),
        ("true", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_driver_of_a_gpu_is_asked_for(tmp_path, monkeypatch, script, expected):
    marks = tmp_path / "asked"
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(
            f"#!/bin/sh\n: > {marks}\n{script}\n", encoding="utf-8"
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None if script is None else ":")
    assert report.gpu_driver("cpu") is None and not marks.exists(), "asked where there is no GPU"
    assert report.gpu_driver("gpu") == expected
    manifest = report.manifest(make_config(), 7, "abc", "1 x H100", driver=expected)
    assert manifest["driver"] == expected


def test_weights_hash_sees_values_names_and_dtypes():
    w = np.arange(6, dtype=np.float32)
    hashes = {
        report.weights_hash(leaves)
        for leaves in (
            [("a", w)],
            [("b", w)],
            [("a", w + 1)],
            [("a", w.astype(np.int32))],
            [("a", w[None])],
            [("a", np.float32(1))],
        )
    }
    assert len(hashes) == 6


def test_page_is_one_file_that_needs_nothing_else(tmp_path):
    html_report.save_png(tmp_path / "a.png", np.full((8, 8, 3), 200, np.uint8))
    draw.save_mp4(tmp_path / "b.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    sections = [
        html_report.Section(
            "Videos <here>",
            "text",
            (
                html_report.Media(tmp_path / "a.png", "caption", wide=True),
                html_report.Media(tmp_path / "b.mp4", "“a & b”", "not solved"),
            ),
        ),
        html_report.Section("Table", "", table=(("seed",), (1,), (2,))),
    ]
    html_report.write_html(
        tmp_path / "report.html",
        "Title",
        ("80 %", "of all"),
        [("1", "fact")],
        sections,
        {"packages": {"jax": "1.2"}},
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    assert "Videos &lt;here&gt;" in text and "packages.jax" in text and "“a &amp; b”" in text
    assert '<i class="not">not solved</i>' in text
    embedded = re.search(r"data:image/png;base64,([^\"]+)", text).group(1)
    assert base64.b64decode(embedded) == (tmp_path / "a.png").read_bytes()


class Drawn:
    """Axes that keep what is drawn on them: [(method, arguments, keywords)]."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):  # numpy asks whether this is an array
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        if name in ("spines", "yaxis", "figure"):
            return collections.defaultdict(lambda: self) if name == "spines" else self
        return call

    def of(self, method):
        return [(args, kwargs) for name, args, kwargs in self.calls if name == method]


@pytest.fixture
def axes(monkeypatch):
    """The axes of the next chart; nothing is written."""
    found = Drawn()
    monkeypatch.setattr(html_report, "chart", lambda *args, **kwargs: contextlib.nullcontext(found))
    return found


def test_bars_are_percentages_with_their_intervals(axes):
    report.success_chart("", {"ours": report.Rate(40, 50, 0), "nothing": report.Rate(0, 20, 0)})
    bars = axes.of("barh")
    assert [args for args, _ in bars] == [(0, 80.0), (1, 0.0)]
    assert [kwargs["color"] for _, kwargs in bars] == [report.TRAINED, report.UNTRAINED]
    lines = [args for args, _ in axes.of("plot")]
    np.testing.assert_allclose(lines[0], ([66.964, 88.758], [0, 0]), atol=0.01)
    np.testing.assert_allclose(lines[1][0], [66.964] * 2, atol=0.01)
    np.testing.assert_allclose(lines[2][0], [88.758] * 2, atol=0.01)
    np.testing.assert_allclose(lines[3], ([0, 16.113], [1, 1]), atol=0.01)
    assert [args[1:] for args, _ in axes.of("text")] == [(0, "80 %"), (1, "0 %")]
    assert [list(args[1]) for args, _ in axes.of("set_yticks")] == [["ours", "nothing"]]


def test_curves_have_names_units_and_colours_of_their_own(axes):
    series = {f"dimension {i}": ([1, 2], [i, i + 1]) for i in range(9)}
    html_report.curve_chart("", series, "loss", xlabel="step")
    plots = axes.of("plot")
    assert [args for args, _ in plots] == list(series.values())
    assert [kwargs["label"] for _, kwargs in plots] == list(series)
    assert len({kwargs["color"] for _, kwargs in plots[:8]}) == 8
    assert axes.of("set_ylabel") == [(("loss",), {})] and not axes.of("set_yscale")
    assert axes.of("set_xlabel") == [(("step",), {})]
    html_report.curve_chart("", series, "loss", log=True)
    assert axes.of("set_yscale") == [(("log",), {})]


def test_charts_are_written(tmp_path):
    rates = {
        "trained": report.Rate(4, 5, 0),
        "untrained": report.Rate(0, 5, 0),
        "expert": report.Rate(5, 5, 0),
    }
    report.success_chart(tmp_path / "success.png", rates)
    series = {f"dimension {i}": ([1, 2, 3], [1.0, 0.5, 0.1 * (i + 1)]) for i in range(9)}
    html_report.curve_chart(tmp_path / "curves.png", series, "loss", log=True)
    assert (tmp_path / "success.png").stat().st_size > 5000
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_shown_episodes_cover_instructions_and_do_not_hide_failures():
    results = [
        result(i, s, p)
        for i, (s, p) in enumerate(
            [(True, "a"), (True, "a"), (False, "a"), (True, "b"), (None, "c"), (False, "b")]
        )
    ]
    assert [r.episode.seed for r in tables.choose(results, 4)] == [0, 3, 1, 2]
    assert [r.episode.seed for r in tables.choose(results[:2], 4)] == [0, 1]
    assert [r.episode.seed for r in tables.choose([results[2], results[5]], 2)] == [2, 5]


def test_demonstrated_seeds_are_refused(tmp_path):
    config = types.SimpleNamespace(
        evaluation=types.SimpleNamespace(
            first_seed=190, episodes=20, suite="demo", tasks=(), env={"image_size": 32}
        ),
        data=types.SimpleNamespace(path=str(tmp_path)),
    )
    about = {"seeds": {"tabletop": [[0, 200], [500_000, 50]]}}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "recording.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match=r"seeds 190\.\.209 are not held out"):
        suites.of_config(config, "demo")
    config.evaluation.first_seed = 500_049
    with pytest.raises(ValueError, match=r"demonstrations of tabletop may have 500000\.\.500049"):
        suites.of_config(config, "demo")
    config.evaluation.first_seed = 200
    found = suites.of_config(config, "demo")
    assert [episode.seed for episode in found.episodes] == list(range(200, 220))
    assert found.demonstrated == {"tabletop": [(0, 200), (500_000, 50)]}
    assert found.env.kwargs == {"image_size": 32}
    with pytest.raises(ValueError, match="use --mode demo"):
        suites.of_config(config, "metaworld")


def test_recorded_seeds_are_refused(tmp_path):
    (tmp_path / "meta").mkdir()
    about = {"first_seed": 0, "tried": {"reach-v3": 12, "push-v3": 10}}
    (tmp_path / "meta" / "recording.json").write_text(json.dumps(about), encoding="utf-8")
    config = types.SimpleNamespace(
        evaluation=types.SimpleNamespace(
            first_seed=11, episodes=2, suite="metaworld", env={}, tasks=("push-v3",)
        ),
        data=types.SimpleNamespace(path=str(tmp_path)),
    )
    assert suites.of_config(config, "metaworld").tasks == ["push-v3"]
    config.evaluation.tasks = ("MT10",)
    with pytest.raises(ValueError, match=r"demonstrations of reach-v3 may have 0\.\.11"):
        suites.of_config(config, "metaworld")
    config.evaluation.tasks = ("juggle",)
    with pytest.raises(ValueError, match="no task juggle"):
        suites.of_config(config, "metaworld")
    config.evaluation.tasks = ("MT1",)
    with pytest.raises(ValueError, match="MT1 is any single task of Meta-World: give its name"):
        suites.of_config(config, "metaworld")


def summary(path, successes, **changes):
    """Writes a summary.json of two tasks, ten episodes each."""
    rates = {
        "trained": {"a": report.Rate(successes, 10, 0), "b": report.Rate(10, 10, 1)},
        "untrained": {"a": report.Rate(0, 10, 0), "b": report.Rate(0, 10, 0)},
    }
    manifest = {"weights": "abc", "replan_steps": 4, "environment": {"versions": {"mujoco": "1"}}}
    report.write_summary(
        path,
        report.Rate(successes + 10, 20, 1),
        report.Rate(0, 20, 0),
        report.Rate(20, 20, 0),
        1.0,
        manifest | changes,
        rates,
    )


def test_results_are_compared_only_if_they_measured_the_same(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    summary(one / "summary.json", 2)
    summary(other / "summary.json", 8, weights="xyz")
    table = compare.compare(one, other / "summary.json")
    lines = table.splitlines()
    assert lines[1].startswith("a ") and "2/10" in lines[1] and "8/10" in lines[1]
    assert "10/10" in lines[2] and "1 could not run" in lines[2]
    assert lines[3].startswith("all") and "12/20, 95 % interval 39 to 78 %" in lines[3]
    assert "weights: 'abc' against 'xyz'" in table
    summary(other / "summary.json", 8, environment={"versions": {"mujoco": "2"}})
    with pytest.raises(ValueError, match=r"environment\.versions\.mujoco: '1' against '2'"):
        compare.compare(one, other)
    assert "mujoco" in compare.compare(one, other, ["environment.versions"])
    summary(one / "summary.json", 8, driver="550.54.15")
    summary(other / "summary.json", 8, driver="560.35.03")
    with pytest.raises(ValueError, match=r"driver: '550\.54\.15' against '560\.35\.03'"):
        compare.compare(one, other)
    assert "driver: '550.54.15'" in compare.compare(one, other, ["driver"])


def test_brief_rate_leaves_nothing_out():
    assert report.brief(report.Rate(13, 20, 0)) == "65 % (43 to 82), 13 of 20"
    assert report.brief(report.Rate(0, 20, 1)) == "0 % (0 to 16), 0 of 20, 1 could not run"
    assert report.brief(report.Rate(0, 0, 2)) == "0 of 0, 2 could not run"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file or directory"),
        ("directory", "no summary.json in it"),
        ("{", "is no JSON file"),
        ("[]", "is no summary.json of a closed-loop evaluation"),
        ('{"manifest": {}}', "is no summary.json of a closed-loop evaluation"),
    ],
)
def test_what_is_no_result_cannot_be_compared(tmp_path, content, words):
    place = tmp_path / "other"
    if content is not None:
        place.mkdir()
    if content not in (None, "directory"):
        (place / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        compare.compare(place, place)
    assert f"--compare {place}" in str(caught.value)
