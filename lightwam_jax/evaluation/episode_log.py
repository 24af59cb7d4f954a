"""The file of an evaluation's episodes: appended to as they end, continued after a kill.

JSON lines. The first is {"manifest": {...}}: what decides the results. The others are
`worker.Record`s, actions included, so that anyone can repeat the episodes without the policy.
"""

import fcntl
import json
import os
import pathlib

from lightwam_jax.evaluation import worker


class EpisodeLog:
    """The log of one policy on one suite.

    Attributes:
      records: {`Episode`: `Record`} of the episodes that ran, those that were there before too.
    """

    def __init__(self, path, manifest):
        """Opens a log and reads what is there; a line cut short by a kill is dropped.

        Args:
          path: file; begun if it is not there.
          manifest: what decides the results, JSON-able: policy, environment, settings.

        Raises:
          ValueError: the log of another manifest, or damaged, or in use by another process.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records, self._file = {}, open(path, "a+b")  # noqa: SIM115 (closed by `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path, json.loads(json.dumps(manifest)))
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"{path} is being written by another evaluation: wait for it, or "
                "evaluate into another directory"
            ) from error
        except ValueError:
            self._file.close()
            raise

    def add(self, record):
        """Appends a record; it is on its way to the disk when this returns."""
        if record.error is None:
            self.records[record.episode] = record
        self._write(record.to_json())

    def close(self):
        """Closes the file, and with it the lock."""
        self._file.close()

    def _read(self, path, manifest):
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill cut the last line short
            os.ftruncate(self._file.fileno(), whole)
        lines = content[:whole].splitlines()
        if not lines:
            self._write({"manifest": manifest})
            return
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if not number:
                    there = entry["manifest"]
                    continue
                record = worker.Record.from_json(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1} is damaged ({error}): delete the file "
                    "to evaluate anew"
                ) from error
            if record.error is None:  # one that could not be run is tried again
                self.records[record.episode] = record
        if unlike := differences(there, manifest):
            raise ValueError(
                f"{path} holds the episodes of another evaluation:\n  "
                + "\n  ".join(
                    f"{key}: {old!r} there, {new!r} now" for key, (old, new) in unlike.items()
                )
                + "\nDelete it, or evaluate into another directory."
            )

    def _write(self, content):
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()


def differences(one, other):
    """Returns {dotted key: (value, value)} of what differs between two manifests.

    A key that one of them lacks has the value None there.
    """
    one, other = dict(_leaves("", one)), dict(_leaves("", other))
    return {
        key: (one.get(key), other.get(key))
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    }


def _leaves(prefix, value):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value
