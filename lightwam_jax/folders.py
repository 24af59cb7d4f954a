"""Searching folders: linked ones are entered too, each once, and nothing is left out in silence."""

import os
import pathlib
import typing


class Found(typing.NamedTuple):
    """What lies below a folder: its files, (path, reason) of what could not be entered, folders."""

    files: list
    missed: list
    entered: typing.Sequence = ()


def search(root):
    """Returns the `Found` of a folder and all folders below it, sorted by name within a folder.

    A folder is entered once, under the name it has below `root` rather than that of a link to it,
    so that links in a circle, or to a folder that is found anyway, add nothing.
    """
    files, missed, entered, seen = [], [], [], set()
    own, linked = [pathlib.Path(root)], []
    while own or linked:
        folder = (own or linked).pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        entered.append(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            missed.append((folder, error.strerror or str(error)))
            continue
        for entry in entries:
            path = folder / entry.name
            if path.is_dir():
                (linked if entry.is_symlink() else own).append(path)
            elif path.is_file():
                files.append(path)
            elif entry.is_symlink() and not path.exists():
                missed.append((path, f"a link to {os.readlink(path)}, which is not there"))
    return Found(files, missed, entered)


def files_below(root):
    """Returns the files of `search`, sorted by path."""
    return sorted(search(root).files)
