"""Keeps what a policy server was asked and what it replied, in a directory of bounded size.

    for asked in recorder.read("traffic"):
        asked["frame"], asked["reply"]

A file NUMBER.msgpack holds one request, as `wire.encode` writes it: {"time", "session", "code",
"times", "frame", "reply"}, the frames as they came and went; an error's reply is text. The oldest
are deleted. metadata.bin is what the server said about itself. Other files are left alone.
"""

import collections
import logging
import os
import pathlib
import re
import threading
import time

from lightwam_jax.inference import wire

_LOG = logging.getLogger(__name__)

_WAITING = 2**26  # bytes that wait to be written; then further requests are left out
_EACH = 1024  # bytes of a request beside its frames, in memory
_NAME = re.compile(r"\d{12,}\.msgpack")
_SECTOR = 512  # bytes: the unit of st_blocks


class Recorder:
    """A listener of `Service` that writes in a thread of its own.

    Attributes:
      left_out: requests that came faster than the disk, or could not be written.
      metadata: function () -> bytes, asked once at the first request; None: they are not kept.
    """

    def __init__(self, directory, most_bytes):
        """Args: directory: made if needed; files of an earlier server there count as the oldest.

        most_bytes: on the disk, of all files together.
        """
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = files(directory)
        self._files = collections.deque((path, _on_disk(path)) for path in kept)
        self._number = int(kept[-1].stem) + 1 if kept else 0
        self._bytes, self._most = sum(size for _, size in self._files), most_bytes
        self._jobs, self._waiting, self._changed = collections.deque(), 0, threading.Condition()
        self.left_out, self.metadata, self._described = 0, None, 0
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def __call__(self, answered):
        """Takes an `Answered`; returns at once."""
        values = {"time": time.time(), "session": answered.session, "code": answered.code}
        frame, reply = answered.frame, answered.reply
        if isinstance(frame, str):  # a text message, which is an error
            frame = frame.encode("utf-8", "replace")
        values |= {"times": answered.times, "frame": frame, "reply": reply}
        size = len(frame) + len(reply) + _EACH
        with self._changed:
            if self._waiting and self._waiting + size > _WAITING:
                self.left_out += 1
                return
            self._waiting += size
            self._jobs.append((values, size))
            self._changed.notify()

    def close(self):
        """Writes what waits."""
        with self._changed:
            self._jobs.append((None, 0))
            self._changed.notify()
        self._thread.join()

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                values, size = self._jobs.popleft()
            if values is None:
                return
            try:
                self._write(values)
            except OSError as error:  # a full disk, say: the next request may fit
                if not self.left_out:
                    _LOG.warning("a request was not recorded: %s", error)
                self.left_out += 1
            values = None  # its memory counts until here
            with self._changed:
                self._waiting -= size

    def _write(self, values):
        described = self._directory / "metadata.bin"
        if self.metadata is not None and not self._described:
            described.write_bytes(self.metadata())
            self._described = _on_disk(described)
        content = wire.encode(values)
        path = self._directory / f"{self._number:012d}.msgpack"
        room = self._most - self._described - _blocks(path.parent, len(content))
        if room < 0:
            raise OSError(f"its {len(content)} bytes alone are beyond the {self._most} in all")
        while self._bytes > room:
            oldest, size = self._files[0]
            oldest.unlink(missing_ok=True)
            self._files.popleft()
            self._bytes -= size
        self._number += 1
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)  # a part of it could not be read
            raise
        self._files.append((path, _on_disk(path)))
        self._bytes += self._files[-1][1]


def _blocks(directory, length):
    """Bytes that a file of `length` bytes takes on the disk of a directory."""
    block = os.statvfs(directory).f_frsize if hasattr(os, "statvfs") else 1
    return -(-length // block) * block


def _on_disk(path):
    """Bytes that a file takes on the disk; a file system that writes later does not say yet."""
    found = path.stat()
    said = getattr(found, "st_blocks", 0) * _SECTOR
    return max(said, _blocks(path.parent, found.st_size))


def files(directory):
    """Returns the files of recorded requests, the oldest first; other files are none of them."""
    found = pathlib.Path(directory).glob("*.msgpack")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_number)


def _number(path):
    return int(path.stem)


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
