"""LeRobot datasets: v2.0 and v2.1 (a file per episode) and v3.0 (several episodes per file).

Columns are read with pyarrow, images with PyAV or Pillow when they are asked for. What meta/ says
of an episode is compared with what data/ holds; every difference is a `Problem`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from lightwam_jax.data.episodes import FrameError, Problem
from lightwam_jax.data.formats import (
    lerobot_checks,
    lerobot_listed,
    lerobot_meta,
    lerobot_rows,
    stored,
)
from lightwam_jax.data.formats import video as video_lib
from lightwam_jax.data.formats.stored import BadEpisode

# Share of a frame that the nearest image may be away from its row, where config.data.tolerance_s is
# 0: beyond it, which image was meant is a guess.
_NEAREST = 0.25


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
    """An `episodes.Episode`; `images` maps a camera to its `Video` or `Images`.

    tolerance_s: config.data.tolerance_s.
    """

    timestamps: np.ndarray
    tolerance_s: float = 0.0

    def video(self, camera):
        """Returns (file, index of its first frame in it) of a camera that is a video, or None."""
        place = self.images.get(camera)
        if not isinstance(place, lerobot_listed.Video):
            return None
        return place.file, round(place.begin * self.fps)

    def files(self, camera):
        """Returns the video, or the parquet file and the images that it names."""
        place = self.images_of(camera)
        if isinstance(place, lerobot_listed.Video):
            return (place.file,)
        return (place.file, *_named_files(place))

    def frames(self, camera, indices):
        """Returns uint8 [k, H, W, 3]; see `episodes.Episode.frames`."""
        place, indices = self.images_of(camera), np.arange(self.length)[indices]
        if isinstance(place, lerobot_listed.Video):
            times = place.begin + self.timestamps[indices]
            tolerance = self.tolerance_s or _NEAREST / self.fps
            return video_lib.frames(place.file, times, indices, tolerance=tolerance)
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
    except (pa.ArrowException, OSError, LookupError) as error:  # the last: it has become shorter
        raise FrameError(path, None, f"unreadable: {error}") from error


def _named_files(place):
    """Returns the files of the images that the rows of an `Images` name and do not hold.

    Where they do hold them, the names are those of before, and reading the images takes long.
    """
    try:
        with pq.ParquetFile(place.file) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
            names = f"{place.key}.path" if f"{place.key}.path" in leaves else place.key
            if _holds(file, leaves, f"{place.key}.bytes"):
                return ()
            table = file.read(columns=[names]).slice(place.first, place.stop - place.first)
            cells = table.column(place.key).to_pylist()
    except (pa.ArrowException, OSError):  # whoever reads the images says why
        return ()
    paths = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    return tuple(place.root / path for path in paths if isinstance(path, str))


def _holds(file, leaves, name):
    """Whether a leaf of an open parquet file has a value, by its statistics; False without one."""
    if name not in leaves:
        return False
    number = leaves.index(name)
    if file.schema.column(number).logical_type.type in ("NULL", "UNKNOWN"):  # only nulls
        return False
    parts = [file.metadata.row_group(i).column(number) for i in range(file.num_row_groups)]
    return any(p.statistics is None or p.statistics.num_values for p in parts)  # nulls aside


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
    listed, unreadable = lerobot_listed.listed(data)
    excluded = [entry for entry in listed if entry.id in config.data.exclude]
    wanted = [entry for entry in listed if entry.id not in config.data.exclude]
    files = data.data_files()
    files = sorted(files - ({entry.data for entry in excluded} - {entry.data for entry in wanted}))
    with concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool:
        loading = pool.map(functools.partial(lerobot_rows.load, data), files)
        bar = tqdm.tqdm(loading, total=len(files), desc="data files", unit="file", delay=1)
        loaded = dict(zip(files, bar))
    tables = {file: rows for file, rows in loaded.items() if isinstance(rows, lerobot_rows.Rows)}
    broken = {file: reason for file, reason in loaded.items() if file not in tables}
    spans = collections.defaultdict(list)
    for file, rows in tables.items():
        for index, first, stop in lerobot_rows.runs(rows.episode_index):
            spans[index].append((file, first, stop))
    found, problems, known = [], [], {entry.index for entry in listed}
    for entry in wanted:
        if faults := [f for f in entry.faults if f.feature in (None, *data.needed)]:
            problems += [Problem.error(f.kind, entry.id, entry.data, f.message) for f in faults]
            continue
        try:
            runs = spans.get(entry.index, ())
            file, first, stop = _span(data, entry, tables, broken, runs, known)
        except BadEpisode as error:
            problems.append(Problem.error(error.kind, entry.id, entry.data, str(error)))
            continue
        rows = tables[file].part(first, stop)
        faults = list(lerobot_checks.faults(data, entry, file, rows))
        problems += faults
        if not any(fault.severity == "error" for fault in faults):
            found.append(_episode(data, entry, file, first, rows))
    problems += [
        Problem.error("excluded", entry.id, entry.data, "as the config says") for entry in excluded
    ]
    problems += lerobot_checks.unlisted(data, listed, broken, spans)
    problems += lerobot_checks.of_the_set(data, listed, tables, unreadable)
    return found, problems


def _span(data, entry, tables, broken, spans, known):
    """Returns (file, first row, row behind the last) of an episode; `BadEpisode`: there are none.

    In v3.0 the column episode_index decides which rows are whose, not the file numbers of meta/:
    LeRobot's first converter to v3.0 wrote wrong ones (corrected in its commit 0d1be72). Before,
    the file is the episode's, and its column has to agree. `known`: the numbers that are listed.
    """
    if data.packed and len(spans) > 1:
        places = ", ".join(f"{file} from row {first} on" for file, first, _ in spans)
        raise BadEpisode("scattered rows", f"its rows lie in several places: {places}")
    if data.packed and spans:
        return spans[0]
    if entry.data in broken:
        raise BadEpisode("unreadable data file", broken[entry.data])
    if entry.data not in tables:
        raise BadEpisode("missing data file", "no such file; copy it again")
    index = tables[entry.data].episode_index
    said = sorted(set(index.tolist()) - (known if data.packed else {entry.index}))
    if said:
        words = ", ".join("no whole number" if i < 0 else str(i) for i in said[:8])
        raise BadEpisode(
            "wrong episode",
            f"its rows say episode_index {words}; expected {entry.index}: correct the column (and "
            "task_index, where sets were put together), or exclude the episode",
        )
    return entry.data, 0, 0 if data.packed else len(index)


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
        tolerance_s=data.tolerance_s,
        state=rows.state,
        action=rows.action,
        timestamps=rows.timestamp,
        file=str(file),
        images=images,
    )
