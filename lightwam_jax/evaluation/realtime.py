"""Closed-loop evaluation of a policy whose plans come late: docs/realtime.md.

Every cell, a latency and a way to execute, runs the same episodes in virtual time through
`inference.realtime.Realtime`. Nothing sleeps and no clock decides anything: the results are as
reproducible as those of `rollout.py`, and with no latency they are the same.
"""

import dataclasses
import json
import math
import pathlib
import re
import time

import numpy as np

from lightwam_jax import html_report
from lightwam_jax.data import actions as actions_lib
from lightwam_jax.data import normalize
from lightwam_jax.evaluation import closed_loop, instructions, report, rollout
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.evaluation.realtime_episode import Setting
from lightwam_jax.inference import realtime

KINDS = ("delta", "absolute", "gripper")
_LONGEST_MS = 1e6  # of a plan; more is a mistake
_BAND = (0.4, 0.6)  # of a gripper's range: a command in between does not change it
_TITLES = {
    "sync": "the robot waits",
    "index": "late rows skipped",
    "append": "executed late",
    "conserve": "displacement conserved",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of one latency and one execution.

    Attributes:
      latency: as given. mean_latency: in control steps. execution: splice of `Realtime`.
      rate: `report.Rate`. steps: mean over the solved episodes, None if there is none.
      holds: steps per episode in which nothing planned was left to execute.
      skipped: rows per episode that came too late. shortened: chunks per episode executed for fewer
        than `replan_steps`.
      jump: 95 % quantile of what an action changes from one step to the next, over steps and
        dimensions that are no grippers, as a share of the dimension's range in training.
      deepest: rows into a chunk, at most.
    """

    latency: str
    mean_latency: float
    execution: str
    rate: report.Rate
    steps: float | None
    holds: float
    skipped: float
    shortened: float
    jump: float
    deepest: int

    def to_json(self):
        """Returns it as plain numbers."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"rate": report.numbers(self.rate)}


def latency_steps(text, fps):
    """Returns the control steps that --latency means, one of which each plan takes.

    Args:
      text: "2": steps; "1-3": one of 1, 2, 3; or a JSON file with a list of milliseconds.
      fps: control steps per second.

    Raises:
      ValueError: none of these.
    """
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        first = int(match[1])
        return tuple(range(first, int(match[2] or first) + 1)) or _no_latency(text)
    try:
        measured = np.array(json.loads(pathlib.Path(text).read_text(encoding="utf-8")), float)
    except (OSError, ValueError, TypeError):
        return _no_latency(text)
    if measured.ndim != 1 or not len(measured):
        return _no_latency(text)
    wrong = measured[~((measured >= 0) & (measured <= _LONGEST_MS))]
    if len(wrong):
        raise ValueError(
            f"--latency {text} holds {wrong[0]:g}; expected milliseconds, 0 to {_LONGEST_MS:g}"
        )
    return tuple(math.ceil(each * fps / 1000 - 1e-6) for each in measured)


def _no_latency(text):
    raise ValueError(
        f"--latency {text}: expected steps (2), a range of them (1-3), or a JSON file with a list "
        "of milliseconds"
    )


def setting_of(policy, execution, latency, kinds=(), spread=1):
    """Returns the `Setting` of a policy: kinds, trained steps, limits of its training data.

    Args:
      policy: `Policy`. execution: splice. latency: of `latency_steps`.
      kinds: per action dimension, in place of config.data.action_kinds. spread: of `Realtime`.

    Raises:
      ValueError: kinds of another number or unknown.
    """
    config, table = policy.config, normalize.table_of(policy.assets.statistics, "action")
    kinds = tuple(kinds) or actions_lib.kinds(config)
    low, high = (np.asarray(table[f"global_{end}"], float) for end in ("min", "max"))
    if len(kinds) != len(low) or not {*kinds} <= {*KINDS}:
        raise ValueError(
            f"action kinds {','.join(kinds)}: expected one of {', '.join(KINDS)} for each of the "
            f"{len(low)} action dimensions"
        )
    transform = actions_lib.from_config(config)
    for dim in transform.gripper_dims:  # the statistics are of what the model sees
        ends = np.array(transform.closed_open, float)
        at = ends[0] + np.array([low[dim], high[dim]]) * (ends[1] - ends[0])
        low[dim], high[dim] = at.min(), at.max()
    band = tuple((low + share * (high - low)).tolist() for share in _BAND)
    trained, full = realtime.trained_depth(config.loss, config.data.action_horizon)
    limits = (tuple(low.tolist()), tuple(high.tolist()))
    depth = config.data.action_horizon, kinds, trained, full
    return Setting(execution, tuple(latency), *depth, spread, limits, band)


def evaluate(
    policy, suite, out, latencies, executions, began, kinds=(), spread=1, instruction="right"
):
    """Evaluates every cell; writes realtime.json, realtime.png and realtime.html into `out`.

    An evaluation that was interrupted continues: report/realtime_*.jsonl have its episodes.

    Args:
      policy: `Policy` trained for the suite. suite: of `envs.SUITES`. out: pathlib.Path.
      latencies: texts, see `latency_steps`. executions: of `realtime.SPLICES`.
      began: unix time at which it began. kinds, spread: as of `setting_of`.
      instruction: of `instructions.CONTROLS`; another than "right" has a directory of its own.

    Returns:
      [`Cell`], latency by latency.

    Raises:
      ValueError: an unknown latency, execution or kind, or whatever `closed_loop.evaluate` refuses.
    """
    if unknown := [name for name in executions if name not in realtime.SPLICES]:
        raise ValueError(
            f"--execution {', '.join(unknown)}: expected {', '.join(realtime.SPLICES)}"
        )
    suite_run = suites_lib.of_policy(policy, suite, instruction)
    out = instructions.directory(out, instruction)
    directory = out / "report"
    settings = [
        (text, setting_of(policy, name, latency_steps(text, suite_run.fps), kinds, spread))
        for text in latencies
        for name in executions
    ]
    directory.mkdir(parents=True, exist_ok=True)
    manifest, e = closed_loop.manifest_of(policy, suite_run), policy.config.evaluation
    trained, cells = policy.deployed(), []
    trained.warm_up([e.batch])
    for text, setting in settings:
        name = f"{setting.execution}_{re.sub(r'[^A-Za-z0-9.-]+', '_', text)}"
        decisive = report.log_manifest(manifest, manifest["weights"])
        decisive["realtime"] = dataclasses.asdict(setting)
        results = rollout.run(
            trained.act,
            suite_run.played,
            suite_run.episodes,
            e,
            directory / f"realtime_{name}.jsonl",
            decisive,
            name,
            player=setting.player,
        )
        cells.append(cell_of(text, setting, results))
    _write(out, policy.config, manifest, settings[0][1], cells, time.time() - began)
    return cells


def cell_of(latency, setting, results):
    """Returns the `Cell` of `worker.EpisodeResult`s; those that could not run count for nothing."""
    ran = [result for result in results if result.error is None]
    solved = [result.steps for result in ran if result.success]
    per_episode = lambda name: float(np.mean([r.counts.get(name, 0) for r in ran] or [0]))
    moving = [dim for dim, kind in enumerate(setting.kinds) if kind != "gripper"]
    extent = np.subtract(*np.array(setting.limits, float)[::-1])[moving]
    extent[extent <= 0] = np.inf  # a dimension that never moves has no range to compare with
    jumps = [np.abs(np.diff(r.actions[:, moving], axis=0) / extent).ravel() for r in ran]
    jumps = np.concatenate(jumps) if any(map(len, jumps)) else np.zeros(1)
    return Cell(
        latency=latency,
        mean_latency=float(np.mean(setting.latency)),
        execution=setting.execution,
        rate=report.rate(results),
        steps=float(np.mean(solved)) if solved else None,
        holds=per_episode("holds"),
        skipped=per_episode("skipped"),
        shortened=per_episode("shortened"),
        jump=float(np.quantile(jumps, 0.95)),
        deepest=max((r.counts.get("deepest", 0) for r in ran), default=0),
    )


def table(cells):
    """Returns rows of text for `Cell`s, the header first."""
    head = ("latency", "execution", "solved", "steps", "holds", "skipped", "jump p95", "deepest")
    rows = [head]
    for c in cells:
        steps = "-" if c.steps is None else f"{c.steps:.1f}"
        counts = f"{c.holds:.1f}", f"{c.skipped:.1f}", f"{100 * c.jump:.0f} %", str(c.deepest)
        rows.append((c.latency, c.execution, report.brief(c.rate), steps, *counts))
    return rows


def text_table(cells):
    """Returns `table` as lines with columns."""
    rows = table(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def chart(path, cells, dt):
    """Writes a PNG: success against latency with Wilson intervals, a line per execution.

    Args:
      path: file. cells: `Cell`s; those whose latency varies have no place on the axis.
      dt: seconds per control step.
    """
    fixed = [cell for cell in cells if cell.latency.isdigit()]
    names = list(dict.fromkeys(cell.execution for cell in fixed))
    with html_report.chart(path, 7.2, 3.6) as axes:
        for place, (name, colour) in enumerate(zip(names, html_report.COLOURS)):
            line = sorted((c.mean_latency, c.rate) for c in fixed if c.execution == name)
            # Side by side, so that equal rates do not hide each other's intervals.
            x = np.array([late for late, _ in line]) + 0.05 * (place - (len(names) - 1) / 2)
            y = np.array([100 * rate.value for _, rate in line])
            ends = 100 * np.array([rate.interval for _, rate in line]).T
            bars = np.abs(ends - y)
            axes.errorbar(x, y, bars, color=colour, lw=1.8, elinewidth=1, marker="o", ms=4)
            axes.plot([], [], color=colour, marker="o", ms=4, label=f"{name}: {_TITLES[name]}")
        axes.set_xticks(sorted({cell.mean_latency for cell in fixed}))
        axes.set_ylim(0, 104)
        axes.set_xlabel(f"latency of a plan, control steps of {1000 * dt:.0f} ms")
        axes.set_ylabel("episodes solved, %")
        axes.grid(axis="y", color="#e6e9ee", lw=0.8)
        axes.legend(frameon=False, fontsize=9, loc="lower left")


def _write(out, config, manifest, setting, cells, seconds):
    e, fps = config.evaluation, suites_lib.envs.suite(config.evaluation.suite).FPS
    about = dataclasses.asdict(setting)
    about = {key: about[key] for key in ("kinds", "trained_steps", "full_steps", "spread")}
    content = {"cells": [cell.to_json() for cell in cells], "seconds": round(seconds, 1)}
    content |= {"execution": about, "fps": fps, "manifest": manifest}
    (out / "realtime.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    media = ()
    if any(cell.latency.isdigit() for cell in cells):
        chart(out / "realtime.png", cells, 1 / fps)
        media = (html_report.Media(out / "realtime.png", wide=True),)
    # What the page opens with: the least latency that there is, as a robot would be run.
    first = min(
        cells, key=lambda c: (c.execution != "conserve", not c.mean_latency, c.mean_latency)
    )
    meaning = (
        f"solved with plans {first.latency} control steps late, execution {first.execution}; the "
        f"others are below. Virtual time, {e.replan_steps} steps of each plan."
    )
    if control := manifest.get("instruction"):
        meaning += f" The policy was given {instructions.LABELS[control]}."
    section = html_report.Section(
        "Success against latency",
        "The same episodes in every row. Steps: mean over the solved episodes. Holds and skipped: "
        "per episode. Jump: the 95 % quantile of what an action changes from step to step, as a "
        "share of the range. Deepest: rows into a plan, of which training weighed "
        f"{setting.trained_steps}, and {setting.full_steps} of them fully.",
        media,
        tuple(table(cells)),
        whole=True,
    )
    title = f"Light-WAM JAX · {config.name} · late plans"
    headline = (f"{first.rate.successes} of {first.rate.episodes}", meaning)
    html_report.write_html(out / "realtime.html", title, headline, [], [section], manifest)
