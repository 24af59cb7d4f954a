"""The episodes that a LeRobot dataset lists: meta/episodes.jsonl, in v3.0 a table.

A line or a row that cannot be used is an episode with faults: it can be excluded like any other.
"""

import pathlib
import typing

from lightwam_jax.data.formats import checked
from lightwam_jax.data.formats.checked import Wrong

_BROKEN = "broken metadata"


class Video(typing.NamedTuple):
    """Where the frames of an episode begin: a file, and seconds into it."""

    file: pathlib.Path
    begin: float


class Fault(typing.NamedTuple):
    """What is wrong with an entry; `feature`: only those who read that one need to know."""

    kind: str
    message: str
    feature: str | None = None


class Listed(typing.NamedTuple):
    """An episode as meta/ describes it: its number, its steps and its files."""

    index: int  # -1: nobody knows
    length: int
    data: pathlib.Path
    videos: dict  # {feature: `Video`}
    seconds: dict  # {feature: duration of the video}, v3.0 only
    place: str = ""  # file, and line or row
    tasks: tuple = ()  # its instructions; () where there are none
    faults: tuple = ()

    @property
    def id(self):
        """The id of the episode."""
        return episode_id(self.index) if self.index >= 0 else self.place.rpartition("/")[2]


def episode_id(index):
    """Returns the id of episode number `index`."""
    return f"episode_{index:06d}"


def listed(data):
    """Returns ([`Listed`] in the order of their numbers, [message about unreadable files]).

    Args:
      data: `lerobot_meta.LeRobotInfo`.

    Raises:
      ValueError: a file of meta/ is missing, or nothing in it can be used.
    """
    entries, faults = _packed(data) if data.packed else (_single(data), [])
    found = list(entries)
    taken = {entry.index for entry in found}
    if taken == {-1}:  # not the list of episodes, or printed over several lines
        raise ValueError(found[0].faults[0].message)
    # Episodes are listed in order: one whose number is unreadable is what stands in its place.
    for i, entry in enumerate(found):
        if entry.index < 0 and i not in taken:
            found[i] = entry._replace(index=i, data=entry.data if data.packed else _file(data, i))
    first, out = {}, []
    for entry in found:
        known = first.setdefault(entry.index, entry) if entry.index >= 0 else entry
        if known is not entry:
            message = f"{entry.place} lists the episode that {known.place} lists"
            entry = entry._replace(faults=(*entry.faults, Fault("duplicate id", message)))
        out.append(entry)
    return sorted(out, key=lambda entry: (entry.index < 0, entry.index)), faults


class _Reader:
    """Reads the values of one entry and keeps what is wrong with them."""

    def __init__(self, entry):
        self.entry, self.faults = entry, []

    def whole(self, key, otherwise=0, feature=None):
        """Returns a whole number, `otherwise` where there is none."""
        return self._get(self.entry.whole, key, otherwise, feature)

    def number(self, key, feature):
        """Returns a number, 0.0 where there is none."""
        return self._get(self.entry.number, key, 0.0, feature)

    def _get(self, read, key, otherwise, feature):
        try:
            return read(key)
        except Wrong as error:
            self.faults.append(Fault(_BROKEN, str(error), feature))
            return otherwise

    def tasks(self):
        """Returns the instructions that the entry names; no fault: the rows decide."""
        value = self.entry.values.get("tasks")
        value = [value] if isinstance(value, str) else value
        return tuple(t for t in value if isinstance(t, str)) if isinstance(value, list) else ()


def _single(data):
    """Yields the `Listed` of v2.0 and v2.1, where the number of an episode names its files."""
    file, lines = data.root / "meta" / "episodes.jsonl", 0
    for entry in checked.json_lines(file):
        lines += 1
        if isinstance(entry, Wrong):
            fault = Fault(_BROKEN, str(entry))
            yield Listed(-1, 0, file, {}, {}, entry.place, (), (fault,))
            continue
        reader = _Reader(entry)
        index, length = reader.whole("episode_index", -1), reader.whole("length")
        videos = {key: Video(_file(data, index, key), 0.0) for key in data.videos()}
        path = _file(data, index) if index >= 0 else file
        more = entry.place, reader.tasks(), tuple(reader.faults)
        yield Listed(index, length, path, videos, {}, *more)
    if not lines:
        raise ValueError(f"{file} lists no episode; copy it again")


def _file(data, index, video=""):
    """Returns the data file of an episode of v2.0 and v2.1, or that of one of its videos."""
    at = {"episode_chunk": index // data.info["chunks_size"], "episode_index": index}
    if video:
        return data.file("video_path", video_key=video, **at)
    return data.file("data_path", **at)


def _packed(data):
    """Returns ([`Listed`], [message about unreadable tables]) of v3.0."""
    directory = data.root / "meta" / "episodes"
    files = sorted(directory.glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{directory} has no parquet file; copy it again")
    found, faults = [], []
    for file in files:
        try:
            entries, names, _ = checked.table(file, lambda name: not name.startswith("stats/"))
            _require(file, names, data)
        except Wrong as error:
            if len(files) == 1:
                raise
            faults.append(str(error))
            continue
        found += [_packed_row(data, entry) for entry in entries]
    if not found:
        raise ValueError(faults[0] if faults else f"{directory} lists no episode; copy it again")
    return found, faults


def _columns(key):
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    return [f"videos/{key}/{part}" for part in parts]


def _require(file, names, data):
    """Raises `Wrong` where a table lacks a column."""
    wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    wanted += [name for key in data.videos() if key in data.needed for name in _columns(key)]
    if absent := [name for name in wanted if name not in names]:
        raise Wrong(f"{file} lacks {', '.join(absent)}; it has {', '.join(names)}")


def _packed_row(data, entry):
    """Returns the `Listed` of a row, which says where the episode lies, camera by camera."""
    reader, videos, seconds = _Reader(entry), {}, {}
    for key in data.videos():
        chunk, number, begin, end = columns = _columns(key)
        if absent := [name for name in columns if entry.absent(name)]:
            message = (
                f"{entry.place} has no {', '.join(absent)}: it was recorded without {key}, or its "
                "video was never encoded"
            )
            reader.faults.append(Fault("missing video", message, key))
            continue
        place = {"chunk_index": reader.whole(chunk, 0, key)}
        place["file_index"] = reader.whole(number, 0, key)
        begin, end = reader.number(begin, key), reader.number(end, key)
        videos[key] = Video(data.file("video_path", video_key=key, **place), begin)
        seconds[key] = end - begin
    index, length = reader.whole("episode_index", -1), reader.whole("length")
    place = {name: reader.whole(f"data/{name}") for name in ("chunk_index", "file_index")}
    more = entry.place, reader.tasks(), tuple(reader.faults)
    return Listed(index, length, data.file("data_path", **place), videos, seconds, *more)
