"""Where a run lives: a directory, or a bucket with a working copy. Nothing else tells them apart.

`opened` is for training, `reading` for what uses a finished run.
"""

import contextlib
import pathlib

import jax

from lightwam_jax import bucket as bucket_lib
from lightwam_jax.checkpoint import mirrored, storage, working_copy
from lightwam_jax.checkpoint import run as run_lib


def opened(workdir, scratch=""):
    """Returns the `Directory` or `InBucket` of a run that is trained; all processes must call it.

    Args:
      workdir: directory or address. scratch: see `working_copy`.

    Raises:
      ValueError: an address that is not supported, or a run that is already being trained here.
      BucketError: the bucket cannot be read and written.
    """
    if bucket_lib.is_address(workdir):
        return InBucket(workdir, scratch)
    return Directory(workdir)


def reading(workdir, step=None, scratch=""):
    """Context of the directory in which a run can be read, and results be written.

    Args:
      workdir: directory or address. step: of the checkpoint, None: the newest; of an address only
        this one is there. scratch: see `working_copy`.

    Raises: as `working_copy.reading`.
    """
    if bucket_lib.is_address(workdir):
        return working_copy.reading(workdir, step, scratch)
    return contextlib.nullcontext(pathlib.Path(workdir))


class Directory:
    """A run in a directory, which all processes share.

    Attributes: path: of the directory.
    """

    def __init__(self, workdir):
        self.path = storage.local_path(workdir)

    def __str__(self):
        return str(self.path)

    def started(self):
        """Whether the run has a checkpoint."""
        return any(p.name.isdigit() for p in (self.path / "checkpoints").glob("*"))

    def checkpoints(self, config, assets):
        """Returns the `Checkpoints` of the run."""
        return run_lib.Checkpoints(self.path, config, assets)

    def published(self):
        """Context in which what is written into `path` also gets to where the run lives."""
        return contextlib.nullcontext()

    def close(self):
        """Lets others use it."""


class InBucket:
    """A run in a bucket, of which each process has a working copy. Methods as of `Directory`."""

    def __init__(self, address, scratch=""):
        self._copy = working_copy.WorkingCopy(address, scratch, "train")
        self.path = self._copy.path
        try:
            if jax.process_index() == 0:
                self._copy.bucket.write("checkpoints/writable", b"")
                self._copy.bucket.delete(["checkpoints/writable"])
                self._copy.remove_unfinished()
            self._copy.keep_local(self._copy.steps()[-1:])
            self._copy.pull()
        except BaseException:
            self.close()
            raise

    def __str__(self):
        return str(self._copy.bucket)

    def started(self):
        return bool(self._copy.steps())

    def checkpoints(self, config, assets):
        return mirrored.Mirrored(self._copy, config, assets)

    def published(self):
        return self._copy.pushing() if jax.process_index() == 0 else contextlib.nullcontext()

    def close(self):
        self._copy.close()
