"""The rows of a LeRobot data file: states, actions, times, and whose they are."""

import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats import lerobot_meta


class Rows(typing.NamedTuple):
    """The columns of a data file: f32 [n, P], f32 [n, A], f64 [n], int [n] ..."""

    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    frame_index: np.ndarray
    episode_index: np.ndarray
    task_index: np.ndarray

    def part(self, first, stop):
        """Returns the rows from `first` to `stop`."""
        return Rows(*(column[first:stop] for column in self))


def load(data, file):
    """Returns the `Rows` of a data file, or a sentence that says why there are none."""
    columns = {keys_lib.parse(key).path for key in (*data.state, *data.action)}
    columns |= {*lerobot_meta.INDEX}
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if absent := sorted(columns - set(names)):
                return f"it has no column {', '.join(absent)}; it has {', '.join(names)}"
            table = parquet.read(columns=sorted(columns), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"{error}; copy it again"
    try:
        state, action = (
            np.concatenate([_cut(table, key) for key in keys], 1).astype(np.float32)
            for keys in (data.state, data.action)
        )
        timestamp, *index = (_numbers(table, key, fill=np.nan) for key in lerobot_meta.INDEX)
        return Rows(state, action, _single(timestamp, "timestamp"), *map(_whole, index))
    except (pa.ArrowException, ValueError) as error:
        return str(error)


def _cut(table, text):
    """Returns the dimensions of a column that a key of config.data.fields names, [n, D]."""
    key = keys_lib.parse(text)
    return _numbers(table, key.path)[:, key.dims]


def _single(values, name):
    if values.shape[1] > 1:
        raise ValueError(f"column {name} has rows of {values.shape[1]} numbers; expected one")
    return values.reshape(-1).astype(np.float64)


def _whole(values):
    """Returns an index [n, 1] as int64 [n]; -1 where there is no whole number."""
    values = _single(values, "of an index")
    good = (values >= 0) & (values < 2**53) & (values == np.floor(values))
    return np.where(good, values, -1).astype(np.int64)


def _numbers(table, key, fill=None):
    """Returns a column of numbers, or of lists of equally many numbers, as [n, D].

    Empty cells are NaN among floats, and `fill` among whole numbers: an error where that is None.
    """
    column = table.column(key).combine_chunks()
    rows, types = len(column), pa.types
    while not types.is_primitive(column.type):
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
            continue
        if not hasattr(column, "flatten") or types.is_struct(column.type):
            raise ValueError(f"column {key} is {column.type}; expected numbers")
        if column.null_count:
            raise ValueError(f"column {key} has {column.null_count} empty rows")
        width = pc.min_max(pc.list_value_length(column)).as_py()
        if width["min"] != width["max"]:
            raise ValueError(
                f"column {key} has rows of {width['min']} and of {width['max']} numbers"
            )
        column = column.flatten()
    of_numbers = types.is_integer, types.is_floating, types.is_boolean
    if not any(is_one(column.type) for is_one in of_numbers):
        raise ValueError(f"column {key} is {column.type}; expected numbers")
    if column.null_count and not types.is_floating(column.type):
        if fill is None:
            raise ValueError(f"column {key} has {column.null_count} empty cells")
        column = pc.cast(column, pa.float64()).fill_null(fill)
    return column.to_numpy(zero_copy_only=False).reshape(rows, len(column) // max(rows, 1))


def runs(episode_index):
    """Yields (episode, first row, row behind the last) of rows [n] that belong together."""
    ends = [*np.flatnonzero(np.diff(episode_index)) + 1, len(episode_index)]
    for first, stop in zip([0, *ends], ends):
        if stop > first and episode_index[first] >= 0:
            yield int(episode_index[first]), int(first), int(stop)
