"""The page of `--mode open_loop`: errors, baselines, and the curves of whole episodes."""

import numpy as np

from lightwam_jax import html_report, svg_chart
from lightwam_jax.data.formats import video as video_lib
from lightwam_jax.evaluation import stitched

_OPEN = 2  # episodes that are not folded away, and have a video
_FRAMES = 64  # of a video, read at once
_RECORDED, _PREDICTED = html_report.SOFT, html_report.BLUE
_CURVES = len(html_report.COLOURS)  # dimensions that are told apart by colours


def write(directory, errors, episodes, span, policy, missing=""):
    """Writes open_loop.html and the videos in it.

    Args:
      directory: where `open_loop.write` put its images.
      errors: of `open_loop.evaluate`. policy: `Policy`.
      episodes, span: of `stitched.evaluate`; [] and None, and in `missing` why, without them.

    Returns:
      the path of the page.
    """
    config, path = policy.config, directory / "open_loop.html"
    names = stitched.names(config)
    headline, tone = (("-", f"Whole episodes are not shown: {missing}"), "")
    sections, facts = [], []
    if episodes:
        l1 = stitched.errors(episodes)
        headline, tone = _headline(l1, span)
        facts = _facts(episodes, config)
        sections = [_comparison(l1, span, names)]
        sections += [
            _episode(each, span, names, policy, directory, number)
            for number, each in enumerate(episodes)
        ]
    sections.append(_chunks(errors, names, directory))
    facts += [
        (f"{errors['samples']:,}", "held-out windows"),
        (f"{policy.step:,}", "training steps"),
    ]
    manifest = {
        "run": config.name,
        "step": policy.step,
        "data": config.data.path,
        "val_fraction": config.data.val_fraction,
        "replan_steps": config.evaluation.replan_steps,
        "action_horizon": config.data.action_horizon,
    }
    title = f"Open loop · {config.name}"
    html_report.write_html(
        path, title, headline, facts, sections, manifest, "What was evaluated", tone
    )
    return path


def _headline(l1, span):
    """((number, sentence), tone)."""
    mean, moving = stitched.shares(l1, span)
    best = min(stitched.BASELINES, key=mean.get)
    better = sum(
        l1[stitched.POLICY][dim] < min(l1[name][dim] for name in stitched.BASELINES)
        for dim in moving
    )
    said = (
        "of the training range is the mean error of the actions over whole held-out episodes. "
        f"The best baseline, {best}, has {_percent(mean[best])}. The policy is better than every "
        f"baseline in {better} of {len(moving)} dimensions."
    )
    tone = "good" if mean[stitched.POLICY] < mean[best] else "bad"
    return (_percent(mean[stitched.POLICY]), said), tone


def _percent(share):
    return f"{100 * share:.1f} %"


def _facts(episodes, config):
    steps = sum(each.episode.length for each in episodes)
    plans = sum(len(each.starts) for each in episodes)
    return [
        (f"{len(episodes)}", "held-out episodes"),
        (f"{steps:,}", f"recorded steps, {plans:,} plans"),
        (f"{config.evaluation.replan_steps}", f"of {config.data.action_horizon} actions executed"),
    ]


def table(l1, span, names):
    """Returns rows: L1 of each dimension, physical units and share of the training range."""
    rows = [("dimension", "training range", "policy", *stitched.BASELINES, "policy, of the range")]
    for dim, name in enumerate(names):
        extent = span.high[dim] - span.low[dim]
        best = min(l1[each][dim] for each in stitched.BASELINES)
        ours = l1[stitched.POLICY][dim]
        share = _percent(ours / extent) if extent > 0 else "never moves"
        cells = (f"{l1[each][dim]:.4g}" for each in (stitched.POLICY, *stitched.BASELINES))
        worse = " (a baseline is better)" if extent > 0 and best <= ours else ""
        between = f"{span.low[dim]:.4g} to {span.high[dim]:.4g}"
        rows.append((name, between, *cells, share + worse))
    mean, _ = stitched.shares(l1, span)
    cells = (_percent(mean[each]) for each in (stitched.POLICY, *stitched.BASELINES))
    rows.append(("mean, of the range", "", *cells, ""))
    return tuple(rows)


def text_table(l1, span, names):
    """Returns `table` as text for a terminal."""
    rows = table(l1, span, names)
    widths = [max(len(row[k]) for row in rows) + 2 for k in range(len(rows[0]))]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _comparison(l1, span, names):
    return html_report.Section(
        "Against acting without looking",
        "L1 error in physical units over whole episodes, with plans stitched as a robot would "
        "execute them. Hold repeats the last recorded action, mean is the mean action of the "
        "training episodes, repeat last goes on with the last action of the plan before. Each "
        "does so anew at every plan.",
        table=table(l1, span, names),
        whole=True,
    )


def _chunks(errors, names, directory):
    """Errors by step of the chunk, over all held-out windows."""
    by_dim = np.asarray(errors["l1_step_dim"])
    steps = np.arange(len(by_dim))
    charts = {"L1, normalised units, mean over dimensions": {"mean": (steps, errors["l1_step"])}}
    media = []
    if len(names) <= _CURVES:
        series = {name: (steps, by_dim[:, dim]) for dim, name in enumerate(names)}
        charts["L1, normalised units, each dimension"] = series
    else:
        media.append(html_report.Media(directory / "open_loop_dimensions.png", wide=True))
    shown = [
        svg_chart.Chart(title, series, "step of the chunk", low=0.0, high=0.1)
        for title, series in charts.items()
    ]
    if errors["grippers"]:
        shown.append(_gripper_changes(errors))
    return html_report.Section(
        "How far ahead it can plan",
        "Errors of the whole chunk, executed or not, over windows of the held-out data, in "
        "normalised units: the training range is about 2 wide.",
        (*shown, *media),
    )


def _gripper_changes(errors):
    """How much later than recorded grippers move: windows by the steps between."""
    series = {}
    for counts, (name, found) in zip(errors["gripper_offsets"], errors["grippers"].items()):
        missed = found["changing"] - int(np.sum(counts))
        label = f"gripper {name}: {found['changing']} recorded changes, {missed} missed"
        series[label] = (np.arange(len(counts)) - len(counts) // 2, np.asarray(counts))
    title = "Windows by how many steps later than recorded the gripper moves"
    return svg_chart.Chart(title, series, "steps later", low=0.0, high=1.0, marks=(0,))


def _episode(one, span, names, policy, directory, number):
    """Predicted against recorded, dimension by dimension, beside the video."""
    episode, planned = one.episode, one.actions[stitched.POLICY]
    steps = np.arange(episode.length)
    charts = []
    for dim, name in enumerate(names):
        both = episode.action[:, dim], planned[:, dim]
        low, high = svg_chart.limits(np.concatenate(both), span.low[dim], span.high[dim])
        error = np.abs(both[0] - both[1]).mean()
        series = {"recorded": (steps, both[0]), "predicted": (steps, both[1])}
        charts.append(
            svg_chart.Chart(
                f"{name} · L1 {error:.3g}",
                series,
                "step",
                low,
                high,
                marks=tuple(one.starts),
                colours=(_RECORDED, _PREDICTED),
            )
        )
    media, cameras = (), policy.config.data.cameras
    if number < _OPEN:
        media = _video(episode, cameras, directory / f"episode_{number}.mp4")
    return html_report.Section(
        f"“{episode.task}” · {episode.id}, {episode.length} steps",
        "Grey is recorded, blue is predicted; faint lines are new plans. An axis covers at least a "
        "quarter of the training range. Point at a chart for values.",
        (*media, *charts),
        folded=number >= _OPEN,
    )


def _video(episode, cameras, path):
    """[the cameras of an episode as a video that follows the charts]."""
    with video_lib.Writer(path, episode.fps, crf="20", faststart=True, pad=True) as writer:
        for first in range(0, episode.length, _FRAMES):
            steps = np.arange(first, min(first + _FRAMES, episode.length))
            images = [episode.frames(camera, steps) for camera in cameras]
            rows = ([html_report.Row(tiles)] for tiles in zip(*images))
            writer.add(np.stack([html_report.grid(row, cameras, None) for row in rows]))
    caption = "What was recorded; goes where the pointer is in the charts."
    return [html_report.Media(path, caption, drawn=True, places=episode.fps)]
