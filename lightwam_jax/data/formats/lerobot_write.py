"""Writes episodes as a LeRobot dataset, v2.1 or v3.0, that LeRobot itself can train on."""

import io
import json
import os
import zlib

import numpy as np
import pyarrow as pa
import tqdm
from PIL import Image

from lightwam_jax import atomic
from lightwam_jax.data.formats import lerobot_layouts, lerobot_meta, lerobot_stats, video

_FRAMES = 64  # held in memory at once
_SAMPLED = 100  # images of an episode that statistics are made of
# A third of the time of zlib's default, for a tenth more bytes.
_PNG = {"format": "PNG", "compress_type": zlib.Z_RLE}


def write(episodes, directory, version="2.1", cameras=(), **options):
    """Writes a whole dataset; its directory is `<directory>.partial` until it is complete.

    Args:
      episodes: iterable of `Episode`s of equal fps and widths.
      directory: that of the new dataset.
      version, cameras, **options: see `Writer`.

    Raises:
      FileExistsError: the directory exists, or the rest of an interrupted writing does.
      ValueError: no episode, one without a step, or one unlike the others.
    """
    directory = os.path.normpath(directory)  # a slash at the end would get into the name below
    growing = f"{directory}.partial"
    for there in (directory, growing):
        if os.path.exists(there):
            raise FileExistsError(f"{there} exists; delete it, or write elsewhere")
    writer = Writer(growing, version, cameras, **options)
    for episode in tqdm.tqdm(episodes, desc="episodes", unit="episode"):
        writer.add(episode)
    if not writer.entries:
        raise ValueError(f"no episode to write into {directory}")
    writer.finish()
    os.rename(growing, directory)


class Writer:
    """A dataset under construction: `add` its episodes, then `finish`.

    Frame i of a video is shown at i / fps, which is also its timestamp.

    Attributes:
      entries: what `add` returned for each episode. A Writer that is given the entries of an
        interrupted one continues it (v2.1 only), as if there had been no interruption.
    """

    def __init__(
        self,
        directory,
        version="2.1",
        cameras=(),
        *,
        videos=True,
        image=lerobot_meta.IMAGE,
        robot_type=None,
        names=None,
        entries=(),
        data_mb=100,
        video_mb=200,
        codec="libx264",
        **encoder,
    ):
        """Begins a dataset, or goes on with one.

        Args:
          directory: that of the dataset.
          version: "2.1", a file per episode, or "3.0", several per file.
          cameras: names of those to write, e.g. ("scene", "wrist"); (): columns only.
          videos: False keeps images without loss, as PNG in the parquet files.
          image: name of a camera's feature.
          robot_type: for readers of the dataset.
          names: {"observation.state" or "action": names of its dimensions}.
          entries: of the episodes that were written before, v2.1 only.
          data_mb, video_mb: size at which v3.0 begins another file.
          codec, encoder: see `video.Writer`.

        Raises:
          ValueError: unknown version.
        """
        layouts = lerobot_layouts.VERSIONS
        if version not in layouts:
            raise ValueError(f"version is {version!r}; expected one of {', '.join(layouts)}")
        self.entries = list(entries)
        self._version, self._robot_type, self._names = version, robot_type, names or {}
        self._keys = {camera: image.replace("{camera}", camera) for camera in cameras}
        self._videos = videos
        self._tasks = {}  # {instruction: task_index}
        self._number_tasks(task for entry in self.entries for task in entry["row"]["tasks"])
        open_video = lambda path, fps: video.Writer(path, fps, codec, **encoder)
        self._layout = layouts[version](directory, open_video, data_mb * 2**20, video_mb * 2**20)

    def add(self, episode):
        """Writes an episode.

        Returns:
          {"row": its place and its tasks, "stats": {feature: {name: list}}}, JSON; that of the
          first also has "form": what all episodes have in common.

        Raises:
          ValueError: an episode without a step, or unlike the first.
        """
        form = self.entries[0]["form"] if self.entries else None
        number = len(self.entries)
        begin = self.entries[-1]["row"]["dataset_to_index"] if self.entries else 0
        _check(episode, form)
        tasks = [episode.task_at(step) for step in range(episode.length)]
        self._number_tasks(tasks)
        columns = _columns(episode, number, begin, [self._tasks[task] for task in tasks])
        kept = self._layout.stats
        stats = {key: lerobot_stats.columns(values, kept) for key, values in columns.items()}
        images, place, shapes = {}, {}, {}
        for camera, key in self._keys.items():
            frames = _Frames(episode, camera, form and form["features"][key]["shape"])
            if self._videos:
                place |= self._layout.video(number, key, frames, episode.fps)
            else:
                images[key] = [_png(image) for chunk in frames for image in chunk]
            stats[key], shapes[key] = frames.stats(kept), frames.shape
        place |= self._layout.rows(number, _table(columns, images))
        row = {
            "episode_index": number,
            "length": episode.length,
            **place,
            "tasks": list(dict.fromkeys(tasks)),
            "dataset_from_index": begin,
            "dataset_to_index": begin + episode.length,
        }
        entry = {"row": row, "stats": lerobot_stats.lists(stats)}
        if not form:
            features = _features(columns, shapes, self._names, self._videos)
            entry["form"] = {"fps": _whole(episode.fps), "features": features}
        self.entries.append(entry)
        return entry

    def finish(self):
        """Writes what is known only at the end: meta/."""
        form, total = self.entries[0]["form"], len(self.entries)
        filmed = list(self._keys.values()) if self._videos else []
        self._layout.finish(self.entries, list(self._tasks))
        features = dict(form["features"])
        for key in filmed:
            features[key] = features[key] | {"info": _video_info(self._layout.first_video(key))}
        info = {
            "codebase_version": f"v{self._version}",
            "robot_type": self._robot_type,
            "total_episodes": total,
            "total_frames": self.entries[-1]["row"]["dataset_to_index"],
            "total_tasks": len(self._tasks),
            "chunks_size": lerobot_layouts.CHUNK,
            "fps": form["fps"],
            "splits": {"train": f"0:{total}"},
            "data_path": self._layout.data_path,
            "video_path": self._layout.video_path if filmed else None,
            **self._layout.counts(total, len(filmed)),
            "features": features,
        }
        atomic.write_json(self._layout.root / "meta" / "info.json", info)

    def _number_tasks(self, tasks):
        for task in tasks:
            self._tasks.setdefault(task, len(self._tasks))


def _bad(episode, reason):
    return ValueError(f"episode {episode.id} {reason}")


def _check(episode, form):
    """Refuses an episode that has no step or is unlike the first, whose `form` is given."""
    length, fps = episode.length, episode.fps
    if not length:
        raise _bad(episode, "has no step; leave it out")
    for key, values in (("observation.state", episode.state), ("action", episode.action)):
        shape = list(values.shape)
        wanted = [length, form["features"][key]["shape"][0] if form else shape[-1]]
        if shape != wanted:
            raise _bad(episode, f"has {key} of shape {shape}, expected {wanted}")
    if form and fps != form["fps"]:
        raise _bad(episode, f"has {fps:g} frames per second, the first {form['fps']:g}")
    if episode.timestamps is not None:
        off = np.abs(episode.timestamps - np.arange(length) / fps).max()
        if off > 0.5 / fps:
            raise _bad(
                episode,
                f"has timestamps up to {off:.3f} s from {fps:g} per second, which LeRobot "
                "requires: resample it",
            )


def _columns(episode, number, begin, task_index):
    """Returns {feature: [n] or [n, D]} without images."""
    steps = np.arange(episode.length, dtype=np.int64)
    return {
        "observation.state": episode.state.astype(np.float32),
        "action": episode.action.astype(np.float32),
        "timestamp": (steps / episode.fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full_like(steps, number),
        "index": begin + steps,
        "task_index": np.array(task_index, np.int64),
    }


def _features(columns, shapes, names, videos):
    """Returns the features of info.json: of columns, and of cameras whose images have `shapes`."""
    features = {}
    for key, values in columns.items():
        shape = list(values.shape[1:]) or [1]
        features[key] = {"dtype": str(values.dtype), "shape": shape, "names": names.get(key)}
    kind, axes = "video" if videos else "image", ["height", "width", "channels"]
    for key, shape in shapes.items():
        features[key] = {"dtype": kind, "shape": shape, "names": axes}
    return features


def _table(columns, images):
    """Returns a table, with the types that Hugging Face's datasets looks for in the metadata."""
    arrays, types = {}, {}
    for key, values in columns.items():
        array, kind = pa.array(values.reshape(-1)), {"dtype": str(values.dtype), "_type": "Value"}
        if values.ndim == 2 and values.shape[1] > 1:  # one number is no list there
            array = pa.FixedSizeListArray.from_arrays(array, values.shape[1])
            kind = {"feature": kind, "length": values.shape[1], "_type": "Sequence"}
        arrays[key], types[key] = array, kind
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for key, encoded in images.items():
        cells = [{"bytes": png, "path": f"frame_{i:06d}.png"} for i, png in enumerate(encoded)]
        arrays[key], types[key] = pa.array(cells, cell), {"_type": "Image"}
    metadata = json.dumps({"info": {"features": types}})
    return pa.table(arrays).replace_schema_metadata({"huggingface": metadata})


class _Frames:
    """The images of a camera of an episode, uint8 [k, H, W, 3] at a time, as they are written.

    Attributes:
      shape: [H, W, 3] that they must have; None until the first gives it.
    """

    def __init__(self, episode, camera, shape):
        self.shape = shape
        self._episode, self._camera = episode, camera
        self._sampled = min(episode.length, _SAMPLED)
        self._counts = np.zeros((3, 256), np.int64)

    def __iter__(self):
        episode = self._episode
        sampled = np.linspace(0, episode.length - 1, self._sampled).round()
        for first in range(0, episode.length, _FRAMES):
            indices = np.arange(first, min(first + _FRAMES, episode.length))
            images = episode.frames(self._camera, indices)
            shape = list(images.shape[1:])
            self.shape = self.shape or shape
            if shape != self.shape:
                raise _bad(
                    episode,
                    f"has images {shape} of camera {self._camera!r}, the first {self.shape}",
                )
            self._counts += lerobot_stats.histogram(images[np.isin(indices, sampled)])
            yield images

    def stats(self, names):
        """Returns the statistics `names` of the images that were written."""
        return lerobot_stats.images(self._counts, self._sampled, names)


def _png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, **_PNG)
    return content.getvalue()


def _whole(number):
    """Returns a float as the int that it is, if it is one."""
    return int(number) if number == int(number) else number


def _video_info(path):
    info = video.probe(path)
    return {
        "video.height": info.height,
        "video.width": info.width,
        "video.codec": info.codec,
        "video.pix_fmt": info.pix_fmt,
        "video.is_depth_map": False,
        "video.fps": _whole(info.fps),
        "video.channels": 3,
        "has_audio": False,
    }
