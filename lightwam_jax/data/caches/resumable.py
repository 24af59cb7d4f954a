"""Directories made piece by piece, by processes that may be killed at any moment.

NAME.partial grows beside NAME. A JSON file in it, the plan, says what is being made. A piece is
written under another name, synced, and renamed when it is whole; with the last one the directory
moves into place. What has its name is therefore finished, and the same command continues the rest.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time

PATIENCE = 3600  # seconds that one process waits for another
_POLL = 2.0
_SQUEEZED = 0.5  # Gaussian bfloat16 compresses to 0.79 of its size, the demo's latents to 0.65


class InUse(RuntimeError):
    """Another process makes the same thing: the same command runs twice."""


def read_json(path):
    """Returns the content of a JSON file, None where there is none."""
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def write_json(path, content):
    """Writes a JSON file; it is the old one or the new one, never half of it."""
    with writing(path) as temporary, open(temporary, "w") as f:
        json.dump(content, f, indent=2)


@contextlib.contextmanager
def writing(path, sync=True):
    """Gives the name to write a file under; it becomes `path` when it is whole.

    Args:
      sync: False is for many small files: a kill never leaves half of one, a power cut may.

    Raises:
      InUse: another process is writing the same file.
    """
    temporary = f"{path}.partial"
    with open(temporary, "ab") as file:  # for the lock, and to sync what was written by name
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise InUse(
                f"another process is writing {path}: the same command runs twice; "
                "stop one, or give each its own --process_index"
            )
        try:
            yield temporary
            if sync:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise


def _lock(file, how):
    """False where another process holds the lock. It ends with the process, however that ends."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two runs at once go unnoticed there
        pass
    return True


@contextlib.contextmanager
def alone_in(directory):
    """Only one process 0 at a time may work in `directory`, which is made where it is missing.

    Raises:
      InUse: another one does.
    """
    os.makedirs(directory, exist_ok=True)
    file = os.open(directory, os.O_RDONLY)
    try:
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise InUse(
                f"another process 0 works in {directory}: the same command runs "
                "twice; stop one, or give each its own --process_index"
            )
        yield
    finally:
        os.close(file)


def make(directory, name, plan, differences, done, share, complete, process_index=0):
    """Makes `directory`, or goes on with it, together with other processes.

    Args:
      directory: comes into being, or is replaced, in one step at the end.
      name: file of the plan, in `directory`.partial.
      plan: function that makes the plan, JSON. Process 0 does, the others wait for it.
      differences: function of a plan found there: how it differs from this work, "" if it is it.
      done: function: whether `directory` is what is wanted.
      share: function of the plan that makes the pieces of this process; whether all pieces, of
        others too, are there then.
      complete: function of the plan that makes the whole of the pieces and returns where it lies.
      process_index: of the caller.

    Returns:
      Whether it is finished: False where other processes have pieces left to make.

    Raises:
      TimeoutError: process 0 did nothing for an hour.
    """
    path = os.path.join(directory + ".partial", name)

    def found():
        have = read_json(path)
        return have if have is not None and not differences(have) else None

    if process_index:
        wait(lambda: found() or done(), f"process 0 to begin {directory}.partial")
    else:
        recover(directory)
        if not (found() or done()):
            _begin(path, plan, differences)
    try:
        there = found()
        if there is not None:
            if not share(there):
                return False
            _finish(directory, path, lambda: complete(there))
    except FileNotFoundError:
        if not done():
            raise
        # Else another process was quicker to finish it.
    return True


def _begin(path, plan, differences):
    directory = os.path.dirname(path)
    if os.path.exists(directory):
        have = read_json(path)
        reason = "it had no plan yet" if have is None else f"another plan\n  {differences(have)}"
        print(f"{directory} is made anew: {reason}", file=sys.stderr, flush=True)
        shutil.rmtree(directory)
    os.makedirs(directory)
    write_json(path, plan())


def _finish(directory, path, complete):
    """Moves what complete() returns into place; of processes that come at once, one does."""
    with open(path, "r+") as plan:
        _lock(plan, fcntl.LOCK_EX)
        if os.path.exists(path):  # else another process finished while this one waited
            replace(complete(), directory)
            shutil.rmtree(directory + ".partial", ignore_errors=True)


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
    """Returns when ready() is true; says once what is waited for.

    Raises:
      TimeoutError: it took more than an hour.
    """
    begun = time.monotonic()
    said = False
    while not ready():
        if not said:
            print(f"waiting for {what} (an hour at most)", flush=True)
            said = True
        if time.monotonic() - begun > PATIENCE:
            raise TimeoutError(
                f"waited {PATIENCE} seconds for {what}: is it running, on the same "
                "config and the same files?"
            )
        time.sleep(_POLL)


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
def explaining_full_disk(directory, missing=None):
    """Turns the ways in which writers report a full disk into one error that says what to do.

    Args:
      missing: function: bytes still to be written, roughly.

    Raises:
      FullDisk: see above.
    """
    try:
        yield
    except FullDisk:
        raise
    except (OSError, RuntimeError) as error:  # ArrayRecord: RuntimeError. numpy: no errno
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            text in str(error) for text in ("No space left", "quota exceeded", "requested and")
        )
        if not full:
            raise
        raise FullDisk(
            errno.ENOSPC, _advice("the disk is full", directory, missing and missing())
        ) from error


def _advice(what, directory, size):
    free = shutil.disk_usage(directory).free
    needed = f"up to {_bytes(size)} are" if size else "more is"
    return (
        f"{what}: {directory} has {_bytes(free)} left, and {needed} still to be written. What "
        "is finished is kept: make room, and the same command continues"
    )


def _bytes(size):
    return f"{size / 1e9:,.1f} GB" if size > 1e9 else f"{size / 1e6:,.1f} MB"
