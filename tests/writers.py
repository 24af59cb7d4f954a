"""Writes episodes as robots' HDF5 and RLDS data lie on disk; shared by the tests of the data part.

Each returns the config keys that read them back: `synthetic.make_config(directory, **keys)`.
"""

import io
import json
import struct
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


def encoded(pixels, image="jpeg"):
    """Returns uint8 [H, W, 3] as the bytes of a JPEG (quality 95, like OpenCV's) or PNG file."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, image, **({"quality": 95} if image == "jpeg" else {}))
    return out.getvalue()


def robomimic(directory, episodes, cameras=("scene", "wrist")):
    """All episodes as groups of one file, in robomimic's layout: raw images, JSON attributes.

    The last dimension of the state is a dataset of its own, [n].
    """
    path = Path(directory) / "robomimic"
    path.mkdir(parents=True)
    with h5py.File(path / "demonstrations.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["ep_meta"] = json.dumps({"lang": episode.task})
            demo["actions"] = episode.action
            demo["obs/pose"], demo["obs/gripper"] = episode.state[:, :-1], episode.state[:, -1]
            for camera in cameras:
                demo[f"obs/{camera}_image"] = episode.frames(camera, np.arange(episode.length))
    return {
        "data.source": "hdf5",
        "data.path": str(path),
        "data.cameras": tuple(cameras),
        "data.fields.episodes": "data/demo_*",
        "data.fields.state": ("obs/pose", "obs/gripper"),
        "data.fields.action": ("actions",),
        "data.fields.image": "obs/{camera}_image",
        "data.fields.task": "@ep_meta#/lang",
        "data.fields.fps": episodes[0].fps,
    }


def robotwin(directory, episodes, cameras=("scene", "wrist")):
    """A file per episode, in RoboTwin's layout.

    JPEGs with red and blue swapped in fixed-length strings, instructions in JSON files, and one
    vector of n + 1 rows whose row t + 1 holds the action of step t. (In RoboTwin the state is the
    same numbers as the action; here it has its own, in front.)
    """
    path = Path(directory) / "robotwin"
    (path / "data").mkdir(parents=True)
    (path / "instructions").mkdir()
    for number, episode in enumerate(episodes):
        last = np.minimum(np.arange(episode.length + 1), episode.length - 1)
        with h5py.File(path / f"data/episode{number}.hdf5", "w") as file:
            vector = np.concatenate([episode.state[last], episode.action[last - 1]], axis=1)
            vector[1:, episode.state.shape[1] :] = episode.action
            file["joint_action/vector"] = vector.astype(np.float64)
            for camera in cameras:
                images = [encoded(p[..., ::-1]) for p in episode.frames(camera, last)]
                file[f"observation/{camera}/rgb"] = np.array(images)  # dtype S: zero-padded
        (path / f"instructions/episode{number}.json").write_text(
            json.dumps({"seen": [episode.task], "unseen": ["something else"]}), encoding="utf-8"
        )
    width = episodes[0].state.shape[1]
    return {
        "data.source": "hdf5",
        "data.path": str(path / "data"),
        "data.cameras": tuple(cameras),
        "data.fields.state": (f"joint_action/vector[:-1, :{width}]",),
        "data.fields.action": (f"joint_action/vector[1:, {width}:]",),
        "data.fields.image": "observation/{camera}/rgb[:-1]",
        "data.fields.task": "file:../instructions/{name}.json#/seen/0",
        "data.fields.fps": episodes[0].fps,
        "data.fields.channel_order": "bgr",
    }


def rlds(
    directory, episodes, cameras=("scene", "wrist"), image="jpeg", shard=3, file_format="tfrecord"
):
    """A TFDS dataset of nested steps in shards of `shard` episodes, as OpenX data lie."""
    path = Path(directory) / "rlds" / "1.0.0"
    path.mkdir(parents=True)
    first = episodes[0]
    numbers = lambda values: tfds.features.Tensor(shape=values.shape[1:], dtype=np.float32)
    images = {camera: tfds.features.Image(encoding_format=image) for camera in cameras}
    step = {
        "observation": {"state": numbers(first.state), **images},
        "action": numbers(first.action),
        "is_last": np.bool_,
        "language_instruction": tfds.features.Text(),
    }
    about = {"file_path": tfds.features.Text()}
    features = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": about}
    )
    records = [features.serialize_example(_rlds_example(e, cameras, image)) for e in episodes]
    shards = [records[i : i + shard] for i in range(0, len(records), shard)]
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="robot", version="1.0.0", data_dir=str(path), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format(file_format)
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name="robot", split="train", filetype_suffix=file_format
    )
    train = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(s) for s in shards],
        filename_template=template,
        num_bytes=sum(map(len, records)),
    )
    info.set_splits(tfds.core.splits.SplitDict([train]))
    info.write_to_directory(path)
    for file, content in zip(sorted(template.sharded_filepaths(len(shards))), shards):
        if file_format == "tfrecord":
            file.write_bytes(b"".join(map(tfrecord, content)))
        else:
            from array_record.python import array_record_module

            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for record in content:
                writer.write(record)
            writer.close()
    return {
        "data.source": "rlds",
        "data.path": str(path),
        "data.cameras": tuple(cameras),
        "data.fields.fps": first.fps,
    }


def tfrecord(record):
    """Returns a record in its frame: length, its checksum, the record, its checksum."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _masked(length), record, _masked(record)))


def _masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _rlds_example(episode, cameras, image):
    frames = {c: episode.frames(c, np.arange(episode.length)) for c in cameras}
    return {
        "episode_metadata": {"file_path": "somewhere.hdf5"},
        "steps": [
            {
                "observation": {
                    "state": episode.state[i],
                    **{c: encoded(frames[c][i], image) for c in cameras},
                },
                "action": episode.action[i],
                "is_last": i == episode.length - 1,
                "language_instruction": episode.task_at(i),
            }
            for i in range(episode.length)
        ],
    }
