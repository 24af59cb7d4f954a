"""LeRobot data sets: v2.0 and v2.1 (a file per episode) and v3.0 (several episodes per file).

Columns are read with pyarrow, images by PyAV or Pillow when they are asked for. What meta/ says
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

from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data.formats import keys as keys_lib
from lightwam_jax.data.formats import lerobot_meta
from lightwam_jax.data.formats import video as video_lib


class Images(typing.NamedTuple):
    """The rows of a parquet file that hold the frames of an episode, encoded one by one."""

    file: pathlib.Path
    key: str
    keys: tuple  # what is read at once: the columns of all cameras that the config names
    first: int
    stop: int
    root: pathlib.Path  # where an image that is a file of its own is looked up


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LeRobotEpisode(episodes_lib.Episode):
    """An `episodes.Episode`; `images` maps a camera to its `Video` or `Images`."""

    id: str
    fps: float
    task: str
    state: np.ndarray
    action: np.ndarray
    task_index: np.ndarray  # int [n], into `tasks`
    tasks: dict
    images: dict
    timestamps: np.ndarray
    file: str

    @property
    def length(self):
        """Steps, and frames per camera."""
        return len(self.action)

    def task_at(self, step):
        """Returns the instruction of a step."""
        return self.tasks[int(self.task_index[step])]

    def video(self, camera):
        """Returns (file, index of its first frame in it) of a camera that is a video, or None."""
        place = self.images.get(camera)
        if not isinstance(place, lerobot_meta.Video):
            return None
        return place.file, round(place.begin * self.fps)

    def frames(self, camera, indices):
        """Returns the frames of one camera at `indices` [k] as uint8 [k, H, W, 3].

        Raises:
          FrameError: a frame is missing, cannot be decoded, or is not at its timestamp.
          KeyError: no such camera; names those there are.
        """
        if camera not in self.images:
            raise KeyError(
                f"episode {self.id} has no camera {camera!r}; it has "
                f"{', '.join(sorted(self.images))}: correct config.data.cameras"
            )
        place, indices = self.images[camera], np.arange(self.length)[indices]
        if isinstance(place, lerobot_meta.Video):
            return video_lib.frames(place.file, place.begin + self.timestamps[indices], indices)
        return _images(place, indices)


def _images(place, indices):
    """Returns the frames of an `Images` at `indices` [k] as uint8 [k, H, W, 3]."""
    cells = _encoded(place.file, place.keys, place.first, place.stop)[place.key]
    wanted, order = np.unique(indices, return_inverse=True)
    found = [_decoded(place, frame, cells[frame]) for frame in wanted.tolist()]
    for frame, pixels in zip(wanted.tolist(), found):
        if pixels.shape != found[0].shape:
            raise episodes_lib.FrameError(
                place.file,
                frame,
                (
                    f"{place.key} is {list(pixels.shape)} here and {list(found[0].shape)} in frame "
                    f"{wanted[0]}"
                ),
            )
    return np.stack(found)[order]


@functools.lru_cache(maxsize=8)
def _encoded(path, keys, first, stop):
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
        raise episodes_lib.FrameError(path, None, f"unreadable: {error}") from error


def _decoded(place, frame, cell):
    """A cell is the encoded image, its path, or a struct of the two with one of them empty."""
    if not isinstance(cell, dict):
        cell = {"path": cell} if isinstance(cell, str) else {"bytes": cell}
    content, path = cell.get("bytes"), cell.get("path")
    try:
        if content is None and path is None:
            raise ValueError("empty")
        if content is None:
            content = (place.root / path).read_bytes()
        return keys_lib.decode_image(content, "rgb")
    except (OSError, ValueError) as error:
        raise episodes_lib.FrameError(place.file, frame, f"{place.key}: {error}") from error


def read(config):
    """Returns (episodes, problems) of config.data.path; see `episodes.read`.

    Raises:
      ValueError: what concerns the whole data set; see `lerobot_meta.open_set`.
    """
    data = lerobot_meta.open_set(config)
    listed = data.listed()
    excluded = [entry for entry in listed if entry.id in config.data.exclude]
    wanted = [entry for entry in listed if entry.id not in config.data.exclude]
    files = sorted(
        set(data.root.glob(re.sub(r"\{[^}]*\}", "*", data.info["data_path"])))
        - ({entry.data for entry in excluded} - {entry.data for entry in wanted})
    )
    with concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool:
        loading = pool.map(functools.partial(_load, data), files)
        tables = dict(
            zip(
                files, tqdm.tqdm(loading, total=len(files), desc="data files", unit="file", delay=1)
            )
        )
    spans = collections.defaultdict(list)
    for file, rows in tables.items():
        if isinstance(rows, _Rows):
            for index, first, stop in _runs(rows.episode_index):
                spans[index].append((file, first, stop))
    read_ones = [_episode(data, entry, tables, spans.get(entry.index, ())) for entry in wanted]
    problems = [problem for _, faults in read_ones for problem in faults]
    problems += [
        lerobot_meta.problem("excluded", entry.index, entry.data, "as the config says")
        for entry in excluded
    ]
    return (
        [episode for episode, _ in read_ones if episode],
        problems + _unlisted(data, listed, tables, spans),
    )


class _Rows(typing.NamedTuple):
    """The columns of a data file: f32 [n, P], f32 [n, A], f64 [n], int [n] ..."""

    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    frame_index: np.ndarray
    episode_index: np.ndarray
    task_index: np.ndarray


def _load(data, file):
    """Returns the `_Rows` of a data file, or a sentence: why there are none."""
    columns = [*data.state, *data.action, *lerobot_meta.INDEX]
    try:
        with pq.ParquetFile(file) as parquet:
            absent = sorted(set(columns) - set(parquet.schema_arrow.names))
            if absent:
                return f"it has no column {', '.join(absent)}, which meta/info.json promises"
            table = parquet.read(columns=columns, use_threads=False)
        timestamp, *index = (_numbers(table, key).reshape(-1) for key in lerobot_meta.INDEX)
        return _Rows(
            *(
                np.concatenate([_numbers(table, key) for key in keys], 1).astype(np.float32)
                for keys in (data.state, data.action)
            ),
            timestamp.astype(np.float64),
            *(column.astype(np.int64) for column in index),
        )
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


def _episode(data, entry, tables, spans):
    """Returns (`LeRobotEpisode` or None, problems) of an episode whose rows lie in `spans`."""

    # The column episode_index decides which rows are whose, not the file numbers of meta/: those
    # LeRobot's first converter to v3.0 wrote are wrong (mended in its commit 0d1be72).
    def fault(kind, message, file=entry.data):
        return lerobot_meta.problem(kind, entry.index, file, message)

    if not spans and entry.data not in tables:
        return None, [fault("missing data file", "no such file; copy it again")]
    if not spans and isinstance(tables[entry.data], str):
        return None, [fault("unreadable data file", tables[entry.data])]
    if len(spans) > 1:
        return None, [
            fault(
                "scattered rows",
                "its rows lie in several places: "
                + ", ".join(f"{file} from row {first} on" for file, first, _ in spans),
            )
        ]
    file, first, stop = spans[0] if spans else (entry.data, 0, 0)
    rows, length = _Rows(*(column[first:stop] for column in tables[file])), stop - first

    faults = []
    if length not in (0, entry.length):
        faults.append(fault("wrong length", f"{length} rows, meta/ says {entry.length}", file))
    if (np.diff(rows.frame_index) != 1).any():
        faults.append(fault("rows out of order", "frame_index does not count up by one", file))
    if unknown := sorted(set(rows.task_index.tolist()) - set(data.tasks)):
        faults.append(
            fault("unknown task", f"task_index {unknown} of {len(data.tasks)} tasks in meta/", file)
        )
    faults += [
        fault(*found)
        for key in data.needed
        if length and key in entry.videos
        for found in _video_faults(data, entry, key, length)
    ]
    if faults:
        return None, faults
    together = tuple(key for key in data.needed if key not in entry.videos)
    images = {
        camera: entry.videos.get(key)
        or Images(file, key, together if key in together else (key,), first, stop, data.root)
        for camera, key in data.cameras.items()
    }
    return LeRobotEpisode(
        id=entry.id,
        fps=float(data.info["fps"]),
        state=rows.state,
        action=rows.action,
        timestamps=rows.timestamp,
        file=str(file),
        images=images,
        tasks=data.tasks,
        task=data.tasks[int(rows.task_index[0])] if length else "",
        task_index=rows.task_index,
    ), []


def _video_faults(data, entry, key, length):
    """Yields (kind, message, file) for what is wrong with a video; it is not opened."""
    file, frame = entry.videos[key].file, 1 / data.info["fps"]
    if not file.is_file():
        yield "missing video", f"no such file ({key}); copy it again", file
    missing = length * frame - entry.seconds.get(key, np.inf)
    if missing > frame / 2:  # the next episode in the file would be read as the end of this one
        yield (
            "wrong length",
            (
                f"meta/ gives {key} {entry.seconds[key]:.3f} s, {missing:.3f} s "
                f"less than its {length} rows last"
            ),
            file,
        )


def _unlisted(data, listed, tables, spans):
    """Returns a `Problem` for every episode, or data file, that meta/ does not list."""
    known, files = {entry.index for entry in listed}, {entry.data for entry in listed}
    total = data.info.get("total_episodes", 0)
    lost = range(total) if total > len(known) else ()
    return [
        *(
            lerobot_meta.problem(
                "unlisted episode", index, places[0][0], "it has rows, but meta/ does not list it"
            )
            for index, places in sorted(spans.items())
            if index not in known
        ),
        *(
            lerobot_meta.problem(
                "unlisted episode",
                index,
                data.root / "meta",
                f"info.json counts {total} episodes, {len(known)} are listed and not this one",
            )
            for index in lost
            if index not in known and index not in spans
        ),
        *(
            episodes_lib.Problem(
                "error", "unreadable data file", file.stem, str(file), None, reason
            )
            for file, reason in tables.items()
            if isinstance(reason, str) and file not in files
        ),
    ]
