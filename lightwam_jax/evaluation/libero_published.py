"""LIBERO results beside those of the PyTorch reference: in its format, and its published numbers.

Both are in the reference's repository, https://github.com/L1ziang/Light-WAM at b2785f6, as
`eval_logs/summary_libero_*.json`, which its `experiments/libero/summarize_results.py` writes.
"""

import json
import pathlib

from lightwam_jax.envs.libero import env as libero
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.evaluation import report

# Successes and episodes of those files, ten tasks and a checkpoint of its own for each suite. The
# mean of the four, 97.15 %, is the 97.2 % of the paper.
PUBLISHED = {"spatial": (491, 500), "object": (498, 500), "goal": (489, 500), "10": (465, 500)}
PROTOCOL = "lightwam"
MUJOCO = "3.3.2"  # its scripts/libero_env.full.yml
_SOURCE = "eval_logs/summary_libero_{}.json of github.com/L1ziang/Light-WAM, b2785f6"


def write_summaries(out, results, manifest, checkpoint):
    """Writes `summary_libero_<suite>.json` as the reference does; returns the paths.

    Keys and units are the reference's, with three differences. A duration is the seconds that a
    task's episodes spent in the simulator, without waiting for plans: many tasks run at once, and
    none has a wall clock of its own. Episodes that could not be run count for nothing; there is a
    key "errors" if there are any. What was made with stand-in assets says so in a key "assets",
    and a language control in a key "instruction", because neither is a LIBERO score.

    Args:
      out: pathlib.Path of the directory.
      results: `worker.EpisodeResult`s of the trained policy. manifest: of `report.manifest`.
      checkpoint: name or path of what was evaluated.
    """
    assets = (manifest.get("environment") or {}).get("assets")
    paths = []
    for suite, tasks in _by_suite(results, manifest).items():
        place, numbers = f"libero_{suite}", {}
        for task, played in tasks.items():
            number = libero_files.tasks(suite).index(task)
            numbers[f"{place}_{number}"] = _task_numbers(task, played)
        total = _total(tasks)
        durations = [task["duration"] for task in numbers.values()]
        content = {
            "run_id": f"{manifest['config']}_step_{manifest['step']:06d}",
            "ckpt": str(checkpoint),
            "config": manifest["config"],
            **({} if assets == "LIBERO" else {"assets": assets}),
            **({"instruction": manifest["instruction"]} if "instruction" in manifest else {}),
            "suite_stats": {
                place: {
                    "total_tasks": len(tasks),
                    "total_trials": total.episodes,
                    "total_successes": total.successes,
                    "total_time": sum(durations),
                    "max_time": max(durations),
                    **({"errors": total.errors} if total.errors else {}),
                }
            },
            "task_results": numbers,
            "overall": {
                "average_success_rate": 100 * total.value if total.episodes else None,
                "total_time": sum(durations),
                "average_task_time": sum(durations) / len(tasks),
            },
        }
        paths.append(pathlib.Path(out, f"summary_{place}.json"))
        paths[-1].write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return paths


def _task_numbers(task, played):
    rate = report.rate(played)
    return {
        "success_rate": 100 * rate.value if rate.episodes else None,
        "duration": sum(result.seconds for result in played),
        "total_episodes": rate.episodes,
        "successes": rate.successes,
        "task_description": libero_files.instruction(task),
        **({"errors": rate.errors} if rate.errors else {}),
    }


def _total(tasks):
    return report.rate([result for played in tasks.values() for result in played])


def published(results, manifest):
    """Returns what the authors published of the suites that were evaluated.

    Args:
      results: of the trained policy. manifest: of `report.manifest`.

    Returns:
      {suite: {"source", "ours": `report.numbers`, "remark", and the published `report.numbers`}};
      or {suite: {"not_comparable": [reasons]}}, without any number, where the evaluation was made
      otherwise. Suites of which nothing was published are left out.
    """
    found = {}
    for suite, tasks in _by_suite(results, manifest).items():
        if suite not in PUBLISHED:
            continue
        if reasons := _unlike(suite, tasks, manifest):
            found[suite] = {"not_comparable": reasons}
            continue
        version = manifest["environment"]["versions"]["mujoco"]
        remark = f"MuJoCo {MUJOCO} there, {version} here: other pixels"
        found[suite] = {
            "source": _SOURCE.format(suite),
            **report.numbers(report.Rate(*PUBLISHED[suite], 0)),
            "ours": report.numbers(_total(tasks)),
            "remark": "" if version == MUJOCO else remark,
        }
    return found


def table(comparison):
    """Returns the rows of a table of `published`, the first of them its header."""
    rows = [("suite", "this policy", "published (authors' logs)", "")]
    for suite, found in comparison.items():
        if "not_comparable" in found:
            rows.append((suite, "", "not comparable", "; ".join(found["not_comparable"])))
        else:
            notes = "; ".join(filter(None, (found["source"], found["remark"])))
            rows.append((suite, _said(found["ours"]), _said(found), notes))
    return tuple(rows)


def _by_suite(results, manifest):
    """Returns {suite: {task: [result]}} of LIBERO's own suites, in the order of the results."""
    found = {}
    if manifest.get("suite") == "libero":
        for result in results:
            suite = libero_files.suite_of(result.episode.task)
            if suite in libero_files.SUITES:
                found.setdefault(suite, {}).setdefault(result.episode.task, []).append(result)
    return found


def _unlike(suite, tasks, manifest):
    """Returns the reasons why an evaluation of a suite is not the one that was published."""
    environment, protocol = manifest["environment"], libero.PROTOCOLS[PROTOCOL]
    cap = min(manifest["max_steps"], environment["protocol"]["max_steps"][suite])
    missing = len(libero_files.tasks(suite)) - len(tasks)
    settle, replan = environment["protocol"]["settle"], manifest["replan_steps"]
    size, rendering = environment["image_size"], environment["rendering"]
    assets = environment["assets"]
    reasons = {
        f"instruction: {manifest.get('instruction')}": "instruction" in manifest,
        f"made with {assets} assets": assets != "LIBERO",
        f"{missing} of the suite's tasks are missing": missing,
        f"{settle} steps to settle, {protocol.settle} there": settle != protocol.settle,
        f"a plan every {replan} steps, {protocol.replan_steps} there": replan
        != protocol.replan_steps,
        f"at most {cap} steps, {protocol.max_steps[suite]} there": cap != protocol.max_steps[suite],
        f"rendering {rendering!r}": rendering != "full",
        f"cameras of {size} pixels, 256 there": size != 256,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _said(numbers):
    if not numbers["episodes"]:
        return "nothing ran"
    low, high = (100 * bound for bound in numbers["interval"])
    return (
        f"{100 * numbers['success_rate']:.1f} %  {numbers['successes']}/{numbers['episodes']}, "
        f"95 % interval {low:.1f} to {high:.1f} %"
    )
