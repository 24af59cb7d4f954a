"""Records what a policy server sees and plans, for the Rerun viewer: `--rerun FILE.rrd`.

Every request, as far as a thread of its own keeps up; what is too much is left out and counted.
Needs requirements-rerun.txt.
"""

import queue
import threading
import time

import numpy as np

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.inference import attention

_WAITING = 64  # requests
_CLOSE_S = 5.0


class Recorder:
    """Writes an .rrd file.

    Attributes:
      dropped: requests that were left out.
    """

    def __init__(self, service, path):
        """Args:

        service: `Service`, whose requests are recorded. path: of the file; an old one is replaced.

        Raises:
          ModuleNotFoundError: Rerun is not installed. RuntimeError: the file cannot be written.
        """
        import rerun

        self._rerun, self._service, self.dropped = rerun, service, 0
        self._stream = rerun.RecordingStream("lightwam_policy_server")
        self._stream.save(path)
        self._queue = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name="rerun", daemon=True)
        self._thread.start()
        service.listeners.append(self._hear)

    def close(self):
        """Writes what waits, for some seconds at most."""
        if self._hear in self._service.listeners:
            self._service.listeners.remove(self._hear)
            self._queue.put(None)
            self._thread.join(_CLOSE_S)

    def _hear(self, event):
        try:
            self._queue.put_nowait((time.time(), event._replace(frame=b"", reply=b"")))
        except queue.Full:
            self.dropped += 1

    def _work(self):
        while (item := self._queue.get()) is not None:
            self._log(*item)
        self._stream.disconnect()  # with the end of the file, which its index is part of

    def _log(self, at, event):
        rerun, log = self._rerun, self._stream.log
        self._stream.set_time("time", timestamp=at)
        root = f"session_{event.session}"
        if event.code != "ok":
            text = f"{event.code}: {event.message}"
            log(f"{root}/log", rerun.TextLog(text, level=rerun.TextLogLevel.ERROR))
        for name, value in event.times.items():
            log(f"{root}/times/{name}", rerun.Scalars(value))
        if event.observation is None:
            return
        policy = self._service.policy
        data, images = policy.config.data, event.observation.images
        canvas = encoders_base.to_uint8(np.asarray(policy.canvas(images)))
        log(f"{root}/prompt", rerun.TextDocument(event.observation.prompt))
        log(f"{root}/canvas", rerun.Image(canvas))
        for camera, view in cameras_lib.shown(images, data).items():
            log(f"{root}/cameras/{camera}", rerun.Image(view))
        for name, grid in attention.maps(event.taps, data).items():
            log(f"{root}/attention/{name}", rerun.Tensor(grid, dim_names=("row", "column")))
        log(f"{root}/state", rerun.Scalars(np.asarray(event.observation.state, np.float64)))
        if event.actions is not None:
            log(f"{root}/plan", rerun.Tensor(event.actions, dim_names=("step", "dimension")))
            log(f"{root}/first_action", rerun.Scalars(event.actions[0].astype(np.float64)))


def prepare(server):
    """Lets a `Server` record, if its options say so; returns the `Recorder` or None."""
    service = server.service
    return Recorder(service, service.options.rerun) if service.options.rerun else None
