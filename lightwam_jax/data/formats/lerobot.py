"""LeRobot datasets: v2.0 and v2.1 (a file per episode) and v3.0 (several episodes per file).

Columns are read with pyarrow, images with PyAV or Pillow when they are asked for. What meta/ says
of an episode is compared with what data/ holds; every difference is a `Problem`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tqdm

from lightwam_jax.data.episodes import FrameError, Problem
from lightwam_jax.data.formats import lerobot_meta, stored
from lightwam_jax.data.formats import video as video_lib
from lightwam_jax.data.formats.stored import BadEpisode


class Images(typing.NamedTuple):
    """The rows of a parquet file that hold the frames of an episode, encoded one by one."""

    file: pathlib.Path
    key: str
    keys: tuple  # columns that are read together: those of all cameras that the config names
    first: int
    stop: int
    root: pathlib.Path  # paths of images that are files of their own start here


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LeRobotEpisode(stored.StoredEpisode):
    """An `episodes.Episode`; `images` maps a camera to its `Video` or `Images`."""

    timestamps: np.ndarray

    def video(self, camera):
        """Returns (file, index of its first frame in it) of a camera that is a video, or None."""
        place = self.images.get(camera)
        if not isinstance(place, lerobot_meta.Video):
            return None
        return place.file, round(place.begin * self.fps)

    def frames(self, camera, indices):
        """Returns uint8 [k, H, W, 3]; see `episodes.Episode.frames`."""
        place, indices = self.images_of(camera), np.arange(self.length)[indices]
        if isinstance(place, lerobot_meta.Video):
            return video_lib.frames(place.file, place.begin + self.timestamps[indices], indices)
        return _images(place, indices)


def _images(place, indices):
    """Returns the frames of an `Images` at `indices` [k] as uint8 [k, H, W, 3]."""
    cells = _cells(place.file, place.keys, place.first, place.stop)[place.key]

    def error(reason, frame):
        return FrameError(place.file, frame, f"{place.key}: {reason}")

    return stored.stack_frames(indices, lambda frame: _decoded(cells[frame], place.root), error)


@functools.lru_cache(maxsize=8)
def _cells(path, keys, first, stop):
    """Returns {column: its cells} of rows: whole episodes, since parquet has no smaller unit."""
    try:
        with pq.ParquetFile(path) as file:
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = np.cumsum([0, *counts])
            groups = [i for i in range(len(counts)) if starts[i] < stop and starts[i + 1] > first]
            table = file.read_row_groups(groups, columns=list(keys), use_threads=False)
        rows = table.slice(first - starts[groups[0]], stop - first)
        return {key: rows.column(key).to_pylist() for key in keys}
    except (pa.ArrowException, OSError) as error:
        raise FrameError(path, None, f"unreadable: {error}") from error


def _decoded(cell, root):
    """A cell is the encoded image, its path, or a struct of the two with one of them empty."""
    if not isinstance(cell, dict):
        cell = {"path": cell} if isinstance(cell, str) else {"bytes": cell}
    content, path = cell.get("bytes"), cell.get("path")
    if content is None and path is None:
        raise ValueError("empty")
    return stored.decode_image((root / path).read_bytes() if content is None else content)


def read(config):
    """Returns (episodes, problems) of config.data.path; see `episodes.read`.

    Raises:
      ValueError: what concerns the whole dataset; see `lerobot_meta.open_set`.
    """
    data = lerobot_meta.open_set(config)
    listed = data.listed()
    excluded = [entry for entry in listed if entry.id in config.data.exclude]
    wanted = [entry for entry in listed if entry.id not in config.data.exclude]
    files = set(data.root.glob(re.sub(r"\{[^}]*\}", "*", data.info["data_path"])))
    files = sorted(files - ({entry.data for entry in excluded} - {entry.data for entry in wanted}))
    with concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool:
        loading = pool.map(functools.partial(_load, data), files)
        bar = tqdm.tqdm(loading, total=len(files), desc="data files", unit="file", delay=1)
        loaded = dict(zip(files, bar))
    tables = {file: rows for file, rows in loaded.items() if isinstance(rows, _Rows)}
    broken = {file: reason for file, reason in loaded.items() if file not in tables}
    spans = collections.defaultdict(list)
    for file, rows in tables.items():
        for index, first, stop in _runs(rows.episode_index):
            spans[index].append((file, first, stop))
    found, problems = [], []
    for entry in wanted:
        try:
            file, first, stop = _span(entry, tables, broken, spans.get(entry.index, ()))
        except BadEpisode as error:
            problems.append(Problem.error(error.kind, entry.id, entry.data, str(error)))
            continue
        rows = tables[file].part(first, stop)
        faults = list(_faults(data, entry, file, rows))
        problems += faults
        if not faults:
            found.append(_episode(data, entry, file, first, rows))
    problems += [
        Problem.error("excluded", entry.id, entry.data, "as the config says") for entry in excluded
    ]
    return found, problems + _unlisted(data, listed, broken, spans)


class _Rows(typing.NamedTuple):
    """The columns of a data file: f32 [n, P], f32 [n, A], f64 [n], int [n] ..."""

    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    frame_index: np.ndarray
    episode_index: np.ndarray
    task_index: np.ndarray

    def part(self, first, stop):
        """Returns the rows from `first` to `stop`."""
        return _Rows(*(column[first:stop] for column in self))


def _load(data, file):
    """Returns the `_Rows` of a data file, or a sentence that says why there are none."""
    columns = [*data.state, *data.action, *lerobot_meta.INDEX]
    try:
        with pq.ParquetFile(file) as parquet:
            absent = sorted(set(columns) - set(parquet.schema_arrow.names))
            if absent:
                return f"it has no column {', '.join(absent)}, which meta/info.json promises"
            table = parquet.read(columns=columns, use_threads=False)
        state, action = (
            np.concatenate([_numbers(table, key) for key in keys], 1).astype(np.float32)
            for keys in (data.state, data.action)
        )
        timestamp, *index = (_numbers(table, key).reshape(-1) for key in lerobot_meta.INDEX)
        index = [column.astype(np.int64) for column in index]
        return _Rows(state, action, timestamp.astype(np.float64), *index)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"{error}; copy it again"


def _numbers(table, key):
    """Returns a column of numbers, or of lists of equally many numbers, as [n, D]."""
    column = table.column(key).combine_chunks()
    rows = len(column)
    while not pa.types.is_primitive(column.type):
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
            continue
        if column.null_count:
            raise ValueError(f"column {key} has {column.null_count} empty rows")
        width = pc.min_max(pc.list_value_length(column)).as_py()
        if width["min"] != width["max"]:
            raise ValueError(
                f"column {key} has rows of {width['min']} and of {width['max']} numbers"
            )
        column = column.flatten()
    if column.null_count and not pa.types.is_floating(column.type):
        raise ValueError(f"column {key} has {column.null_count} empty cells")
    return column.to_numpy(zero_copy_only=False).reshape(rows, len(column) // max(rows, 1))


def _runs(episode_index):
    """Yields (episode, first row, row behind the last) of rows [n] that belong together."""
    ends = [*np.flatnonzero(np.diff(episode_index)) + 1, len(episode_index)]
    for first, stop in zip([0, *ends], ends):
        if stop > first:
            yield int(episode_index[first]), int(first), int(stop)


def _span(entry, tables, broken, spans):
    """Returns (file, first row, row behind the last) of an episode; `BadEpisode`: there are none.

    The column episode_index decides which rows are whose, not the file numbers of meta/: LeRobot's
    first converter to v3.0 wrote wrong ones (corrected in its commit 0d1be72).
    """
    if len(spans) > 1:
        places = ", ".join(f"{file} from row {first} on" for file, first, _ in spans)
        raise BadEpisode("scattered rows", f"its rows lie in several places: {places}")
    if spans:
        return spans[0]
    if entry.data in broken:
        raise BadEpisode("unreadable data file", broken[entry.data])
    if entry.data not in tables:
        raise BadEpisode("missing data file", "no such file; copy it again")
    return entry.data, 0, 0


def _faults(data, entry, file, rows):
    """Yields a `Problem` for everything that is wrong with the rows of an episode."""
    length = len(rows.action)
    if length not in (0, entry.length):
        message = f"{length} rows, meta/ says {entry.length}"
        yield Problem.error("wrong length", entry.id, file, message)
    if (np.diff(rows.frame_index) != 1).any():
        message = "frame_index does not count up by one"
        yield Problem.error("rows out of order", entry.id, entry.data, message)
    if unknown := sorted(set(rows.task_index.tolist()) - set(data.tasks)):
        message = f"task_index {unknown} of {len(data.tasks)} tasks in meta/"
        yield Problem.error("unknown task", entry.id, file, message)
    for key in data.needed if length else ():
        if key in entry.videos:
            yield from _video_faults(data, entry, key, length)


def _video_faults(data, entry, key, length):
    """Yields a `Problem` for what is wrong with a video; it is not opened."""
    file, frame = entry.videos[key].file, 1 / data.info["fps"]
    if not file.is_file():
        message = f"no such file ({key}); copy it again"
        yield Problem.error("missing video", entry.id, file, message)
    missing = length * frame - entry.seconds.get(key, np.inf)
    if missing > frame / 2:  # the next episode in the file would be read as the end of this one
        message = (
            f"meta/ gives {key} {entry.seconds[key]:.3f} s, {missing:.3f} s less than its "
            f"{length} rows last"
        )
        yield Problem.error("wrong length", entry.id, file, message)


def _episode(data, entry, file, first, rows):
    """Returns the `LeRobotEpisode` of sound `rows`, the first of them row `first` of the file."""
    stop = first + len(rows.action)
    together = tuple(key for key in data.needed if key not in entry.videos)
    images = {
        camera: entry.videos.get(key)
        or Images(file, key, together if key in together else (key,), first, stop, data.root)
        for camera, key in data.cameras.items()
    }
    return LeRobotEpisode(
        id=entry.id,
        fps=float(data.info["fps"]),
        tasks=stored.one_or_each([data.tasks[index] for index in rows.task_index.tolist()]),
        state=rows.state,
        action=rows.action,
        timestamps=rows.timestamp,
        file=str(file),
        images=images,
    )


def _unlisted(data, listed, broken, spans):
    """Returns a `Problem` for every episode, or data file, that meta/ does not list."""
    known, files = {entry.index for entry in listed}, {entry.data for entry in listed}
    total, name = data.info.get("total_episodes", 0), lerobot_meta.episode_id
    lost = range(total) if total > len(known) else ()
    extra, absent = sorted(spans.keys() - known), sorted(set(lost) - known - spans.keys())
    forgotten = "it has rows, but meta/ does not list it"
    counted = f"info.json counts {total} episodes, {len(known)} are listed and not this one"
    return [
        *(Problem.error("unlisted episode", name(i), spans[i][0][0], forgotten) for i in extra),
        *(Problem.error("unlisted episode", name(i), data.root / "meta", counted) for i in absent),
        *(
            Problem.error("unreadable data file", file.stem, file, reason)
            for file, reason in broken.items()
            if file not in files
        ),
    ]
