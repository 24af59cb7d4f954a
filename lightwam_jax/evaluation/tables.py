"""What a closed-loop report says in words, numbers and tables, and which films it shows."""

import numpy as np

from lightwam_jax import params
from lightwam_jax.evaluation import report

_GIVEN = {
    "right": "from camera images and an instruction",
    "empty": "from camera images alone: the policy was given no instruction",
    "other": "though the policy was given the instruction of another task",
}


def headline(rate, suite_run):
    """Returns (big number, what it means) of the trained policy's `Rate` in a `suites.SuiteRun`."""
    low, high = (100 * bound for bound in rate.interval)
    errors = f" {rate.errors} more could not be run." if rate.errors else ""
    known = suite_run.demonstrated is not None and suite_run.instruction == "right"
    unseen = ", none of which was demonstrated" if known else ""
    return f"{100 * rate.value:.0f} %", (
        f"of {rate.episodes} episodes solved {_GIVEN[suite_run.instruction]}{unseen} "
        f"(95 % interval {low:.0f} to {high:.0f} %).{errors}"
    )


def facts(policy, results, rates, seconds, remote=None):
    """Returns the [(number, label)] below the headline.

    Args:
      policy: `Policy`. results: {who: [`EpisodeResult`]}. rates: {who: `Rate`}.
      seconds: wall clock. remote: of `RemotePolicy.describe`, or None.
    """
    ran = [result for result in results["trained"] if result.error is None]
    steps = [result.steps for result in ran if result.success]
    minutes, rest = divmod(round(seconds), 60)
    shown = []
    if "untrained" in rates:
        shown.append((f"{100 * rates['untrained'].value:.0f} %", "untrained policy, same episodes"))
    if "expert" in rates:
        same = len(results["expert"]) == len(results["trained"])
        whose = "same episodes" if same else "episodes of its tasks"
        shown.append((f"{100 * rates['expert'].value:.0f} %", f"scripted expert, {whose}"))
    simulated = np.mean([result.seconds for result in ran]) if ran else 0.0
    return [
        *shown,
        (f"{np.mean(steps):.0f}" if steps else "none", "steps per solved episode"),
        (f"{simulated:.1f} s", "in the simulator per episode"),
        (f"{params.count(policy.params) / 1e6:.2f} M", "parameters"),
        (f"{policy.step:,}", "training steps"),
        (f"{minutes} min {rest:02d} s", "from start to this report"),
        *([(remote["url"], "where the trained policy ran")] if remote else ()),
    ]


def tasks(results, groups):
    """Returns the rows of success rates per group and task; arguments as of `facts`, `SuiteRun`."""
    rates = {
        who: report.by_group(played, groups) | report.by_task(played)
        for who, played in results.items()
    }
    rows = [("task", *results)]
    for task in rates["trained"]:
        cells = [report.brief(by[task]) if task in by else "no expert" for by in rates.values()]
        rows.append((task, *cells))
    return tuple(rows)


def episodes(results):
    """Returns a row for every episode, with the instruction that the policy was given."""
    names = {True: "solved", False: "not solved", None: "could not run"}
    by = {who: {result.episode: result for result in results.get(who, ())} for who in results}
    untrained, experts = by.get("untrained", {}), by.get("expert", {})
    head = ("episode", "instruction", "trained", "steps", *(("untrained",) if untrained else ()))
    rows = [(*head, "expert", "steps") if experts else head]
    for trained in results["trained"]:
        other, expert = untrained.get(trained.episode), experts.get(trained.episode)
        prompt = trained.prompt or (other.prompt if other else "")
        row = [trained.episode.key, prompt, names[trained.success], trained.steps]
        if untrained:
            row.append(names[other.success])
        if experts:
            row += [names[expert.success], expert.steps] if expert else ["no expert", ""]
        rows.append(row)
    return tuple(rows)


def choose(results, count):
    """Picks episodes to show: solved ones, then failures, of as many tasks as there is room for.

    A quarter of `count` are failures (at least one, if there is any), or more where the solved ones
    are too few, or where a success of every task leaves room for a failure of each. Solved ones are
    of different tasks first, then of different instructions; failures of tasks not shown yet first.
    """
    solved, failed = ([r for r in results if r.success is wanted] for wanted in (True, False))
    first, others = _first(solved, _task), _first(failed, _task)
    spare = min(len(others), count - len(first))
    failures = min(len(failed), max(1, count // 4, spare))
    first += [r for r in _first(solved, lambda r: r.prompt) if r not in first]
    solved = first + [r for r in solved if r not in first]
    chosen = solved[: max(1, count - failures)]
    shown = {_task(r) for r in chosen}
    failed = sorted(others, key=lambda r: _task(r) in shown) + [
        r for r in failed if r not in others
    ]
    return chosen + failed[: max(1, count) - len(chosen)]


def _task(result):
    return result.episode.task


def _first(results, key):
    """The first result of each `key`, in their order."""
    return list({key(r): r for r in reversed(results)}.values())[::-1]
