"""Cheap hashes of files: whether a recording is the one that a cache was made of.

Modification times would be cheaper, but a dataset that was copied to another machine would have
others, and its cache would be made again for nothing. A hash of everything reads hundreds of
gigabytes. So a file is its size and a few blocks spread over it: another recording, another
encoding and a copy that broke off differ in nearly every block. What goes unseen is a change of a
few bytes between the blocks of a large file that keeps its size.
"""

import functools
import hashlib
import os

BLOCKS, BLOCK = 8, 32 << 10  # of a larger file; a smaller one is read as a whole


def digest(path):
    """Returns the hash of a file, 16 bytes; that of no bytes where it cannot be read.

    It is for the reader of the images to say why: a report about damaged files needs a hash too.
    """
    try:
        about = os.stat(path)
        return _digest(os.fspath(path), about.st_size, about.st_mtime_ns, about.st_ino)
    except OSError:
        return hashlib.blake2b(digest_size=16).digest()


@functools.lru_cache(maxsize=1 << 18)
def _digest(path, size, *seen):
    """The same; a file that is asked for again while a program runs is not read again."""
    del seen
    found = hashlib.blake2b(f"{size}\0".encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= BLOCKS * BLOCK:
            found.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.digest()
