"""How good the tests are: plants one slip at a time and sees whether the nearest tests notice.

    python -m tests.slips                    the whole table; a quarter of an hour on two cores
    python -m tests.slips --only models      those whose group, file or text has "models"
    python -m tests.slips --list             what would be planted

The table is slips_table/*.toml, a file per group. A slip changes what the code does: it puts `new`
in place of `old`, which is in `file` exactly once; `tests` are the files in tests/ that should
notice (models: test_models.py), `wrong` says what happens if they do not.

Slips are planted in copies of the files, never in this tree. An interrupted run is continued with
--only, group by group. The exit status is 0 if every slip was found in its file and at least 90 %
were caught.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import typing

from lightwam_jax import interrupts

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENOUGH = 0.9
CAUGHT, SURVIVED = "caught", "SURVIVED"
STALE, BROKEN = "text not found (table is stale)", "nearest tests fail without the slip"
_NONE_FOUND = 5  # exit status of pytest where every test is deselected
_at_work = set()  # processes that run tests


class Slip(typing.NamedTuple):
    """An entry of the table; see above."""

    wrong: str
    file: str
    old: str
    new: str
    tests: str


def chosen(only):
    """Returns [(group, `Slip`)] whose group, file, texts or description hold `only`."""
    return [
        (path.stem, slip)
        for path in sorted((ROOT / "tests" / "slips_table").glob("*.toml"))
        for slip in (
            Slip(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["slip"]
        )
        if only in path.stem or any(only in text for text in slip)
    ]


def is_stale(slip):
    """Whether the text of a slip is not exactly once in its file, or a test file is not there."""
    path = ROOT / slip.file
    found = path.is_file() and path.read_text(encoding="utf-8").count(slip.old) == 1
    return not found or not all((ROOT / name).is_file() for name in files_of(slip.tests))


def files_of(tests):
    """Returns the test files of a slip's `tests`, relative to the tree."""
    return [
        str(path.relative_to(ROOT))
        for name in tests.split()
        for path in sorted((ROOT / "tests").rglob(f"test_{name}.py")) or [ROOT / f"test_{name}.py"]
    ]


def copy_tree(target):
    """Copies the tracked files, as they are now, and those not tracked yet, to a directory."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place)


def passes(tree, tests, timeout):
    """Whether the tests pass in a tree; what does not end in time does not pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _at_work.add(process)
    try:
        return process.wait(timeout) in (0, _NONE_FOUND)
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end(process)
        _at_work.discard(process)


def _end(process):
    """Ends tests and what they started, if they still run."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # another thread was first
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.contextmanager
def _interruptible(pool):
    """Ends the tests at Ctrl-C: the pool would wait for those that run, and those that follow."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_at_work):
            _end(process)
        raise


def try_slip(tree, slip, timeout):
    """Plants a slip in a tree, runs its tests, takes it out again; returns the outcome."""
    if is_stale(slip):
        return STALE
    path = tree / slip.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(slip.old, slip.new), encoding="utf-8")
    try:
        return SURVIVED if passes(tree, files_of(slip.tests), timeout) else CAUGHT
    finally:
        path.write_text(whole, encoding="utf-8")


def run(slips, jobs, timeout, baseline):
    """Tries every slip, some at a time, printing a line for each; returns [(group, slip, outcome)].

    Args:
      baseline: first run the tests without a slip, once per list of them.
    """
    trees, results = queue.Queue(), []
    with tempfile.TemporaryDirectory(prefix="slips_") as scratch:
        for job in range(jobs):
            tree = pathlib.Path(scratch, str(job))
            copy_tree(tree)
            trees.put(tree)

        def in_a_tree(function, *arguments):
            tree = trees.get()
            try:
                return function(tree, *arguments)
            finally:
                trees.put(tree)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool, _interruptible(pool):
            sound = dict.fromkeys((slip.tests for _, slip in slips), True)
            if baseline:
                each = pool.map(lambda tests: in_a_tree(passes, files_of(tests), timeout), sound)
                sound = dict(zip(sound, each))

            def attempt(item):
                started = time.monotonic()
                sane = sound[item[1].tests]
                outcome = in_a_tree(try_slip, item[1], timeout) if sane else BROKEN
                return (*item, outcome), time.monotonic() - started

            for result, seconds in pool.map(attempt, slips):
                results.append(result)
                group, slip, outcome = result
                print(
                    f"{outcome:<9} {seconds:5.0f} s  {group}: {slip.file}: {slip.wrong}", flush=True
                )
    return results


def report(results):
    """Prints the score of each group and the survivors; returns whether that is enough."""
    score = collections.defaultdict(collections.Counter)
    for group, _, outcome in results:
        score[group][outcome] += 1
    print()
    for group, counts in score.items():
        print(f"{group:<16} {counts[CAUGHT]:>3} of {counts.total():>3} caught")
    caught = sum(counts[CAUGHT] for counts in score.values())
    print(f"{'all':<16} {caught:>3} of {len(results):>3} caught")
    for _, slip, outcome in results:
        if outcome != CAUGHT:
            print(f"\n{outcome}: {slip.file}: {slip.wrong}\n  - {slip.old}\n  + {slip.new}")
            print(f"  {' '.join(files_of(slip.tests))}")
    wrong = any(outcome in (STALE, BROKEN) for *_, outcome in results)
    return not wrong and caught >= ENOUGH * len(results)


def main():
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="text in group, file, slip or description")
    parser.add_argument("--list", action="store_true", help="only say what would be planted")
    parser.add_argument("--jobs", type=int, default=2, help="slips tried at once")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one slip's tests")
    parser.add_argument("--baseline", action="store_true", help="run the tests without slips first")
    given = parser.parse_args()
    slips = chosen(given.only)
    if not slips:
        parser.error(f"--only {given.only}: no slip has that")
    if given.list:
        for group, slip in slips:
            note = f"  {STALE}" if is_stale(slip) else ""
            print(f"{group}: {slip.file}: {slip.wrong} ({slip.tests}){note}")
        return
    results = run(slips, max(1, min(given.jobs, len(slips))), given.timeout, given.baseline)
    sys.exit(not report(results))


if __name__ == "__main__":
    interrupts.guard(main, "what is left: run again with --only, group by group")
