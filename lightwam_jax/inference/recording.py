"""Requests and replies of a policy server on disk, the latest of them, for `skew.py --record`.

A directory holds metadata.bin, the server's, and files NUMBER.records. Each record is its length
(8 bytes, little-endian) and a message of `wire.py`: {"time": unix seconds, "session", "code",
"frame": bytes, "reply": bytes, or text of an error, "times": {name: ms}}.
"""

import pathlib
import queue
import struct
import sys
import threading
import time

from lightwam_jax.inference import wire

_FILE_BYTES = 64 * 2**20  # then the next file begins
_WAITING = 256  # records that wait for the disk; more are dropped, the robot goes first
_LENGTH = struct.Struct("<Q")


class Recorder:
    """Writes what a `Service` answers, from a thread of its own.

    Attributes:
      dropped: records that came faster than the disk took them, or that it refused.
    """

    def __init__(self, directory, most_bytes):
        """Args: directory: made if missing. most_bytes: the oldest files go beyond that."""
        self._directory, self._most = pathlib.Path(directory), most_bytes
        self._directory.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in files(directory)]
        self._number, self._file = max(numbers, default=-1) + 1, None
        self._queue, self.dropped = queue.Queue(_WAITING), 0
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()

    def describe(self, metadata):
        """Keeps the server's metadata: bytes of a message."""
        (self._directory / "metadata.bin").write_bytes(metadata)

    def add(self, answered):
        """Takes an `Answered`; returns at once."""
        names = ("session", "code", "frame", "reply", "times")
        record = {"time": time.time()} | {name: getattr(answered, name) for name in names}
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout=5.0):
        """Writes what waits, for at most `timeout` seconds."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _work(self):
        while (record := self._queue.get()) is not None:
            try:
                self._write(wire.encode(record))
            except OSError as error:  # a full disk must not stop the robot
                if not self.dropped:
                    print(f"cannot record: {error}", file=sys.stderr, flush=True)
                self.dropped += 1
        if self._file is not None:
            self._file.close()

    def _write(self, content):
        if self._file is None or self._file.tell() > _FILE_BYTES:
            if self._file is not None:
                self._file.close()
            path = self._directory / f"{self._number:08d}.records"
            self._file = path.open("wb")
            self._number += 1
            self._make_room()
        self._file.write(_LENGTH.pack(len(content)) + content)
        self._file.flush()

    def _make_room(self):
        old = files(self._directory)
        sizes = [path.stat().st_size for path in old]
        while len(old) > 1 and sum(sizes) + _FILE_BYTES > self._most:
            old.pop(0).unlink()
            sizes.pop(0)


def files(directory):
    """Returns the files of records of a directory, the oldest first."""
    return sorted(pathlib.Path(directory).glob("*.records"))


def read(directory):
    """Returns (metadata, iterator of the records), the oldest first; metadata: {} if missing.

    A record that was cut off by the end of the process is left out.

    Raises:
      FileNotFoundError: no records there. wire.WireError: damaged.
    """
    found, described = files(directory), pathlib.Path(directory, "metadata.bin")
    if not found:
        raise FileNotFoundError(f"{directory} holds no *.records: a server --record={directory}?")
    limits = wire.Limits(frame=2**40, containers=4096, items=2**16)
    metadata = wire.decode(described.read_bytes(), limits) if described.exists() else {}
    return metadata, (record for path in found for record in _records(path, limits))


def _records(path, limits):
    with open(path, "rb") as file:
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            content = file.read(length)
            if len(content) < length:
                return
            yield wire.decode(content, limits)
