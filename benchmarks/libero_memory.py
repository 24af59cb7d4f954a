"""How much memory a simulator process of LIBERO holds, task after task, and what an episode costs.

    python -m benchmarks.libero_memory --out benchmarks/results/libero_memory.json

One process plays all 130 tasks on LIBERO's own assets, one after the other: two resets (an initial
state that is stored, and one that is drawn), and after each ten steps with both pictures. The file
is written anew after every task, so that a run that is cut short says how far it came. Times are
processor time of the whole process, which other programs on the machine hardly move. The last
column of a task is the most memory that the process has held until then.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import time

from lightwam_jax import interrupts
from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import env as libero
from lightwam_jax.envs.libero import files as libero_files

STEPS = 10  # after each reset
_env = None  # of the simulator process


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", default=",".join(libero_files.SUITES), help="comma-separated")
    parser.add_argument("--most", type=int, default=90, help="tasks of a suite")
    parser.add_argument("--rendering", default="fast", choices=("fast", "full"))
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    from benchmarks import results  # imports jax, which no simulator process does

    tasks = [t for suite in args.suites.split(",") for t in libero_files.tasks(suite)[: args.most]]
    rows = []
    settings = {"rendering": args.rendering, "image_size": args.image_size}
    with concurrent.futures.ProcessPoolExecutor(
        1, interrupts.SPAWN, _begin, (settings,)
    ) as process:
        for task in tasks:
            rows.append(process.submit(play, task).result())
            numbers = {**settings, "tasks": len(rows), "of": len(tasks), **summary(rows)}
            results.write(args.out, "libero_memory", numbers | {"each": rows})


def summary(rows):
    """Returns the most memory and the medians of the times."""
    times = [key for key in rows[0] if key.endswith("_s")]
    return {
        "peak_mib": max(row["peak_mib"] for row in rows),
        "most_after_a_task_mib": max(row["resident_mib"] for row in rows),
        **{f"median_{key}": round(statistics.median(r[key] for r in rows), 4) for key in times},
    }


def _begin(settings):
    global _env
    _env = libero.make(**settings)


def play(task):
    """Returns {"task", "resident_mib", "peak_mib", processor seconds} of two episodes."""
    row = {"task": task}
    steps = pictures = 0.0
    for name, init in (("first_reset_s", 0), ("reset_s", libero.DRAWN)):
        row[name] = _timed(_env.reset, envs_base.EpisodeSpec(task, init, 0))
        for step in range(STEPS):
            steps += _timed(_env.step, [0.3, 0.2, -0.5, 0, 0, 0.2, step % 2])
            pictures += _timed(_env.observe)
    row |= {"step_s": steps / (2 * STEPS), "two_pictures_s": pictures / (2 * STEPS)}
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    status = dict(line.split(":", 1) for line in text.strip().split("\n"))
    row |= {"resident_mib": _mib(status["VmRSS"]), "peak_mib": _mib(status["VmHWM"])}
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}


def _timed(function, *args):
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def _mib(text):
    return int(text.split()[0]) // 1024


if __name__ == "__main__":
    interrupts.guard(main)
