"""The working copy of a run that lives in a bucket.

What the run writes is written to a directory of this machine first, by the code that serves every
run, and then copied to the bucket. In the bucket a run looks as it does on disk, with two objects
more:

    checkpoints/<step>/committed.json   size and CRC-32 of each file; written last. A checkpoint
                                        without it does not count.
    checkpoints/<step>/damaged.json     in its place where the checkpoint turned out to be damaged

The bucket decides: what this machine has and the bucket lacks is dropped at the next start.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import threading
import zlib

import jax
from absl import logging

from lightwam_jax import atomic, folders
from lightwam_jax import bucket as bucket_lib
from lightwam_jax.checkpoint import storage

COMMITTED, DAMAGED = "committed.json", "damaged.json"
PUSH_EVERY_S = 30.0  # how far metrics and reports in the bucket may lag behind
SCRATCH = "~/.cache/lightwam_jax/buckets"
_NOT_PUSHED = {"checkpoints", "frozen_params"}
_GROWS = 256 << 20  # bytes; a larger file is one of the assets, which do not change
_UNFINISHED = (".tmp", ".partial")
# What no command but train.py reads in a run directory.
_OF_TRAINING = ("assets/", "tensorboard/", "profile/", "wandb/", "damaged_checkpoints/")


class WorkingCopy:
    """A run in a bucket and its copy on this machine.

    Attributes:
      bucket: `Bucket` of the run. path: directory of the copy, of this process alone in training.
    """

    def __init__(self, address, scratch="", use="read"):
        """Args:

        address: of the run. scratch: directory of all working copies; "": `SCRATCH`.
        use: "train", "evaluate" or "read", which have a copy each.
        """
        self.bucket = bucket_lib.Bucket(address)
        kind = f"train{jax.process_index() or ''}" if use == "train" else use
        place = pathlib.Path(scratch or SCRATCH).expanduser().absolute() / kind
        key = zlib.crc32(self.bucket.address.encode())  # names may repeat in another folder
        self.path = place / f"{key:08x}" / self.bucket.address.rpartition("/")[2]
        self._pushed = {}  # {name: (bytes, mtime) of the file as it is in the bucket}
        self._known = {}  # {identity of a large file: (its CRC-32, an object with its content)}
        self._pushing = threading.Lock()
        self.path.mkdir(parents=True, exist_ok=True)
        self._in_use = open(self.path.parent / "lock", "ab")  # noqa: SIM115 (until `close`)
        if not atomic.lock(self._in_use):
            if use == "train":
                raise ValueError(
                    f"another train.py on this machine continues {self.bucket}; stop one of them"
                )
            logging.warning("Waiting for another command that uses %s", self.path)
            atomic.lock(self._in_use, wait=True)

    def close(self):
        """Lets others use the copy."""
        self._in_use.close()

    # ---- small files: all but the checkpoints ---------------------------------------------------

    def pull(self, without=()):
        """Replaces the small files of the copy by those of the bucket.

        Args: without: beginnings of names that are left in the bucket.
        """
        wanted = [
            name for name in self.bucket.sizes() if not name.startswith(("checkpoints/", *without))
        ]
        for entry in self.path.iterdir():
            if entry.name != "checkpoints":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.bucket.get({name: self.path / name for name in wanted})
        self._pushed = self._stamps()

    def push(self):
        """Copies the small files that changed to the bucket, and deletes those that are gone."""
        with self._pushing:
            now = self._stamps()
            changed = [name for name, stamp in now.items() if self._pushed.get(name) != stamp]
            with self._snapshot(changed) as files:
                self.bucket.put(files)
            self.bucket.delete(set(self._pushed) - set(now))
            # What was removed or replaced meanwhile is looked at again next time.
            self._pushed = {n: x for n, x in now.items() if n in files or n not in changed}

    @contextlib.contextmanager
    def _snapshot(self, names):
        """Gives {name: file} whose files stay as they are while they are sent."""
        outbox = self.path.parent / "outbox"
        shutil.rmtree(outbox, ignore_errors=True)
        files = {}
        for name in names:
            file, kept = self.path / name, outbox / name
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size < _GROWS:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, kept)
                    file = kept
                files[name] = file
        yield files
        shutil.rmtree(outbox, ignore_errors=True)

    @contextlib.contextmanager
    def pushing(self):
        """Pushes every `PUSH_EVERY_S` seconds, and once more when the block ends."""
        done = threading.Event()

        def often():
            while not done.wait(PUSH_EVERY_S):
                try:
                    self.push()
                except OSError as error:  # a file that was being replaced, or the network
                    logging.warning("%s; trying again in %g s", error, PUSH_EVERY_S)

        thread = threading.Thread(target=often, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            done.set()
            thread.join()
            try:
                self.push()
            except OSError as error:  # what ended the block matters more
                logging.warning("%s", error)
            raise
        done.set()
        thread.join()
        self.push()

    def _stamps(self):
        stamps = {}
        for file in folders.files_below(self.path):
            parts = file.relative_to(self.path).parts
            if parts[0] in _NOT_PUSHED or any(part.endswith(_UNFINISHED) for part in parts):
                continue
            with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile
                status = file.stat()
                stamps["/".join(parts)] = status.st_size, status.st_mtime_ns
        return stamps

    # ---- checkpoints ----------------------------------------------------------------------------

    def steps(self):
        """Returns the committed steps, ascending."""
        return _committed(self.bucket.sizes("checkpoints"))

    def upload(self, step, keep):
        """Copies a checkpoint to the bucket, then the small files; commits; deletes old ones.

        Args:
          step: of a whole checkpoint in the copy.
          keep: function from the committed steps to those that stay.
        """
        folder, files, new = _folder(step), {}, {}
        self._delete_checkpoint(step)  # what a killed upload left, or a damaged one
        for file in folders.files_below(self.path / folder):
            name, status = file.relative_to(self.path / folder).as_posix(), file.stat()
            same = status.st_ino, status.st_size, status.st_mtime_ns
            crc, object_name = self._known.get(same, (None, None))
            files[name] = [status.st_size, _crc(file) if crc is None else crc]
            if object_name is None or not self._copied(object_name, f"{folder}/{name}"):
                new[f"{folder}/{name}"] = file
            if status.st_size >= storage.LARGE and status.st_nlink > 1:
                self._known[same] = files[name][1], f"{folder}/{name}"
        self.bucket.put(new)
        self._check_sent(folder, files)
        self.push()  # metrics up to this step have to be there when it counts
        self.bucket.write(f"{folder}/{COMMITTED}", _sealed({"step": step, "files": files}))
        steps = self.steps()
        for old in sorted(set(steps) - set(keep(steps))):
            self._delete_checkpoint(old)

    def _check_sent(self, folder, files):
        """Raises BucketError where an object has another size than was sent: nothing counts."""
        there = self.bucket.sizes(folder)
        for name, (size, _) in files.items():
            if (found := there.get(f"{folder}/{name}")) != size:
                raise bucket_lib.BucketError(
                    f"{self.bucket}/{folder}/{name} has {found} bytes after {size} were written"
                )

    def fetch(self, step):
        """Copies a committed checkpoint to this machine and returns its directory.

        Files that are here already and have the committed content are not read again.

        Raises:
          storage.DamagedCheckpointError: an object is missing, or not what was committed.
        """
        folder, where = self.path / _folder(step), f"{self.bucket}/{_folder(step)}"
        files = _unsealed(self.bucket.read(f"{_folder(step)}/{COMMITTED}"), where)
        there = self.bucket.sizes(_folder(step))
        for name, (size, _) in files.items():
            if (found := there.get(f"{_folder(step)}/{name}")) != size:
                said = "is missing" if found is None else f"has {found} bytes"
                raise storage.DamagedCheckpointError(f"{where}/{name} {said}; expected {size}")
        for file in folders.files_below(folder) if folder.is_dir() else ():
            if file.relative_to(folder).as_posix() not in files:
                file.unlink()
        needed = [name for name in files if not _is(folder / name, files[name])]
        self.bucket.get({f"{_folder(step)}/{name}": folder / name for name in needed})
        if wrong := [name for name in needed if not _is(folder / name, files[name])]:
            raise storage.DamagedCheckpointError(
                f"{where}/{wrong[0]} is not what was committed: its checksum differs"
            )
        for name, (size, crc) in files.items():
            if size >= storage.LARGE:
                status = (folder / name).stat()
                same = status.st_ino, status.st_size, status.st_mtime_ns
                self._known[same] = crc, f"{_folder(step)}/{name}"
        return folder

    def keep_local(self, steps):
        """Removes all checkpoints of the copy but these."""
        parent = self.path / "checkpoints"
        for entry in parent.iterdir() if parent.is_dir() else ():
            if entry.name not in map(str, steps):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def mark_damaged(self, step, reason):
        """Takes a checkpoint's commitment back; its files stay, to be looked into."""
        self.bucket.write(f"{_folder(step)}/{DAMAGED}", json.dumps({"reason": reason}).encode())
        self.bucket.delete([f"{_folder(step)}/{COMMITTED}"])

    def remove_unfinished(self):
        """Deletes what killed uploads and deletions left in the bucket."""
        by_step = {}
        for name in self.bucket.sizes("checkpoints"):
            step, _, rest = name.removeprefix("checkpoints/").partition("/")
            by_step.setdefault(step, {})[rest] = name
        for step, names in by_step.items():
            if step.isdigit() and not {COMMITTED, DAMAGED} & set(names):
                self.bucket.delete(names.values())

    def _delete_checkpoint(self, step):
        names = self.bucket.sizes(_folder(step))
        commit = f"{_folder(step)}/{COMMITTED}"
        self.bucket.delete([commit] if commit in names else [])
        self.bucket.delete(set(names) - {commit})

    def _copied(self, source, target):
        """Whether an object could be copied within the bucket; otherwise its file is sent."""
        try:
            self.bucket.copy(source, target)
        except bucket_lib.BucketError as error:
            logging.info("%s", error)
            return False
        return True


# ---- reading a run -------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(address, step=None, scratch=""):
    """Gives the directory of a copy with one checkpoint; what is written there is pushed.

    Args:
      step: of the checkpoint; None: the newest.

    Raises:
      FileNotFoundError: it is not in the bucket.
      storage.DamagedCheckpointError: it is not what was committed.
    """
    copy = WorkingCopy(address, scratch, "evaluate")
    with contextlib.closing(copy):
        wanted = _wanted(copy, step)
        copy.keep_local([wanted])
        copy.pull(_OF_TRAINING)
        copy.fetch(wanted)
        with copy.pushing():
            yield copy.path


@functools.cache  # a process that asks twice means the same checkpoint
def checkpoint(address):
    """Returns a directory with the checkpoint of a run in a bucket, or one checkpoint there.

    Args: address: of a run (its newest checkpoint), of its checkpoints/, of one checkpoint, or of
      converted weights that were copied there.

    Raises: as `reading`.
    """
    address = address.rstrip("/")
    head, _, last = address.rpartition("/")
    step = int(last) if last.isdigit() and head.endswith("/checkpoints") else None
    if step is None and "meta/metadata" in (here := bucket_lib.Bucket(address)).sizes("meta"):
        copy = WorkingCopy(address)
        with contextlib.closing(copy):
            shutil.rmtree(copy.path)
            here.get({name: copy.path / name for name in here.sizes()})
            return copy.path
    run = address if step is None else head
    copy = WorkingCopy(run.removesuffix("/checkpoints"))
    with contextlib.closing(copy):
        wanted = _wanted(copy, step)
        copy.keep_local([wanted])
        return copy.fetch(wanted)


def _wanted(copy, step):
    steps = copy.steps()
    if not steps or (step is not None and step not in steps):
        which = "no checkpoint" if step is None else f"no checkpoint {step}"
        raise FileNotFoundError(
            f"{which} in {copy.bucket}/checkpoints: {steps or 'none'} are committed. Expected the "
            f"--workdir of a train.py that saved one (a copy made by hand lacks {COMMITTED})"
        )
    return steps[-1] if step is None else step


# ---- the parts of a commit -----------------------------------------------------------------------


def _folder(step):
    return f"checkpoints/{step}"


def _committed(names):
    found = (name.split("/") for name in names)
    return sorted(int(p[1]) for p in found if p[1].isdigit() and p[2:] == [COMMITTED])


def _sealed(content):
    return json.dumps(content | {"checksum": storage.meta_checksum(content)}).encode()


def _unsealed(raw, where):
    """{name: [bytes, CRC-32]} of a commit."""
    if raw is None:
        raise storage.DamagedCheckpointError(f"{where} is not committed: no {COMMITTED}")
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise storage.DamagedCheckpointError(f"{where}/{COMMITTED} is not JSON") from error
    if not isinstance(content, dict) or content.get("checksum") != storage.meta_checksum(content):
        raise storage.DamagedCheckpointError(f"{where}/{COMMITTED} was altered")
    if any({"", ".", ".."} & set(name.split("/")) for name in content["files"]):
        raise storage.DamagedCheckpointError(f"{where}/{COMMITTED} names a file outside of it")
    return content["files"]


def _crc(file):
    crc = 0
    with open(file, "rb") as stream:
        while part := stream.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _is(file, entry):
    return file.is_file() and [os.path.getsize(file), _crc(file)] == list(entry)
