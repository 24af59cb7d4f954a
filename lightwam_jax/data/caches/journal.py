"""Files of JSON lines that grow as work is done, and from which it continues after a kill.

The first line is {"manifest": {...}}: the settings that decide the other lines. Each other line is
one finished piece of work.
"""

import json
import os
import pathlib

from lightwam_jax import atomic, config_read


class Journal:
    """An open journal, locked: no other process can open it.

    Attributes:
      entries: those that were there when it was opened.
    """

    def __init__(self, path, manifest, elsewhere, parse=lambda entry: entry):
        """Opens a journal and reads what is there; a line cut short by a kill is dropped.

        Args:
          path: file; begun if it is not there.
          manifest: the settings that decide the entries, JSON-able.
          elsewhere: for errors: how to keep this journal and make another one.
          parse: function from the JSON of a line to an entry; ValueError where it is damaged.

        Raises:
          ValueError: the journal of another manifest, or damaged, or in use by another process.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entries, self._file = [], open(path, "a+b")  # noqa: SIM115 (closed by `close`)
        try:
            if not atomic.lock(self._file):
                raise ValueError(
                    f"{path} is being written by another process: wait for it, or {elsewhere}"
                )
            self._read(path, json.loads(json.dumps(manifest)), elsewhere, parse)
        except ValueError:
            self.close()
            raise

    def add(self, entry):
        """Appends an entry, JSON-able; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self):
        """Closes the file, and with it the lock."""
        self._file.close()

    def _read(self, path, manifest, elsewhere, parse):
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill cut the last line short
            os.ftruncate(self._file.fileno(), whole)
        lines = content[:whole].split(b"\n")[:-1]
        if not lines:
            self.add({"manifest": manifest})
            return
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number:
                    self.entries.append(parse(entry))
                    continue
                there = entry["manifest"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1} is damaged ({error}): delete the file to begin anew"
                ) from error
            config_read.refuse_old({"evaluation": there}, path, f"delete it, or {elsewhere}")
            refuse_others(path, there, manifest, elsewhere)


def refuse_others(path, there, now, elsewhere):
    """Raises ValueError, naming what differs, where `path` was made with another manifest."""
    unlike = differences(there, now).items()
    if unlike:
        lines = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in unlike]
        raise ValueError(
            f"{path} was made with other settings:\n  "
            + "\n  ".join(lines)
            + f"\nDelete it, or {elsewhere}."
        )


def differences(one, other):
    """Returns {dotted key: (value, value)} of what differs between two manifests.

    A key that one of them lacks has the value None there.
    """
    one, other = dict(_leaves("", one)), dict(_leaves("", other))
    pairs = {key: (one.get(key), other.get(key)) for key in sorted({*one, *other})}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _leaves(prefix, value):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value
