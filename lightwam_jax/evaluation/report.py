"""The numbers of an evaluation: success rates with intervals, summary.json, charts.

Every success rate carries its Wilson interval, and every result a manifest of what produced it.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import platform
import subprocess

import numpy as np
import scipy.stats

from lightwam_jax import html_report

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "mujoco")
_LEVEL = 0.9500042097035593  # 1.96 standard deviations
TRAINED, UNTRAINED, EXPERT = html_report.BLUE, html_report.GREY, html_report.GREEN
OTHERS = html_report.COLOURS[1]


# ---- success rates -------------------------------------------------------------------------------


def wilson_interval(successes, n):
    """Returns (low, high), the 95 % Wilson interval of a success rate; (0, 1) when n is 0.

    Raises:
      ValueError: counts that contradict each other.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes; expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    test = scipy.stats.binomtest(successes, n)
    low, high = test.proportion_ci(confidence_level=_LEVEL, method="wilson")
    return float(low), float(high)


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


def rate(results):
    """Returns the `Rate` of `worker.EpisodeResult`s."""
    outcomes = [result.success for result in results]
    return Rate(outcomes.count(True), len(outcomes) - outcomes.count(None), outcomes.count(None))


def by_task(results):
    """Returns {task: `Rate`}, in the order of first use."""
    tasks = {}
    for result in results:
        tasks.setdefault(result.episode.task, []).append(result)
    return {task: rate(played) for task, played in tasks.items()}


def by_group(results, groups):
    """Returns {name: `Rate`} of groups {name: [tasks]}, without those that nobody played."""
    found = {}
    for name, tasks in groups.items():
        tasks = frozenset(tasks)  # there may be thousands
        if played := [result for result in results if result.episode.task in tasks]:
            found[name] = rate(played)
    return found


# ---- summary and manifest ------------------------------------------------------------------------


def write_summary(
    path,
    trained,
    untrained,
    expert,
    seconds,
    manifest,
    tasks=None,
    groups=None,
    published=None,
    times=None,
):
    """Writes summary.json and returns it.

    Args:
      path: file to write.
      trained, untrained: `Rate`s over the same episodes; None for the second where it was not run.
      expert: that of the scripted expert over the episodes of tasks that have one; None where
        none has, and then the summary has no key for it.
      seconds: wall clock of the whole pipeline. manifest: of `manifest(...)`.
      tasks: {"trained", "untrained" and perhaps "expert": {task: `Rate`}}. groups: likewise, of
        groups of tasks. published: of `libero_published.published`. times: of `mean_times`.
    """
    summary = {
        "success_rate": trained.value,
        "interval": list(trained.interval),
    }
    if untrained is not None:
        summary["untrained_success_rate"] = untrained.value
        summary["untrained_interval"] = list(untrained.interval)
    if expert is not None:
        summary["expert_success_rate"] = expert.value
        summary["expert_interval"] = list(expert.interval)
        summary["expert_episodes"] = expert.episodes
    summary |= {
        "episodes": trained.episodes,
        "errors": trained.errors,
        "seconds": round(seconds, 1),
    }
    if times:
        summary["seconds_per_episode"] = times
    if published:
        summary["published"] = published
    if groups and groups["trained"]:
        summary["groups"] = _turned(groups)
    summary |= {"tasks": _turned(tasks or {}), "manifest": manifest}
    pathlib.Path(path).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def mean_times(results):
    """Returns {what: seconds of the mean episode} of `worker.EpisodeResult`s that have times."""
    timed = [result.times for result in results if result.times]
    names = timed[0] if timed else ()
    return {name: round(sum(t[name] for t in timed) / len(timed), 3) for name in names}


def _turned(rates):
    """Returns {name: {who: numbers}} of {who: {name: `Rate`}}."""
    found = {}
    for who, by_name in rates.items():
        for name, r in by_name.items():
            found.setdefault(name, {})[who] = numbers(r)
    return found


def manifest(config, step, weights, device, suite_run=None, environment=None, driver=None):
    """Returns what has to be equal for two results to be comparable, and where they come from.

    Args:
      config: `Config`. step: of the checkpoint. weights: `weights_hash` of the parameters.
      device: description of the accelerator. driver: of `gpu_driver`.
      suite_run: `suites.SuiteRun`. environment: of `rollout.describe`.
    """
    e, found = config.evaluation, {}
    if suite_run is not None:
        found = {
            "suite": suite_run.suite,
            "tasks": suite_run.tasks,
            "env": dataclasses.asdict(suite_run.env),
            "initial_states": sorted({episode.init for episode in suite_run.episodes}),
            "demonstrated_seeds": suite_run.demonstrated,
            "environment": environment,
        }
        if suite_run.instruction != "right":
            found["instruction"] = suite_run.instruction
    return found | {
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
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# Keys of a manifest that decide how an episode goes, beside the policy.
_MACHINE = ("device", "driver", "packages")
DECISIVE = ("suite", "env", "environment", "replan_steps", "max_steps", "batch", *_MACHINE)


def log_manifest(manifest, policy):
    """Returns the manifest of one policy's log: its weights' hash, or "expert", and `DECISIVE`.

    "instruction" is decisive too, and only there in a language control.
    """
    control = {key: manifest[key] for key in ("instruction",) if key in manifest}
    return {"policy": policy, **{key: manifest[key] for key in DECISIVE}, **control}


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
    how = dict(cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, check=True)

    def git(*arguments):
        return subprocess.run(["git", *arguments], **how).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no repository
        return None


# ---- what the report shows -----------------------------------------------------------------------


def success_chart(path, rates):
    """Writes a PNG of bars with Wilson intervals.

    Args:
      path: file to write.
      rates: {label: `Rate`}, in the order trained, untrained, expert, and others.
    """
    colours = itertools.chain((TRAINED, UNTRAINED, EXPERT), itertools.repeat(OTHERS))
    with html_report.chart(path, 9.4, 0.6 + 0.5 * len(rates)) as axes:
        for row, (r, colour) in enumerate(zip(rates.values(), colours)):
            low, high = (100 * bound for bound in r.interval)
            axes.barh(row, 100 * r.value, color=colour, height=0.56)
            axes.plot([low, high], [row, row], color=html_report.INK, lw=1.3)
            for end in (low, high):
                axes.plot([end, end], [row - 0.12, row + 0.12], color=html_report.INK, lw=1.3)
            bold = {"fontsize": 12, "fontweight": "bold", "color": html_report.INK}
            axes.text(103, row, f"{100 * r.value:.0f} %", va="center", **bold)
        axes.set_yticks(range(len(rates)), rates, fontsize=11)
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("episodes solved, %; the line is the 95 % Wilson interval")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
