"""Checkpoints of a run in a bucket: written and checked in a working copy, then copied there."""

import concurrent.futures
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lightwam_jax import bucket as bucket_lib
from lightwam_jax import distributed
from lightwam_jax.checkpoint import run, storage


class Mirrored(run.Checkpoints):
    """Checkpoints of a run in a bucket.

    Process 0 gathers and writes them in its working copy, which holds one besides the one being
    written; a thread copies each to the bucket while training goes on. For reading, every process
    has its own copy.
    """

    def __init__(self, copy, config, assets):
        self._copy, self._uploading, self._waits = copy, None, 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        super().__init__(copy.path, config, assets)
        self.place = f"{copy.bucket}/checkpoints"
        self._committed = self._of_process_0(copy.steps)

    def _open(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index():
            return None
        self._remove_unfinished()
        last = ocp.checkpoint_managers.LatestN(1)
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=last, create=False, multiprocessing_options=_alone("run")
            ),
        )

    @staticmethod
    def _of_process_0(steps):
        """The list that `steps()` gives in process 0, in all processes."""
        if jax.process_count() == 1:
            return steps()
        text = np.zeros(1 << 16, np.uint8)
        if jax.process_index() == 0:
            raw = json.dumps(steps()).encode()
            text[: len(raw)] = np.frombuffer(raw, np.uint8)
        text = multihost_utils.broadcast_one_to_all(text)
        return json.loads(bytes(text).rstrip(b"\0"))

    def steps(self):
        return self._committed

    def _newest(self):
        return max(self._committed, default=None)

    def _fetched(self, step):
        problem = damage = directory = None
        try:
            directory = self._copy.fetch(step)
        except storage.DamagedCheckpointError as error:
            damage = error
        except OSError as error:
            problem = str(error)
        if problem := storage.first_problem(problem):  # a network that fails damages nothing
            raise bucket_lib.BucketError(problem)
        if damage:
            raise damage
        return directory

    def save(self, step, items, frozen, extra):
        self.wait()
        super().save(step, items, frozen, extra)
        if self._manager:
            self._uploading = self._pool.submit(self._upload, step)

    def _to_write(self, tree):
        if jax.process_count() == 1:
            return storage.on_host(tree)

        def gathered(x):  # one after the other: devices hold one whole array at a time
            x = multihost_utils.process_allgather(x, tiled=True) if x.ndim else jax.device_get(x)
            return x if jax.process_index() == 0 else None

        return jax.tree.map(gathered, tree)

    def _start(self, step, args):
        if self._manager:
            self._manager.save(step, args=args)

    def _write(self, directory, tree):
        tree = self._to_write(tree)
        if jax.process_index() == 0:
            with ocp.StandardCheckpointer(multiprocessing_options=_alone("frozen")) as writer:
                writer.save(directory, tree, force=True)

    def _upload(self, step):
        self._manager.wait_until_finished()
        self._copy.upload(step, self._kept)
        self._committed = self._copy.steps()

    def _kept(self, steps):
        last, every = self.config.train.keep_last, self.config.train.keep_every
        return [s for s in steps if s in steps[-last:] or (every and s % every == 0)]

    def _set_aside(self, steps):
        for step in steps:
            if jax.process_index() == 0:
                self._copy.mark_damaged(step, "found damaged when the run was continued")
        self._committed = [s for s in self._committed if s not in steps]
        self._copy.keep_local(self._committed)
        if self._manager:
            self._manager.reload()

    def preempted(self, step):
        return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

    def wait(self):
        problem = None
        with self._writing():
            try:
                if self._uploading:
                    self._uploading.result()
            except Exception as error:
                if jax.process_count() == 1:
                    raise
                problem = f"{type(error).__name__}: {error}"
            self._uploading = None
            if jax.process_count() > 1:
                self._waits += 1
                distributed.wait_for_all(f"uploaded {self._waits}")
                if problem := storage.first_problem(problem):
                    raise OSError(problem)

    def close(self):
        if not self._failed and self._manager:
            with self._writing():
                if self._uploading:
                    self._uploading.result()
            self._manager.close()
        self._pool.shutdown()


def _alone(name):
    """For Orbax: process 0 writes what it has, and waits for nobody."""
    return ocp.options.MultiprocessingOptions(0, {0}, name)
