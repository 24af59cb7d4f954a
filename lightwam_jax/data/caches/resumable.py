"""Directories made piece by piece, by processes that may be killed at any moment.

NAME.partial grows beside NAME. A JSON file in it, the plan, says what is being made. A piece is
written under another name, synced, and renamed when it is whole. With the last piece the directory
moves into place. So what has its name is finished, and the same command continues the rest.
"""

import contextlib
import errno
import os
import shutil
import sys
import time

from lightwam_jax import atomic

PATIENCE = 3600  # seconds that one process waits for another
_POLL = 2.0
_SQUEEZED = 0.5  # Gaussian bfloat16 compresses to 0.79 of its size, the demo's latents to 0.65


class Build:
    """A directory that is made, or continued, by `run`. Subclasses override the methods up to it.

    Attributes:
      directory: appears, or is replaced, in one step at the end; its pieces go to `growing`.
      index, count: this process is number `index` of `count` that make it together.
      plan_file, finished_file: names of JSON files in `growing` and in `directory`: the plan of
        the work, and what the finished directory was made of.
    """

    plan_file = finished_file = "plan.json"

    def __init__(self, directory, process_index=0, process_count=1):
        self.directory, self.growing = directory, directory + ".partial"
        self.index, self.count = process_index, process_count

    def plan(self):
        """Returns the plan, JSON. Process 0 makes it, the others wait for its file."""
        raise NotImplementedError

    def differences(self, have):
        """Returns how a plan or a finished directory's JSON differs from what is wanted, or ""."""
        raise NotImplementedError

    def make_share(self, plan):
        """Makes this process's pieces; returns whether all are there, those of others too."""
        raise NotImplementedError

    def assemble(self, plan):
        """Makes the whole of the pieces; returns the directory that holds it."""
        raise NotImplementedError

    def missing_bytes(self):
        """Returns how much is still to be written, roughly."""
        raise NotImplementedError

    def run(self):
        """Makes the directory together with the other processes.

        Returns:
          Whether it is finished: False where other processes have pieces left to make.

        Raises:
          TimeoutError: process 0 did nothing for an hour.
          FullDisk: what is finished is kept.
          atomic.InUse: another process makes the same pieces.
        """
        parent = os.path.dirname(self.directory)
        os.makedirs(parent, exist_ok=True)
        with explaining_full_disk(parent, self.missing_bytes):
            self._begin()
            try:
                plan = self._current_plan()
                if plan is not None:
                    if not self.make_share(plan):
                        return False
                    self._finish(plan)
            except FileNotFoundError:
                if not self._finished():
                    raise
                # Else another process was quicker to finish it.
            return True

    def _begin(self):
        """Returns when there is a plan, or a finished directory."""
        if self.index:
            wait(
                lambda: self._current_plan() or self._finished(),
                f"process 0 to begin {self.growing}",
            )
            return
        recover(self.directory)
        if self._current_plan() or self._finished():
            return
        path = os.path.join(self.growing, self.plan_file)
        if os.path.exists(self.growing):
            have = atomic.read_json(path)
            why = "it had no plan yet"
            if have is not None:
                why = f"another plan\n  {self.differences(have)}"
            print(f"{self.growing} is made anew: {why}", file=sys.stderr, flush=True)
            shutil.rmtree(self.growing)
        os.makedirs(self.growing)
        atomic.write_json(path, self.plan())

    def _current_plan(self):
        """The plan in `growing`, None where there is none, or one of other work."""
        return self._read(self.growing, self.plan_file)

    def _finished(self):
        return self._read(self.directory, self.finished_file) is not None

    def _read(self, directory, name):
        have = atomic.read_json(os.path.join(directory, name))
        return have if have is not None and not self.differences(have) else None

    def _finish(self, plan):
        """Moves the whole into place; of processes that come at once, one does."""
        path = os.path.join(self.growing, self.plan_file)
        with open(path, "r+", encoding="utf-8") as file:
            atomic.lock(file, wait=True)
            if os.path.exists(path):  # else another process finished while this one waited
                replace(self.assemble(plan), self.directory)
                shutil.rmtree(self.growing, ignore_errors=True)


@contextlib.contextmanager
def alone_in(directory):
    """Only one process 0 at a time may work in `directory`, which is made where it is missing.

    Raises:
      atomic.InUse: another one does.
    """
    os.makedirs(directory, exist_ok=True)
    file = os.open(directory, os.O_RDONLY)
    try:
        if not atomic.lock(file):
            raise atomic.InUse(
                f"another process 0 works in {directory}: the same command runs twice; stop one, "
                "or give each its own --process_index"
            )
        yield
    finally:
        os.close(file)


def replace(new, directory):
    """Moves a finished directory into place; `recover` repairs what a kill leaves of it."""
    old = directory + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(directory):
        os.rename(directory, old)
    os.rename(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def recover(directory):
    """Puts the old directory back, or away, after a kill within `replace`."""
    old = directory + ".old"
    if os.path.exists(directory):
        shutil.rmtree(old, ignore_errors=True)
    elif os.path.exists(old):
        os.rename(old, directory)


def put_away(directory):
    """Removes what a kill after the last step left beside a finished directory."""
    for end in (".old", ".new", ".partial"):
        shutil.rmtree(directory + end, ignore_errors=True)


def wait(ready, what):
    """Returns what ready() gives when that is true; says once what is waited for.

    Raises:
      TimeoutError: it took more than an hour.
    """
    begun, said = time.monotonic(), False
    while not (found := ready()):
        if not said:
            print(f"waiting for {what} (an hour at most)", flush=True)
            said = True
        if time.monotonic() - begun > PATIENCE:
            raise TimeoutError(
                f"waited {PATIENCE} seconds for {what}: is it running, on the same config and the "
                "same files?"
            )
        time.sleep(_POLL)
    return found


# ---- full disks ----------------------------------------------------------------------------------


class FullDisk(OSError):
    """The disk is full: which, how much is needed, what to do."""


def check_room(directory, size):
    """Warns where `size` bytes, an upper estimate, may not fit.

    Raises:
      FullDisk: they cannot, however well they compress.
    """
    free = shutil.disk_usage(directory).free
    if free < size * _SQUEEZED:
        raise FullDisk(errno.ENOSPC, _advice("too little room on the disk", directory, size))
    if free < size:
        print(
            f"WARNING: {directory} has {_bytes(free)} of room for up to {_bytes(size)}; "
            "compressed it may just fit",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def explaining_full_disk(directory, missing_bytes=None):
    """Turns the ways in which writers report a full disk into one error that says what to do.

    Args:
      missing_bytes: function: bytes still to be written, roughly.

    Raises:
      FullDisk: see above.
    """
    try:
        yield
    except FullDisk:
        raise
    except (OSError, RuntimeError) as error:  # ArrayRecord: RuntimeError. numpy: no errno
        texts = ("No space left", "quota exceeded", "requested and")
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(text in str(error) for text in texts):
            raise
        size = missing_bytes and missing_bytes()
        raise FullDisk(errno.ENOSPC, _advice("the disk is full", directory, size)) from error


def _advice(what, directory, size):
    free = shutil.disk_usage(directory).free
    needed = f"up to {_bytes(size)} are" if size else "more is"
    return (
        f"{what}: {directory} has {_bytes(free)} left, and {needed} still to be written. What "
        "is finished is kept: make room, and the same command continues"
    )


def _bytes(size):
    return f"{size / 1e9:,.1f} GB" if size > 1e9 else f"{size / 1e6:,.1f} MB"
