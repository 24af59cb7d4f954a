"""Writes episodes as a LeRobot data set, v2.1 or v3.0, that LeRobot itself can train on."""

import io
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm
from PIL import Image

from lightwam_jax.data import lerobot_meta, lerobot_stats, video

CHUNK = 1000  # files per directory
_INDEX = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_FRAMES = 64  # held in memory at once
_SAMPLED = 100  # pictures of an episode that statistics are made of


def write(
    episodes,
    directory,
    version="2.1",
    cameras=(),
    *,
    videos=True,
    image=lerobot_meta.IMAGE,
    robot_type=None,
    names=None,
    data_mb=100,
    video_mb=200,
    codec="libx264",
    **encoder,
):
    """Writes a complete data set; until it is, it is called `<directory>.partial`.

    Frame i of a video is shown at i / fps, and that is also its timestamp.

    Args:
      episodes: `Episode`s, one after the other; equal fps and widths. Read once.
      directory: that of the new data set.
      version: "2.1", a file per episode, or "3.0", several per file.
      cameras: names of those to write, e.g. ("scene", "wrist"); (): columns only.
      videos: False keeps pictures without loss, as PNG in the parquet files.
      image: name of a camera's feature.
      robot_type: for readers of the data set.
      names: {"observation.state" or "action": names of its dimensions}.
      data_mb, video_mb: size at which v3.0 begins another file.
      codec, encoder: see `video.Writer`.

    Raises:
      FileExistsError: the directory is there, or the rest of an interrupted writing.
      ValueError: no episode, one without a step, or one unlike the others.
    """
    root, partial = pathlib.Path(directory), pathlib.Path(f"{directory}.partial")
    for there in (root, partial):
        if there.exists():
            raise FileExistsError(f"{there} exists; delete it, or write elsewhere")
    layouts = {"2.1": _Single, "3.0": _Packed}
    if version not in layouts:
        raise ValueError(f"version is {version!r}; expected one of {', '.join(layouts)}")
    keys = {camera: image.replace("{camera}", camera) for camera in cameras}
    layout = layouts[version](
        partial,
        lambda path, fps: video.Writer(path, fps, codec, **encoder),
        data_mb * 2**20,
        video_mb * 2**20,
    )
    features, tasks, shapes, total = {}, {}, {}, 0
    for index, episode in enumerate(tqdm.tqdm(episodes, desc="episodes", unit="episode")):
        _check(episode, features)
        columns = _columns(episode, index, total, tasks)
        stats = {key: lerobot_stats.columns(values) for key, values in columns.items()}
        pictures, written = {}, {}
        for camera, key in keys.items():
            counts = np.zeros((3, 256), np.int64)
            chunks = _watched(episode, camera, counts, shapes)
            if videos:
                written |= layout.video(index, key, chunks, episode.fps)
            else:
                pictures[key] = [_png(picture) for chunk in chunks for picture in chunk]
            stats[key] = lerobot_stats.pictures(counts, min(episode.length, _SAMPLED))
        if not index:
            features |= _features(columns, episode.fps, names or {})
            features |= {
                key: {
                    "dtype": "video" if videos else "image",
                    "shape": list(shapes[camera]),
                    "names": ["height", "width", "channels"],
                }
                for camera, key in keys.items()
            }
        written |= layout.rows(index, _table(columns, pictures))
        layout.listed.append(
            {
                "episode_index": index,
                "length": episode.length,
                **written,
                "tasks": list(dict.fromkeys(map(episode.task_at, range(episode.length)))),
                "dataset_from_index": total,
                "dataset_to_index": total + episode.length,
            }
        )
        layout.stats.append(stats)
        total += episode.length
    if not features:
        raise ValueError(f"no episode to write into {root}")
    layout.finish(tasks)
    if videos:
        for key in keys.values():
            features[key]["info"] = _video_info(layout.first_video(key))
    _json(
        partial / "meta" / "info.json",
        {
            "codebase_version": f"v{version}",
            "robot_type": robot_type,
            "total_episodes": len(layout.listed),
            "total_frames": total,
            "total_tasks": len(tasks),
            "chunks_size": CHUNK,
            "fps": features.pop("fps"),
            "splits": {"train": f"0:{len(layout.listed)}"},
            "data_path": layout.data_path,
            "video_path": layout.video_path if keys and videos else None,
            **layout.counts(len(keys) if videos else 0),
            "features": features,
        },
    )
    os.rename(partial, root)


def _check(episode, features):
    """Refuses an episode that has no step or is unlike the first, whose `features` are given."""

    def bad(reason):
        return ValueError(f"episode {episode.id} {reason}")

    if not episode.length:
        raise bad("has no step; leave it out")
    shapes = {"observation.state": episode.state.shape, "action": episode.action.shape}
    for key, shape in shapes.items():
        width = features[key]["shape"][0] if features else shape[-1]
        if shape != (episode.length, width):
            raise bad(f"has {key} of shape {list(shape)}, expected [{episode.length}, {width}]")
    if features and episode.fps != features["fps"]:
        raise bad(f"has {episode.fps:g} frames per second, the first {features['fps']:g}")
    if episode.timestamps is not None:
        off = np.abs(episode.timestamps - np.arange(episode.length) / episode.fps).max()
        if off > 0.5 / episode.fps:
            raise bad(
                f"has timestamps up to {off:.3f} s from {episode.fps:g} per second, which "
                "LeRobot demands: resample it"
            )


def _columns(episode, index, total, tasks):
    """Returns {feature: [n] or [n, D]} without pictures; new instructions join `tasks`."""
    steps = np.arange(episode.length)
    task = [tasks.setdefault(episode.task_at(step), len(tasks)) for step in range(episode.length)]
    values = {
        "timestamp": steps / episode.fps,
        "frame_index": steps,
        "episode_index": np.full(episode.length, index),
        "index": total + steps,
        "task_index": np.array(task),
    }
    return {
        "observation.state": episode.state.astype(np.float32),
        "action": episode.action.astype(np.float32),
        **{key: values[key].astype(dtype) for key, dtype in _INDEX.items()},
    }


def _features(columns, fps, names):
    """Returns the features of info.json but for cameras, and fps (until it moves to its place)."""
    return {
        "fps": int(fps) if fps == int(fps) else fps,
        **{
            key: {
                "dtype": str(values.dtype),
                "shape": list(values.shape[1:]) or [1],
                "names": names.get(key),
            }
            for key, values in columns.items()
        },
    }


def _table(columns, pictures):
    """Returns a table, with the types that Hugging Face's datasets looks for in the metadata."""
    arrays, types = {}, {}
    for key, values in columns.items():
        array, kind = pa.array(values.reshape(-1)), {"dtype": str(values.dtype), "_type": "Value"}
        if values.ndim == 2 and values.shape[1] > 1:  # one number is no list there
            array = pa.FixedSizeListArray.from_arrays(array, values.shape[1])
            kind = {"feature": kind, "length": values.shape[1], "_type": "Sequence"}
        arrays[key], types[key] = array, kind
    for key, encoded in pictures.items():
        cells = [
            {"bytes": content, "path": f"frame_{i:06d}.png"} for i, content in enumerate(encoded)
        ]
        arrays[key] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        types[key] = {"_type": "Image"}
    return pa.table(arrays).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": types}})}
    )


def _watched(episode, camera, counts, shapes):
    """Yields the pictures of a camera, some at a time; adds sampled ones to `counts` [3, 256].

    The first picture of a camera fixes its shape in `shapes`.
    """
    sampled = np.linspace(0, episode.length - 1, min(episode.length, _SAMPLED)).round()
    for first in range(0, episode.length, _FRAMES):
        indices = np.arange(first, min(first + _FRAMES, episode.length))
        pictures = episode.frames(camera, indices)
        shape = shapes.setdefault(camera, pictures.shape[1:])
        if pictures.shape[1:] != shape:
            raise ValueError(
                f"episode {episode.id} has pictures {list(pictures.shape[1:])} of "
                f"camera {camera!r}, the first {list(shape)}"
            )
        counts += lerobot_stats.histogram(pictures[np.isin(indices, sampled)])
        yield pictures


def _png(picture):
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return content.getvalue()


def _video_info(path):
    info = video.probe(path)
    return {
        "video.height": info.height,
        "video.width": info.width,
        "video.codec": info.codec,
        "video.pix_fmt": info.pix_fmt,
        "video.is_depth_map": False,
        "video.fps": int(info.fps) if info.fps == int(info.fps) else info.fps,
        "video.channels": 3,
        "has_audio": False,
    }


def _lists(tree):
    return {
        key: _lists(value) if isinstance(value, dict) else np.asarray(value).tolist()
        for key, value in tree.items()
    }


def _json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n")


def _json_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class _Layout:
    """Where the files of a data set lie; `listed` and `stats` grow by an entry per episode."""

    def __init__(self, root, open_video, data_bytes, video_bytes):
        self.root, self.open_video = root, open_video
        self.data_bytes, self.video_bytes = data_bytes, video_bytes
        self.listed, self.stats = [], []

    def _place(self, template, **at):
        path = self.root / template.format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _Single(_Layout):
    """v2.1: a parquet file per episode, and a video for each of its cameras."""

    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"

    def rows(self, index, table):
        """Writes the table of an episode; returns nothing to list."""
        pq.write_table(
            table, self._place(self.data_path, episode_chunk=index // CHUNK, episode_index=index)
        )
        return {}

    def video(self, index, key, chunks, fps):
        """Writes the video of an episode; returns nothing to list."""
        path = self._place(
            self.video_path, episode_chunk=index // CHUNK, episode_index=index, video_key=key
        )
        with self.open_video(path, fps) as writer:
            for frames in chunks:
                writer.add(frames)
        return {}

    def first_video(self, key):
        """Returns the path of the first video of a camera."""
        return self._place(self.video_path, episode_chunk=0, episode_index=0, video_key=key)

    def counts(self, cameras):
        """Returns what info.json has beside the fields of both versions."""
        return {
            "total_videos": len(self.listed) * cameras,
            "total_chunks": -(-len(self.listed) // CHUNK),
        }

    def finish(self, tasks):
        """Writes what is known only at the end."""
        meta = self.root / "meta"
        _json_lines(
            meta / "tasks.jsonl", [{"task_index": i, "task": task} for task, i in tasks.items()]
        )
        _json_lines(
            meta / "episodes.jsonl",
            [
                {key: entry[key] for key in ("episode_index", "tasks", "length")}
                for entry in self.listed
            ],
        )
        kept = ("min", "max", "mean", "std", "count")
        _json_lines(
            meta / "episodes_stats.jsonl",
            [
                {
                    "episode_index": i,
                    "stats": _lists(
                        {key: {name: found[name] for name in kept} for key, found in stats.items()}
                    ),
                }
                for i, stats in enumerate(self.stats)
            ],
        )


class _Packed(_Layout):
    """v3.0: files that take one episode after the other until they are large enough."""

    data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

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

    def rows(self, index, table):
        """Writes the table of an episode as a row group; returns where."""
        if self._data and os.path.getsize(self._data.where) >= self.data_bytes:
            self._data.close()
            self._data = None
        if not self._data:
            self._data = pq.ParquetWriter(self._next(self.data_path), table.schema)
        self._data.write_table(table)
        return self._at("data/", "")

    def video(self, index, key, chunks, fps):
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

    def counts(self, cameras):
        """Returns what info.json has beside the fields of both versions."""
        del cameras
        return {
            "data_files_size_in_mb": max(1, round(self.data_bytes / 2**20)),
            "video_files_size_in_mb": max(1, round(self.video_bytes / 2**20)),
        }

    def finish(self, tasks):
        """Closes the open files and writes what is known only at the end."""
        self._data.close()
        for writer in self._videos.values():
            writer.close()
        meta = self.root / "meta"
        here = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows = [
            {
                **entry,
                **here,
                **{
                    f"stats/{key}/{name}": value.tolist()
                    for key in stats
                    for name, value in stats[key].items()
                },
            }
            for entry, stats in zip(self.listed, self.stats)
        ]
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet"
        )
        pq.write_table(_indexed_by_task(tasks), meta / "tasks.parquet")
        _json(meta / "stats.json", _lists(lerobot_stats.joined(self.stats)))


def _indexed_by_task(tasks):
    """Returns the table of instructions, which pandas reads as the index LeRobot expects."""

    def column(name, kind, numpy):
        return {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
