"""Keeps what a policy server was asked and what it replied, in a directory of bounded size.

    for asked in recorder.read("traffic"):
        asked["frame"], asked["reply"]

A file holds one request, as `wire.encode` writes it: {"time", "session", "code", "times", "frame",
"reply"}, the frames as they came and went; an error's reply is text. The oldest are deleted.
metadata.bin is what the server said about itself.
"""

import logging
import pathlib
import queue
import threading
import time

from lightwam_jax.inference import wire

_LOG = logging.getLogger(__name__)

_WAITING = 256  # requests that wait to be written; then further ones are left out


class Recorder:
    """A listener of `Service` that writes in a thread of its own.

    Attributes:
      left_out: requests that came faster than the disk, or could not be written.
      metadata: function () -> bytes, asked once at the first request; None: they are not kept.
    """

    def __init__(self, directory, most_bytes):
        """Args: directory: made if needed; files of an earlier server there count as the oldest.

        most_bytes: of all files together.
        """
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._files = [(path, path.stat().st_size) for path in files(directory)]
        self._number = int(self._files[-1][0].stem) + 1 if self._files else 0
        self._bytes, self._most = sum(size for _, size in self._files), most_bytes
        self._jobs, self.left_out, self.metadata = queue.Queue(_WAITING), 0, None
        self._described = False
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def __call__(self, answered):
        """Takes an `Answered`; returns at once."""
        values = {"time": time.time(), "session": answered.session, "code": answered.code}
        frame = answered.frame
        if isinstance(frame, str):  # a text message, which is an error
            frame = frame.encode("utf-8", "replace")
        values |= {"times": answered.times, "frame": frame, "reply": answered.reply}
        try:
            self._jobs.put_nowait(values)
        except queue.Full:
            self.left_out += 1

    def close(self):
        """Writes what waits."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self):
        while (values := self._jobs.get()) is not None:
            try:
                self._write(values)
            except OSError as error:  # a full disk, say: the next request may fit
                if not self.left_out:
                    _LOG.warning("a request was not recorded: %s", error)
                self.left_out += 1

    def _write(self, values):
        described = self._directory / "metadata.bin"
        if self.metadata is not None and not self._described:
            described.write_bytes(self.metadata())
            self._described = True
        content = wire.encode(values)
        path = self._directory / f"{self._number:012d}.msgpack"
        path.write_bytes(content)
        self._number += 1
        self._files.append((path, len(content)))
        self._bytes += len(content)
        while self._bytes > self._most and len(self._files) > 1:
            oldest, size = self._files.pop(0)
            oldest.unlink(missing_ok=True)
            self._bytes -= size


def files(directory):
    """Returns the files of recorded requests, the oldest first."""
    return sorted(pathlib.Path(directory).glob("*.msgpack"))


def read_metadata(directory):
    """Returns the metadata of the server that recorded; {} where they were not kept."""
    path = pathlib.Path(directory, "metadata.bin")
    limits = wire.Limits(containers=4096, items=2**16)
    return wire.decode(path.read_bytes(), limits) if path.exists() else {}


def read(directory):
    """Yields the recorded requests, the oldest first.

    Raises:
      WireError: a file is damaged.
    """
    for path in files(directory):
        content = path.read_bytes()
        yield wire.decode(content, wire.Limits(frame=len(content), string=len(content)))
