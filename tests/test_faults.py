"""Runs that are killed, told to stop, or out of disk space: in the end nobody can tell."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lightwam_jax.checkpoint import run as checkpoint
from lightwam_jax.data import loader
from tests import pod

pytestmark = pytest.mark.slow
HEARTBEAT_S = 10
CONFIG = pod.make_config(**{"train.steps": 150, "train.log_every": 4, "train.checkpoint_every": 3,
                            "train.eval_every": 30, "train.eval_batches": 1,
                            "train.keep_last": 2, "train.keep_every": 30})  # fmt: skip
FLAGS = (f"--heartbeat_s={HEARTBEAT_S}",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run of one process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    pod.run(CONFIG, workdir)
    return workdir


def assert_equal_runs(workdir, other):
    """Same metrics, same checkpoints kept, same bits in the last of them."""
    assert pod.rows(workdir) == pod.rows(other)
    assert pod.arrays(workdir) == pod.arrays(other)
    kept, expected = ({p.name for p in (w / "checkpoints").iterdir()} for w in (workdir, other))
    assert kept == expected
    a, b = (checkpoint.load_params(w).params for w in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def slowly(index):
    """Leaves time between the steps of a run: a kill finds it alive; twenty do not reach its end.

    A run saves where it is told to stop, so each gets on by what a fast machine does in the wait.
    """
    original = loader.train_loader

    class Slow:
        def __init__(self, *args):
            self._it = original(*args)
            self.close = self._it.close
            self._drawn = 0

        def __next__(self):
            self._drawn += 1
            time.sleep(0.02 if self._drawn <= 4 else 0.4)
            return next(self._it)

    loader.train_loader = Slow


def progress(workdir):
    """What changes when a run gets on."""
    with contextlib.suppress(OSError):
        return sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def saving(workdir):
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))


def wait_for(condition, started, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert started.alive() and time.monotonic() < deadline, started.output()
        time.sleep(0.001)


def wait_for_moment(rng, started, workdir):
    """Waits for a random moment of a run: starting, at work, or saving; returns what it was."""
    kind = rng.choice(("starting", "at work", "saving"))
    if kind == "starting":
        delay = rng.uniform(0, 4)
    else:
        before = progress(workdir)
        wait_for(lambda: progress(workdir) != before, started)
        delay = rng.uniform(0, 0.4)
        if kind == "saving":
            wait_for(lambda: saving(workdir), started)
            delay = rng.uniform(0, 0.05)
    time.sleep(delay)
    return f"{kind} + {delay:.3f} s"


def test_twenty_kills_at_random_moments(whole, tmp_path):
    seed, workdir, story = random.SystemRandom().randrange(2**32), tmp_path / "run", []
    rng = random.Random(seed)
    try:
        for _ in range(20):
            started = pod.Pod(CONFIG, workdir, before=slowly)
            moment = wait_for_moment(rng, started, workdir)
            number = rng.choice((signal.SIGKILL, signal.SIGTERM))
            assert started.alive(), "finished, or failed, before it was killed"
            os.kill(started.processes[0].pid, number)
            (code,) = started.finish()
            steps = [int(name) for name in progress(workdir) or ()]
            story.append(f"{moment}: {number.name}, ended with {code}, {max(steps, default=0)}")
            assert code in {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number]
        pod.run(CONFIG, workdir)
        assert_equal_runs(workdir, whole)
    except BaseException as error:
        raise AssertionError(f"seed {seed}\n" + "\n".join(story)) from error
    print(f"seed {seed}", *story, sep="\n")


# ---- two processes -----------------------------------------------------------------------------


def two(workdir, before=None):
    return pod.Pod(CONFIG, workdir, processes=2, devices=1, before=before, flags=FLAGS)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The workdir of an uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("whole") / "two"
    pod.run(CONFIG, workdir, processes=2, devices=1, flags=FLAGS)
    return workdir


def test_two_processes_survive_what_kills_them(whole_of_two, tmp_path):
    workdir = tmp_path / "run"
    for round_, victims in enumerate([(0,), (1,), (0, 1)]):
        started, before = two(workdir, slowly), progress(workdir)
        wait_for(lambda b=before: progress(workdir) != b, started)
        if round_ == 2:
            wait_for(lambda: saving(workdir), started)
        for victim in victims:
            started.processes[victim].kill()
        clock = time.monotonic()
        codes = started.finish(3 * HEARTBEAT_S)
        print(f"killed {victims}: exit codes {codes} after {time.monotonic() - clock:.1f} s")
        assert all(codes), codes
        if victims != (0, 1):
            survivor = started.logs[1 - victims[0]].read_text(encoding="utf-8")
            assert re.search("another task died|Socket closed|Connection|heartbeat", survivor)

    # SIGTERM to one: both save the same step, say so and leave.
    started, before = two(workdir, slowly), progress(workdir)
    wait_for(lambda: progress(workdir) != before, started)
    started.processes[1].terminate()
    assert started.finish() == [143, 143], started.output()
    step = int(re.findall(r"Stopped by SIGTERM after step (\d+)", started.output())[-1])
    assert pod.arrays(workdir)[0] == step

    pod.run(CONFIG, workdir, processes=2, devices=1, flags=FLAGS)
    last = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert {"150", "120", "90", "60", "30"} <= last
    assert pod.rows(workdir) == pod.rows(whole_of_two)
    assert pod.arrays(workdir) == pod.arrays(whole_of_two)


# ---- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB, mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, leave):
    """Writes a file that leaves `leave` bytes free."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", 0) as file:  # the run writes too
        file.write(bytes(max(shutil.disk_usage(disk).free - leave, 0)))
    return ballast


@pytest.mark.parametrize("leave", [0, 100_000, 400_000])
def test_full_disk_stops_the_run_with_the_step_before_intact(whole, small_disk, leave, tmp_path):
    workdir = small_disk / "run"
    started = pod.Pod(CONFIG, workdir, before=slowly, log=tmp_path / "run")
    wait_for(lambda: progress(workdir), started)
    ballast = fill(small_disk, leave)
    assert started.finish() == [2], started.output()
    ballast.unlink()
    errors = [line for line in started.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0], started.output()
    assert started.output().count("Traceback") <= 2, started.output()  # TensorBoard's

    said = pod.run(CONFIG, workdir)
    assert "Continuing from step" in said and "damaged" not in said
    assert_equal_runs(workdir, whole)
