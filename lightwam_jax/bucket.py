"""Object storage: objects under an address such as gs://bucket/run or s3://bucket/run.

It has neither renames nor links, and no object can be appended to. The packages that speak to it
(requirements-bucket.txt) are imported when an address is opened; their own settings and environment
variables decide about credentials and endpoints.
"""

import concurrent.futures
import contextlib
import importlib.util
import re

# scheme: the package that speaks it
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
_LARGE = 5 << 20  # bytes; gcsfs sends larger files in messages of their own


class BucketError(OSError):
    """Object storage did not do what it was asked to: no access, no such bucket, no network."""


def is_address(place):
    """Whether this is an address, not a path."""
    return "://" in str(place)


def check(address, what="--workdir"):
    """Raises ValueError where nothing here could read or write at an address; asks no network.

    Args:
      what: the flag or key it was given as.
    """
    scheme, _, rest = str(address).partition("://")
    known = " or ".join(f"{name}://BUCKET/PATH" for name in SCHEMES)
    if scheme not in SCHEMES:
        raise ValueError(
            f"{what}={address}: {scheme}:// is not supported; expected a directory, {known}"
        )
    if not re.fullmatch(r"[^/]+(/[^/]+)+/?", rest) or {".", ".."} & set(rest.split("/")):
        raise ValueError(
            f"{what}={address}: expected {scheme}://BUCKET/PATH, a bucket and a path in it"
        )
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise ValueError(
            f"{what}={address} needs the package {SCHEMES[scheme]}: pip install -r "
            "requirements-bucket.txt"
        )


class Bucket:
    """The objects under one address; their names are relative to it.

    Every method raises `BucketError` where the storage fails.
    """

    def __init__(self, address):
        """Args: address: as `check` wants it."""
        check(address, "address")
        import fsspec

        self.address = str(address).rstrip("/")
        with self._failing("open"):
            # What others write must be seen.
            self._fs, root = fsspec.core.url_to_fs(
                self.address, use_listings_cache=False, skip_instance_cache=True
            )
        self._root = root.rstrip("/")

    def __str__(self):
        return self.address

    @contextlib.contextmanager
    def _failing(self, action):
        try:
            yield
        except Exception as error:  # botocore, aiohttp, google.auth: whatever they raise
            lines = str(error).splitlines() or ["no reason given"]
            raise BucketError(
                f"{self.address}: {action} failed: {type(error).__name__}: {lines[0]}"
            ) from error

    def _full(self, name):
        return f"{self._root}/{name}" if name else self._root

    def sizes(self, folder=""):
        """Returns {name: bytes} of the objects, those below `folder` only if it is given.

        Raises:
          BucketError: also where a name could leave a directory that it is copied to.
        """
        with self._failing("listing"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._full(folder), detail=True)
            except FileNotFoundError:
                found = {}
        start, sizes = f"{self._root}/", {}
        for path, info in found.items():
            name = path.removeprefix(start) if path.startswith(start) else ""
            if (
                not name
                or name.endswith("/")
                or not name.startswith(f"{folder}/" if folder else "")
            ):
                continue  # the mark of an empty folder, or an object of that very name
            if {"", ".", ".."} & set(name.split("/")):
                raise BucketError(f"{self.address} holds an object with the unsafe name {name!r}")
            sizes[name] = int(info["size"])
        return sizes

    def read(self, name):
        """Returns the bytes of an object, None where there is none."""
        with self._failing(f"reading {name}"):
            try:
                return self._fs.cat_file(self._full(name))
            except FileNotFoundError:
                return None

    def write(self, name, content):
        """Writes bytes as an object: all of it or nothing."""
        with self._failing(f"writing {name}"):
            self._send(name, content)

    def put(self, files):
        """Writes files as objects, several at a time.

        Args: files: {name: path}.
        """
        with self._failing(f"writing {_some(files)}"):
            apart = [name for name, path in files.items() if self._ends_in_return(path)]
            names = [name for name in files if name not in apart]
            if names:
                self._fs.put([str(files[n]) for n in names], [self._full(n) for n in names])
            for name in apart:
                self._send(name, files[name].read_bytes())

    def _send(self, name, content):
        # gcsfs sends what is small as a part of a message, which "\n--" ends. A server may take a
        # last "\r" for the end's: gcp-storage-emulator does. In a message of its own it is safe.
        alone = self.address.startswith("gs:") and content.endswith(b"\r")
        self._fs.pipe_file(
            self._full(name), content, **({"chunksize": len(content)} if alone else {})
        )

    def _ends_in_return(self, path):
        """Whether a file has to be sent alone; see `_send`. Large ones are, in any case."""
        size = path.stat().st_size
        if not self.address.startswith("gs:") or not 0 < size < _LARGE:
            return False
        with open(path, "rb") as file:
            file.seek(size - 1)
            return file.read() == b"\r"

    def get(self, files):
        """Writes objects to files, whose directories are made.

        Args: files: {name: path}.
        """
        names = list(files)
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._failing(f"reading {_some(names)}"):
            if names:
                self._fs.get([self._full(n) for n in names], [str(files[n]) for n in names])

    def copy(self, source, target):
        """Copies an object within the bucket, without moving its bytes through this machine."""
        with self._failing(f"copying {source}"):
            self._fs.cp_file(self._full(source), self._full(target))

    def delete(self, names):
        """Deletes objects; those that are gone already do not matter."""
        names = list(names)
        with (
            self._failing(f"deleting {_some(names)}"),
            concurrent.futures.ThreadPoolExecutor(8) as pool,
        ):
            list(pool.map(self._delete, names))

    def _delete(self, name):
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(name))  # `rm` would take a "[" in a name for a pattern


def _some(names):
    names = list(names)
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
