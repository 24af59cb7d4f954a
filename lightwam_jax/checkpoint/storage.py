"""Items of a checkpoint on disk: trees of arrays that are checked, and plain files.

Orbax restores a flipped byte, or another dtype, without an error. The meta item therefore keeps a
manifest of every array (shape, dtype, checksum), and what is read is checked against it. The meta
item has a checksum of its own. Checksums do not depend on the mesh. Several processes agree on what
is damaged.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lightwam_jax import folders, sharding
from lightwam_jax import params as params_lib
from lightwam_jax.checkpoint import streamed

FORMAT = 1
COMMIT_FILE = "commit_success.txt"  # Orbax writes its own into every item
LARGE = 1 << 20  # bytes from which a file of assets is linked rather than copied


# What Orbax raises for files that are missing or damaged.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError)


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are missing, truncated or altered."""


class SaveError(OSError):
    """A checkpoint could not be written: a full disk, or storage that went away."""


def local_path(path):
    """Returns `path`, absolute.

    Raises:
      ValueError: it is an address of object storage, which has neither renames nor links.
    """
    if "://" in str(path):
        raise ValueError(
            f"{path} is object storage; expected a directory. Mount it, or copy from and to it "
            "(gcloud storage rsync, aws s3 sync)"
        )
    return pathlib.Path(path).absolute()


# ---- several processes -------------------------------------------------------------------------


def first_problem(problem):
    """Returns the first problem that any process reports; all must call it.

    Args:
      problem: what this process found wrong, or None.
    """
    if jax.process_count() == 1:
        return problem
    text = (problem or "").encode()[:2000].ljust(2000)
    rows = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    texts = [bytes(row).decode(errors="replace").strip() for row in rows]
    return next((f"process {i}: {text}" for i, text in enumerate(texts) if text), None)


def together(read):
    """Returns the result of `read()` if it succeeds in every process; all must call it.

    Raises:
      DamagedCheckpointError: in all processes, with the same text, if it was raised in any.
    """
    try:
        value, problem = read(), None
    except DamagedCheckpointError as error:
        value, problem = None, str(error)
    problem = first_problem(problem)
    if problem:
        raise DamagedCheckpointError(problem)
    return value


def check_shared(workdir):
    """Raises ValueError where several processes do not see the same directory; all must call it."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.uint32(time.time_ns() % 2**32))
    file = workdir / f".seen_by_all_{token}"
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        file.touch()
    multihost_utils.sync_global_devices("file of process 0 written")
    seen = any(file.exists() or time.sleep(0.5) for _ in range(10))
    problem = first_problem(None if seen else f"{workdir} lacks {file.name}")
    if jax.process_index() == 0:
        file.unlink()
    if problem:
        raise ValueError(
            f"the processes do not share a directory ({problem}, which process 0 wrote); "
            "--workdir must be on storage that all of them see, or in a bucket"
        )


# ---- manifests of arrays ------------------------------------------------------------------------


def checksums(tree):
    """Returns a uint32 checksum per leaf: the sum of its bits, each weighted by its position.

    The weights are odd, so a change of any one element always changes the sum.
    """
    leaves, structure = jax.tree.flatten(sharding.one_copy(jax.tree.map(jnp.asarray, tree)))
    # One program for all arrays that are spread over devices: many programs under way at once, each
    # with a sum over devices, can take up all threads of a CPU in different orders, and deadlock.
    spread = [len(x.sharding.device_set) > 1 for x in leaves]
    sums = iter(_checksums([x for x, is_spread in zip(leaves, spread) if is_spread]))
    # The others one by one: leaves of one shape share a compilation.
    return structure.unflatten(
        next(sums) if is_spread else _checksum(x) for x, is_spread in zip(leaves, spread)
    )


@jax.jit
def _checksums(leaves):
    return [_checksum(x) for x in leaves]


@jax.jit
def _checksum(x, start=0):
    """Digest of an array, or the summand of a part that starts at element `start` (mod 2**32)."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    position, stride = jnp.full(x.shape, start, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):  # no reshape: it would gather a sharded array
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += along * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = position * np.uint32(2654435762) + np.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def _padded(part):
    """A small array as a vector filled with zeros up to a power of two.

    Zeros add nothing to a checksum, and arrays of many shapes share a few compilations.
    """
    if not 0 < part.size < 1 << 20:
        return part
    size = 1 << (part.size - 1).bit_length()
    return np.concatenate([part.reshape(-1), np.zeros(size - part.size, part.dtype)])


def manifest(tree):
    """Returns {path: [shape, dtype, checksum]} of a tree of arrays."""
    sums = params_lib.flatten(jax.device_get(checksums(tree)))
    return {
        path: [list(x.shape), str(x.dtype), int(sums[path])]
        for path, x in params_lib.flatten(tree).items()
    }


def _check(sums, meta, directory, name):
    sums, stored = params_lib.flatten(sums), meta["arrays"][name]
    if wrong := sorted(path for path, value in sums.items() if int(value) != stored[path][2]):
        raise DamagedCheckpointError(
            f"{directory}/{name}: {len(wrong)} of {len(sums)} arrays differ from what was saved "
            f"(first: {wrong[0]}); the files were altered on disk"
        )


def write_params(directory, tree):
    """Writes a tree as an Orbax item, part by part; returns its manifest.

    Args:
      directory: of the item.
      tree: arrays, or `streamed.StreamedArray`s where they are larger than memory.
    """
    leaves = {
        path: leaf if isinstance(leaf, streamed.StreamedArray) else streamed.from_array(leaf)
        for path, leaf in params_lib.flatten(tree).items()
    }
    path_of = {id(leaf): path for path, leaf in leaves.items()}
    sums = dict.fromkeys(leaves, 0)

    def add(leaf, row, part):
        start = np.uint32(row * math.prod(leaf.shape[1:]) % 2**32)
        sums[path_of[id(leaf)]] += int(_checksum(_padded(part), start))

    streamed.save(directory, params_lib.unflatten(leaves), add)
    return {
        path: [list(leaf.shape), str(leaf.dtype), sums[path] % 2**32]
        for path, leaf in leaves.items()
    }


def on_host(tree):
    """Returns the tree as numpy arrays if this is the only process, else as it is.

    Orbax cuts device arrays into one slice per replica and compiles a program per shape for that,
    which pays only if several hosts write.
    """
    return jax.device_get(tree) if jax.process_count() == 1 else tree


# ---- items on disk -----------------------------------------------------------------------------


class FilesHandler(ocp.CheckpointHandler):
    """Lets Orbax put a directory of files into a checkpoint; see `copy_files`."""

    def save(self, directory, args):
        if jax.process_index() == 0:
            copy_files(args.source, directory, args.link_from)

    def restore(self, directory, args=None):
        return directory


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Files(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler`."""

    source: str
    link_from: int | None = None


def copy_files(source, target, link_from=None):
    """Copies the files below `source` into the directory `target`.

    Args:
      link_from: bytes from which a file is hard-linked instead, where possible; None: never.

    Raises:
      FileNotFoundError: there is no directory `source`.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there to be copied to {target}")
    for file in folders.files_below(source):
        if file.name == COMMIT_FILE:
            continue
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if link_from is not None and file.stat().st_size >= link_from:
            try:
                os.link(file, place)
                continue
            except OSError:  # a file system without hard links
                pass
        shutil.copyfile(file, place)


def meta_checksum(values):
    """Returns the CRC-32 of JSON-able values, "checksum" itself left out."""
    values = {name: value for name, value in values.items() if name != "checksum"}
    same = json.loads(json.dumps(values))  # tuples are lists in a file
    return zlib.crc32(json.dumps(same, sort_keys=True).encode())


def read_meta(directory):
    """Returns the meta item of a checkpoint.

    Raises:
      DamagedCheckpointError: it cannot be read, or was altered.
      ValueError: it is of another version of this format.
    """
    directory = pathlib.Path(directory)
    try:
        meta = json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{directory}/meta/metadata cannot be read: {error}"
        ) from error
    if not isinstance(meta, dict) or meta.get("checksum") != meta_checksum(meta):
        raise DamagedCheckpointError(
            f"{directory}/meta/metadata was altered on disk: its checksum differs"
        )
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has checkpoint format {meta.get('format')}, this version reads {FORMAT}"
        )
    return meta


def read_items(directory, targets, meta):
    """Returns {item: tree of arrays}, checked, as `targets` wants them.

    Args:
      directory: checkpoint.
      targets: {item: tree of ShapeDtypeStructs with shardings}; other dtypes than stored are a
        cast, and an empty tree is not read.
      meta: from `read_meta`.

    Raises:
      DamagedCheckpointError: files are missing, truncated or altered. Each process reads for
        itself (file system caches may differ); all raise it if one finds it.
    """
    wanted = {name: target for name, target in targets.items() if target}
    items = together(
        lambda: {name: _read_item(directory, name, target, meta) for name, target in wanted.items()}
    )
    # All processes compute the sums together: that of a sharded array needs all of them.
    sums = jax.device_get(checksums(items))
    together(lambda: [_check(sums[name], meta, directory, name) for name in items])
    return {
        name: jax.tree.map(lambda x, t: x.astype(t.dtype), items[name], target) if target else {}
        for name, target in targets.items()
    }


def _read_item(directory, name, target, meta):
    """Arrays of one item in their stored dtypes, without waiting for other processes."""
    where, me = f"{directory}/{name}", jax.process_index()
    places = jax.tree.map(lambda x: x.sharding, target)
    stored = sharding.with_shardings(stored_shapes(meta, name), places)
    try:
        alone = ocp.options.MultiprocessingOptions(me, {me}, f"reader{me}")
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
            return reader.restore(directory / name, stored)
    except Exception as error:  # Orbax raises a bare Exception for arrays it cannot decode
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedCheckpointError(f"{where} cannot be read: {reason}") from error


def read_array(directory, name, path, meta):
    """Returns one array of an item as numpy, unchecked, without reading the others."""
    target = {path: _stored(meta["arrays"][name][path])}
    how = {path: ocp.RestoreArgs(restore_type=np.ndarray)}
    wanted = ocp.args.PyTreeRestore(
        params_lib.unflatten(target), params_lib.unflatten(how), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(pathlib.Path(directory).absolute() / name, args=wanted)
    return params_lib.flatten(tree)[path]


def stored_shapes(meta, name):
    """Returns the tree of ShapeDtypeStructs of an item as it was saved."""
    return params_lib.unflatten({path: _stored(x) for path, x in meta["arrays"][name].items()})


def _stored(entry):
    shape, dtype, _ = entry
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
