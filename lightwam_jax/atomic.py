"""Writing files that are whole or not there: no kill, error or full disk leaves half of one."""

import contextlib
import fcntl
import json
import os


class InUse(RuntimeError):
    """Another process writes the same file: the same command runs twice."""


def read_json(path, kinds=None, redo="restore it, or delete it and make it again"):
    """Returns the content of a JSON file, None where there is none.

    Args:
      kinds: {key: type} that the content, an object, has to have; [type] is a list of these. None:
        it may be anything.
      redo: what to do about a file that is damaged.

    Raises:
      ValueError: not JSON, no object, or without such a key; names the file and the key.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {redo}") from error
    if kinds is not None:
        check_json(content, kinds, path, redo)
    return content


def check_json(content, kinds, place, redo):
    """Raises ValueError where `content` is no object with such keys; see `read_json`."""
    if not isinstance(content, dict):
        raise ValueError(f"{place} holds {str(content)[:60]}; expected a JSON object; {redo}")
    for key, kind in kinds.items():
        if key not in content:
            raise ValueError(f"{place} lacks {key}; {redo}")
        if not _is(content[key], kind):
            named = f"a list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            said = str(content[key])[:60]
            raise ValueError(f"{place}: {key} is {said}; expected {named}; {redo}")


def _is(value, kind):
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(each, kind[0]) for each in value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def write_json(path, content):
    """Writes a JSON file; see `write_text`."""
    write_text(path, json.dumps(content, indent=2))


def write_text(path, text):
    """Writes a text file; it is the old one or the new one, never half of it."""
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as f:
        f.write(text)


@contextlib.contextmanager
def writing(path, sync=True):
    """Gives the name to write a file under. It is renamed to `path` when the block ends.

    An error in the block leaves the old file, if there was one.

    Args:
      sync: False is for many small files: a kill never leaves half of one, a power cut may.

    Raises:
      InUse: another process is writing the same file.
    """
    partial = f"{path}.partial"
    with open(partial, "ab") as file:  # for the lock, and to sync what was written by name
        if not lock(file):
            raise InUse(
                f"another process is writing {path}: the same command runs twice; stop one, or "
                "give each its own --process_index"
            )
        try:
            yield partial
            if sync:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
            raise


def lock(file, wait=False):
    """Locks an open file until it is closed; returns False where another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two runs at once go unnoticed there
        pass
    return True
