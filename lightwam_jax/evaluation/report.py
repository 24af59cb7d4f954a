"""The numbers of an evaluation: success rates with intervals, summary.json, charts.

Every success rate carries its Wilson interval, and every result a manifest of what produced it.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import subprocess

import numpy as np

from lightwam_jax import html_report
from lightwam_jax.html_report import INK

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "mujoco")


def wilson_interval(successes, n, z=1.96):
    """Returns (low, high), the Wilson score interval of a success rate; (0, 1) when n is 0.

    Raises:
      ValueError: counts that contradict each other.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes; expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Both ends are exact there; rounding would leave 0.9999999999999999.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Successes among the episodes that ran; `errors` more did not, and count for nothing."""

    successes: int
    episodes: int
    errors: int

    @property
    def value(self):
        """Share of successes, NaN when nothing ran."""
        return self.successes / self.episodes if self.episodes else float("nan")

    @property
    def interval(self):
        """(low, high) of `wilson_interval`."""
        return wilson_interval(self.successes, self.episodes)

    def __str__(self):
        low, high = (100 * bound for bound in self.interval)
        errors = f"; {self.errors} could not run" if self.errors else ""
        return (
            f"{100 * self.value:3.0f} %  {self.successes}/{self.episodes}, "
            f"95 % interval {low:.0f} to {high:.0f} %{errors}"
        )


def numbers(r):
    """Returns a `Rate` as plain numbers; the rate is None when nothing ran."""
    return {
        "success_rate": r.value if r.episodes else None,
        "interval": list(r.interval),
        **dataclasses.asdict(r),
    }


def brief(r):
    """Returns a `Rate` in as few words as a table has room for: "65 % (43 to 82), 13 of 20"."""
    low, high = (100 * bound for bound in r.interval)
    errors = f", {r.errors} could not run" if r.errors else ""
    share = f"{100 * r.value:.0f} % ({low:.0f} to {high:.0f}), " if r.episodes else ""
    return f"{share}{r.successes} of {r.episodes}{errors}"


def rate(records):
    """Returns the `Rate` of rollout records."""
    outcomes = [record.success for record in records]
    return Rate(outcomes.count(True), len(outcomes) - outcomes.count(None), outcomes.count(None))


def by_task(records):
    """Returns {task: `Rate`}, in the order of first use."""
    tasks = {}
    for record in records:
        tasks.setdefault(record.episode.task, []).append(record)
    return {task: rate(played) for task, played in tasks.items()}


def by_group(records, groups):
    """Returns {name: `Rate`} of groups {name: [tasks]}, without those that nobody played."""
    found = {
        name: [record for record in records if record.episode.task in tasks]
        for name, tasks in ((name, {*tasks}) for name, tasks in groups.items())
    }
    return {name: rate(played) for name, played in found.items() if played}


def write_summary(
    path, trained, untrained, expert, seconds, manifest, tasks=None, groups=None, published=None
):
    """Writes summary.json and returns it.

    Args:
      path: file to write.
      trained, untrained: `Rate`s over the same episodes.
      expert: that of the scripted expert, over those of them whose task has one; None where none
        has, and then the summary has no key for it.
      seconds: wall clock of the whole pipeline.
      manifest: of `manifest(...)`.
      tasks: {"trained", "untrained" and perhaps "expert": {task: `Rate`}}.
      groups: likewise, for groups of tasks.
      published: of `reference.published`.
    """
    summary = {
        "success_rate": trained.value,
        "interval": list(trained.interval),
        "untrained_success_rate": untrained.value,
        "untrained_interval": list(untrained.interval),
        **(
            {}
            if expert is None
            else {
                "expert_success_rate": expert.value,
                "expert_interval": list(expert.interval),
                "expert_episodes": expert.episodes,
            }
        ),
        "episodes": trained.episodes,
        "errors": trained.errors,
        "seconds": round(seconds, 1),
        **({"published": published} if published else {}),
        **({"groups": _turned(groups)} if groups and groups["trained"] else {}),
        "tasks": _turned(tasks or {}),
        "manifest": manifest,
    }
    pathlib.Path(path).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _turned(rates):
    """Returns {name: {who: numbers}} of {who: {name: `Rate`}}."""
    found = {}
    for who, by_name in rates.items():
        for name, r in by_name.items():
            found.setdefault(name, {})[who] = numbers(r)
    return found


def manifest(config, step, weights, device, setup=None, environment=None, driver=None):
    """Returns what has to be equal for two results to be comparable, and where they come from.

    Args:
      config: `Config`.
      step: of the checkpoint.
      weights: `weights_hash` of the parameters.
      device: description of the accelerator.
      setup: `suites.Setup`. environment: of `rollout.describe`.
      driver: of `gpu_driver`.
    """
    e = config.evaluation
    suite = (
        {}
        if setup is None
        else {
            "suite": setup.suite,
            "tasks": setup.tasks,
            "env": dataclasses.asdict(setup.env),
            "initial_states": sorted({episode.init for episode in setup.episodes}),
            "demonstrated_seeds": setup.demonstrated,
            "environment": environment,
        }
    )
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        **suite,
        "config": config.name,
        "model": config.model.variant,
        "step": step,
        "weights": weights,
        "seeds": [e.first_seed, e.first_seed + e.episodes - 1],
        "replan_steps": e.replan_steps,
        "max_steps": e.max_steps,
        "batch": e.batch,
        "workers": e.workers,
        "device": device,
        "driver": driver,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


# Of a manifest: what decides how an episode goes, beside the policy.
DECISIVE = (
    "suite",
    "env",
    "environment",
    "replan_steps",
    "max_steps",
    "batch",
    "device",
    "driver",
    "packages",
)


def log_manifest(manifest, policy):
    """Returns the manifest of one policy's log: its weights' hash, or "expert", and `DECISIVE`."""
    return {"policy": policy, **{key: manifest[key] for key in DECISIVE}}


def gpu_driver(backend):
    """Returns the version of the GPU's driver, or None where there is no GPU to drive.

    Args:
      backend: `jax.default_backend()`.

    Returns:
      several, with commas, if they differ; "unknown" where `nvidia-smi` is missing or fails.
    """
    if backend != "gpu":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ", ".join(sorted({*said.stdout.split()})) or "unknown"


def weights_hash(leaves):
    """Returns 16 hex digits over (path, array) pairs, in their order."""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _commit():
    """The commit of the source tree, "+" when it has changes; None outside a repository."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no repository
        return None


# ---- charts ------------------------------------------------------------------------------------

TRAINED, UNTRAINED, EXPERT = "#2563eb", "#a3adba", "#2f9e6e"
COLOURS = (TRAINED, "#d97706", EXPERT, "#9333ea", "#dc2626", "#0891b2", INK, UNTRAINED)


def success_chart(path, rates):
    """Writes a PNG of bars with Wilson intervals.

    Args:
      path: file to write.
      rates: {label: `Rate`}, in the order trained, untrained and, if there is one, expert.
    """
    with html_report.chart(path, 9.4, 0.6 + 0.5 * len(rates)) as axes:
        for row, (r, colour) in enumerate(zip(rates.values(), (TRAINED, UNTRAINED, EXPERT))):
            low, high = (100 * bound for bound in r.interval)
            axes.barh(row, 100 * r.value, color=colour, height=0.56)
            axes.plot([low, high], [row, row], color=INK, lw=1.3)
            for end in (low, high):
                axes.plot([end, end], [row - 0.12, row + 0.12], color=INK, lw=1.3)
            axes.text(
                103,
                row,
                f"{100 * r.value:.0f} %",
                va="center",
                color=INK,
                fontsize=12,
                fontweight="bold",
            )
        axes.set_yticks(range(len(rates)), rates, fontsize=11)
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("episodes solved, %; the line is the 95 % Wilson interval")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)


def curve_chart(path, series, ylabel, log=False, xlabel="training step", width=6.4):
    """Writes a PNG of curves.

    Args:
      path: file to write.
      series: {label: (x [n], values [n])}.
      ylabel, xlabel: with their units. log: logarithmic values. width: inches.
    """
    from matplotlib import ticker

    with html_report.chart(path, width, 3.0) as axes:
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
