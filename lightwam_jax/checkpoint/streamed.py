"""Arrays larger than memory, written into a checkpoint part by part.

The result is an ordinary Orbax item, cut into chunks along the first axis. Orbax has no public way
to do this: `_Handler` replaces a private method, so requirements.txt bounds its version.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

PART_BYTES = 128 << 20  # size that parts aim at
_SMALL_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedArray:
    """An array [n, ...] that is made part by part.

    Attributes:
      shape, dtype: of the whole.
      rows: rows of a part; the last one may be shorter.
      parts: function returning an iterator over numpy arrays [rows, ...] in order; every call
        starts again.
    """

    shape: tuple
    dtype: np.dtype
    rows: int
    parts: Callable

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * jnp.dtype(self.dtype).itemsize

    def whole(self):
        """The array in memory: preallocated and filled part by part, never two copies."""
        out, start = np.empty(self.shape, self.dtype), 0
        for part in self.parts():
            out[start : start + len(part)] = part
            start += len(part)
        return out


def rows_per_part(shape, dtype):
    """Rows along the first axis that make a part of about `PART_BYTES`, at least one."""
    row = math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
    return max(1, min(shape[0], PART_BYTES // max(1, row)))


def from_array(array):
    """An array in memory as a `StreamedArray`; a scalar is not one."""
    rows = rows_per_part(array.shape, array.dtype)
    return StreamedArray(
        array.shape,
        array.dtype,
        rows,
        lambda: (np.asarray(array[i : i + rows]) for i in range(0, array.shape[0], rows)),
    )


def save(directory, tree, done):
    """Writes a tree of `StreamedArray`s as an Orbax item.

    Args:
      directory: of the item; must not exist.
      done: called with (array, first row, part) after each part is written.

    Raises:
      the first error of reading a part, writing it or `done`; nothing is being written any more.
    """
    handler = _Handler(done)
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )  # unused; Orbax warns where it is missing
    try:
        item = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(item) as writer:
            writer.save(directory, args=ocp.args.PyTreeSave(tree))
    finally:  # Orbax may fail over what is missing: the first error is the reason
        if handler.errors:
            raise handler.errors[0]


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes the parts of one array after the other.

    An error stops all arrays and is kept: raised at once, it would leave the others writing.
    """

    def __init__(self, done):
        super().__init__(deepcopy_host_arrays=False)
        self._done, self._turn, self.errors = done, asyncio.Semaphore(1), []

    async def _open_and_write(self, value, tspec, ts_context):
        try:
            # Small arrays are written all at once, as each has a delay; large ones in turn.
            small = value.nbytes <= _SMALL_BYTES
            async with contextlib.nullcontext() if small else self._turn:
                await self._write(value, tspec, ts_context)
        except Exception as error:  # whatever it is, `save` raises it
            self.errors.append(error)

    async def _write(self, value, tspec, ts_context):
        # One chunk per part: otherwise every part would read and rewrite chunks of its neighbours.
        store = tspec["base"] if tspec["driver"] == "cast" else tspec
        store["metadata"]["chunks"] = [value.rows, *value.shape[1:]]
        target = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        start = 0
        for part in value.parts():
            if self.errors:
                return
            await target[start : start + len(part)].write(part)
            self._done(value, start, part)
            start += len(part)
