"""Where the files of a LeRobot dataset lie, and what its meta/ holds: v2.1 and v3.0."""

import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from lightwam_jax import atomic
from lightwam_jax.data.formats import lerobot_stats

CHUNK = 1000  # files per directory


class _Layout:
    """What both share: `open_video(path, fps)` returns a `video.Writer`; the sizes are v3.0's."""

    def __init__(self, root, open_video, data_bytes, video_bytes):
        self.root, self.open_video = pathlib.Path(root), open_video
        self.data_bytes, self.video_bytes = data_bytes, video_bytes

    def _place(self, template, **at):
        path = self.root / template.format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Single(_Layout):
    """v2.1: a parquet file per episode, and a video for each of its cameras.

    Each file is complete or missing, so that a killed writing can go on with the next episode.
    """

    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    stats = lerobot_stats.BASIC

    def _of(self, template, number, key=""):
        at = {"episode_chunk": number // CHUNK, "episode_index": number, "video_key": key}
        return self._place(template, **at)

    def rows(self, number, table):
        """Writes the table of an episode; returns nothing to list."""
        with atomic.writing(self._of(self.data_path, number), sync=False) as path:
            pq.write_table(table, path)
        return {}

    def video(self, number, key, chunks, fps):
        """Writes the video of an episode; returns nothing to list."""
        path = self._of(self.video_path, number, key)
        with (
            atomic.writing(path, sync=False) as partial,
            self.open_video(partial, fps) as writer,
        ):
            for frames in chunks:
                writer.add(frames)
        return {}

    def first_video(self, key):
        """Returns the path of the first video of a camera."""
        return self._of(self.video_path, 0, key)

    def counts(self, episodes, cameras):
        """Returns what info.json has beside the fields of both versions."""
        return {"total_videos": episodes * cameras, "total_chunks": -(-episodes // CHUNK)}

    def finish(self, entries, tasks):
        """Writes what is known only at the end; see `lerobot_write.Writer` for the entries."""
        listed, numbered = ("episode_index", "tasks", "length"), list(enumerate(entries))
        lines = {
            "tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)],
            "episodes": [{key: entry["row"][key] for key in listed} for entry in entries],
            "episodes_stats": [{"episode_index": i, "stats": e["stats"]} for i, e in numbered],
        }
        for name, content in lines.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
            self._place(f"meta/{name}.jsonl").write_text(text, encoding="utf-8")


class Packed(_Layout):
    """v3.0: files that take one episode after the other until they are large enough."""

    data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    stats = lerobot_stats.ALL

    def __init__(self, *args):
        super().__init__(*args)
        self._data = None
        self._videos = {}  # by feature: the open writer
        self._numbers = {}  # by feature, "" for the data: number of the current file

    def _next(self, template, key=""):
        self._numbers[key] = self._numbers.get(key, -1) + 1
        return self._place(template, video_key=key, **self._at("", key))

    def _at(self, prefix, key):
        chunk, file = divmod(self._numbers[key], CHUNK)
        return {f"{prefix}chunk_index": chunk, f"{prefix}file_index": file}

    def rows(self, number, table):
        """Writes the table of an episode as a row group; returns where."""
        if self._data and os.path.getsize(self._data.where) >= self.data_bytes:
            self._data.close()
            self._data = None
        if not self._data:
            self._data = pq.ParquetWriter(self._next(self.data_path), table.schema)
        self._data.write_table(table)
        return self._at("data/", "")

    def video(self, number, key, chunks, fps):
        """Appends the video of an episode; returns where."""
        writer = self._videos.get(key)
        if writer and writer.bytes >= self.video_bytes:
            writer.close()
            writer = None
        if not writer:
            writer = self._videos[key] = self.open_video(self._next(self.video_path, key), fps)
        begin = writer.frames
        for frames in chunks:
            writer.add(frames, keyframe=writer.frames == begin)
        return {
            **self._at(f"videos/{key}/", key),
            f"videos/{key}/from_timestamp": begin / fps,
            f"videos/{key}/to_timestamp": writer.frames / fps,
        }

    def first_video(self, key):
        """Returns the path of the first video of a camera."""
        return self._place(self.video_path, video_key=key, chunk_index=0, file_index=0)

    def counts(self, episodes, cameras):
        """Returns what info.json has beside the fields of both versions."""
        return {
            "data_files_size_in_mb": max(1, round(self.data_bytes / 2**20)),
            "video_files_size_in_mb": max(1, round(self.video_bytes / 2**20)),
        }

    def finish(self, entries, tasks):
        """Closes the open files and writes what is known only at the end."""
        self._data.close()
        for writer in self._videos.values():
            writer.close()
        here = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows = []
        for entry in entries:
            rows.append(entry["row"] | here)
            for key, found in entry["stats"].items():
                rows[-1] |= {f"stats/{key}/{name}": value for name, value in found.items()}
        file = self._place("meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.Table.from_pylist(rows), file)
        pq.write_table(_indexed_by_task(tasks), self._place("meta/tasks.parquet"))
        stats = lerobot_stats.joined([entry["stats"] for entry in entries])
        atomic.write_json(self._place("meta/stats.json"), lerobot_stats.lists(stats))


VERSIONS = {"2.1": Single, "3.0": Packed}


def _indexed_by_task(tasks):
    """Returns the table of instructions, which pandas reads as the index LeRobot expects."""

    def column(name, kind, numpy):
        types = {"pandas_type": kind, "numpy_type": numpy}
        return {"name": name, "field_name": name, **types, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
