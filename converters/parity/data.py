"""Checks of the data part: windows, normalisation, statistics, whole samples, imported caches.

Sizes and counts are read off the files. Those of images alone are in `checks_images.py`.
"""

import re
import types

import numpy as np

from converters import caches
from converters.parity import images as parity_images
from converters.parity.fixtures import NotCovered, compare, matching
from lightwam_jax import config as config_lib
from lightwam_jax.data import actions, normalize
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.encoders import text as text_lib

_MODES = {"min/max": "min_max", "z-score": "z_score_reference", "q01/q99": "quantile"}
# Arrays of the samples that come from the reference's caches.
_CACHED = {
    "context": ("text_cache",),
    "context_mask": ("text_cache",),
    "video_latents": ("latent_single", "latent_sharded"),
}
_EXACT = 8 * 2.0**-24  # float32 rounding of a few operations, relative


def h_data(fixtures):
    """Every file of the group; one that is not known is listed."""
    for path in sorted((fixtures.root / "h_data").iterdir()):
        if path.name in _READERS:
            yield from _READERS[path.name](_Group(fixtures))
        else:
            yield NotCovered(f"h_data/{path.name}")


class _Group:
    """The files of the group, and the episodes and config they describe."""

    def __init__(self, fixtures):
        self.directory, self._fixtures = fixtures.root / "h_data", fixtures

    def has(self, *names):
        return all(self._fixtures.has(f"h_data/{name}") for name in names)

    def json(self, name):
        return self._fixtures.json(f"h_data/{name}")

    def arrays(self, name):
        return self._fixtures.arrays(f"h_data/{name}")

    def info(self):
        """dataset_info.json, {} where there is none."""
        return self.json("dataset_info.json") if self.has("dataset_info.json") else {}

    def delta_mask(self):
        mask = self.info().get("delta_action_dim_mask") or {}
        return tuple(value for values in mask.values() for value in values)

    def normalizer(self, name):
        """Of "state" or "action", by dataset_stats.json and the mode of dataset_info.json."""
        return normalize.from_statistics(
            self.json("dataset_stats.json"), name, _mode(self.info()["norm_mode"], "/")
        )

    def config(self):
        """The `Config` that reads the episodes as the samples were made."""
        from configs import base  # its prompt is the release's

        told, features = self.info(), self.json("lerobot/meta/info.json")["features"]
        cameras = tuple(
            name.removeprefix("observation.images.")
            for name, feature in features.items()
            if feature["dtype"] in ("image", "video")
        )
        c = base.get_config(
            "tiny",
            action_dim=features["action"]["shape"][0],
            proprio_dim=features["observation.state"]["shape"][0],
        )
        c.data.update(
            source="lerobot",
            path=str(self.directory / "lerobot"),
            cameras=cameras,
            layout="single" if len(cameras) == 1 else "horizontal",
            delta_mask=self.delta_mask(),
        )
        if "samples" in told:
            frames = told["video_sample_indices"]
            _, _, height, width = told["samples"][0]["video_shape"]
            horizon = len(self.arrays("dataset_samples.npz")["0.action"])
            c.data.update(
                canvas=(height, width),
                camera_size=(height, width // len(cameras)),
                num_frames=frames[-1] + 1,
                frame_stride=frames[1] - frames[0],
                action_horizon=horizon,
            )
            c.evaluation.replan_steps = min(c.evaluation.replan_steps, horizon)
        return config_lib.from_config_dict(c)

    def episodes(self):
        """(episodes, config, lines about what is wrong with them)."""
        config = self.config()
        found, problems = episodes_lib.read(config)
        return found, config, [problem.line() for problem in problems]


def _mode(name, separator):
    """The part of a `DataConfig` for the reference's name of a normalisation."""
    known = {theirs.replace("/", separator): ours for theirs, ours in _MODES.items()}
    if name in known:
        return types.SimpleNamespace(normalization=known[name])
    return types.SimpleNamespace(
        normalization="constants",
        normalization_range=tuple(float(end) for end in name.split(separator)),
    )


# ---- windows and normalisation -------------------------------------------------------------------


def _frame_indices(group):
    data = group.arrays("frame_indices.npz")
    for key in sorted(data):
        match = re.fullmatch(r"len(\d+)_n(\d+)_s(\d+)_(frame_index|image_is_pad)", key)
        if not match:
            yield NotCovered(f"h_data/frame_indices.npz/{key}")
            continue
        length, count, stride = (int(number) for number in match.groups()[:3])
        windows = [
            windows_lib.window_at(length, start, count * stride, stride, 1)
            for start in range(length)
        ]
        got = [w.frames if match[4] == "frame_index" else w.image_is_pad for w in windows]
        yield compare("h_data", "frame_indices", key, got, data[key], tolerance=0.0)


def _delta_mask(group):
    if not group.has("dataset_info.json", "dataset_stats.json"):
        yield NotCovered("h_data/delta_mask.npz, whose mask and statistics are not there")
        return
    data = group.arrays("delta_mask.npz")
    x = actions.zero_padded_deltas(data["raw_action"], data["action_is_pad"], group.delta_mask())
    yield _relative(
        "delta_mask",
        "normalized_action",
        group.normalizer("action").normalize(x),
        data["normalized_action"],
    )


def _normalizers(group):
    data = group.arrays("normalizers.npz")
    table = {key.replace("stat_", "global_"): data[key] for key in matching(data, "stat_*")}
    for key in matching(data, "*.scale"):
        name = key.removesuffix(".scale")
        made = normalize.from_statistics({"x": {"default": table}}, "x", _mode(name, "_"))
        forward = data[f"{name}.forward"]
        for tensor, got in (
            ("scale", made.scale),
            ("offset", made.offset),
            ("forward", made.normalize(data["x"])),
            ("backward_of_forward", made.inverse(forward)),
        ):
            yield _relative("normalizers", f"{name}.{tensor}", got, data[f"{name}.{tensor}"])


def _relative(component, tensor, got, expected, tolerance=_EXACT):
    """Compares each number to float32 rounding of itself, or of 1 where it is smaller."""
    size = np.maximum(np.abs(expected), 1)
    return compare("h_data", component, tensor, got / size, expected / size, tolerance=tolerance)


def _libero_postprocess(group):
    data = group.arrays("libero_postprocess.npz")
    if group.has("dataset_stats.json", "dataset_info.json"):
        yield _relative(
            "libero_postprocess",
            "denormalized",
            group.normalizer("action").inverse(data["normalized"]),
            data["denormalized"],
        )
    else:
        yield NotCovered("h_data/libero_postprocess.npz/normalized, whose statistics are not there")
    gripper = (data["denormalized"].shape[-1] - 1,)
    for tensor, snap in (("gripper_flipped", False), ("gripper_binarized", True)):
        pair = actions.ActionTransform(gripper_dims=gripper, closed_open=(1, -1), snap=snap)
        yield _relative(
            "libero_postprocess", tensor, pair.inverse(data["denormalized"], None), data[tensor]
        )


# ---- the data set --------------------------------------------------------------------------------


def _lerobot(group):
    found, _, problems = group.episodes()
    yield compare(
        "h_data", "lerobot", f"problems {'; '.join(problems)}", len(problems), 0, tolerance=0.0
    )
    told = group.info()
    if "episode_lengths" in told:
        yield compare(
            "h_data",
            "lerobot",
            "episode_lengths",
            [e.length for e in found],
            told["episode_lengths"],
            tolerance=0.0,
        )
    if "fps" in told:
        yield compare(
            "h_data",
            "lerobot",
            "fps",
            [e.fps for e in found],
            np.full(len(found), told["fps"]),
            tolerance=0.0,
        )


def _dataset_stats(group):
    if not group.has("lerobot"):
        yield NotCovered("h_data/dataset_stats.json, whose episodes are not there")
        return
    told, (found, _, _) = group.json("dataset_stats.json"), group.episodes()
    horizon = len(normalize.table_of(told, "action")["stepwise_min"])
    got = normalize.fit_statistics(found, horizon)
    for name in ("state", "action"):
        want, have = normalize.table_of(told, name), normalize.table_of(got, name)
        for key in sorted(want):
            if key in have:
                yield _relative(
                    "dataset_stats",
                    f"{name} {key}",
                    np.array(have[key]),
                    np.array(want[key]),
                    tolerance=1e-6,
                )
            else:
                yield NotCovered(f"h_data/dataset_stats.json/{name}/{key}")
    for key in ("num_episodes", "num_transition"):
        yield compare("h_data", "dataset_stats", key, got[key], told[key], tolerance=0.0)


def _dataset_info(group):
    told = group.info()
    for key, want in told.get("splits", {}).items():
        name, fraction = key.rsplit("_", 1)
        count = int(name) if name.isdigit() else len(told["episode_lengths"])
        train, val = episodes_lib.split(range(count), float(fraction))
        got = {"train": train, "val": val}
        for part, numbers in want.items():
            ids = got[re.fullmatch(r"(?:n_)?(train|val).*", part)[1]]
            got_part = (
                sum(told["episode_lengths"][i] for i in ids)
                if part.startswith("n_")
                else ids[: len(numbers)]
                if "first" in part
                else ids
            )
            yield compare("h_data", "splits", f"{key} {part}", got_part, numbers, tolerance=0.0)
    known = {
        "samples",
        "norm_mode",
        "delta_action_dim_mask",
        "splits",
        "fps",
        "episode_lengths",
        "video_sample_indices",
    }
    yield from (NotCovered(f"h_data/dataset_info.json/{key}") for key in sorted(set(told) - known))


def _dataset_samples(group):
    needed = ("lerobot", "dataset_info.json", "dataset_stats.json")
    if not group.has(*needed):
        yield NotCovered(f"h_data/dataset_samples.npz, which needs {', '.join(needed)}")
        return
    data, told, (found, config, _) = (
        group.arrays("dataset_samples.npz"),
        group.info(),
        group.episodes(),
    )
    got = [_sample(found, int(index), config, group) for index in data["index"]]
    for k, fields in enumerate(got):
        for key in [key for key in data if key.startswith(f"{k}.video_frames_")]:
            frames = [int(number) for number in key.split("_")[2:]]
            video, tolerance = parity_images.video(fields["images"](frames), config.data)
            yield compare("h_data", "dataset_samples", key, video, data[key], tolerance=tolerance)
    for field in ("action", "proprio", "action_is_pad", "proprio_is_pad", "image_is_pad"):
        want = np.stack([data[f"{k}.{field}"] for k in range(len(got))])
        have = np.stack([fields[field] for fields in got])
        if want.dtype == bool:
            yield compare("h_data", "dataset_samples", field, have, want, tolerance=0.0)
        else:
            yield _relative("dataset_samples", field, have, want)
    wrong = sum(
        fields["prompt"] != sample["prompt"]
        for fields, sample in zip(got, told["samples"], strict=True)
    )
    yield compare("h_data", "dataset_samples", "prompts that differ", wrong, 0, tolerance=0.0)
    yield compare(
        "h_data",
        "dataset_samples",
        "length",
        sum(e.length for e in found),
        data["length"],
        tolerance=0.0,
    )
    for key in sorted(set(data) - {"index", "length"}):
        field = key.split(".", 1)[1]
        if not (
            field in got[0]
            or field.startswith("video_frames_")
            or any(map(group.has, _CACHED.get(field, ())))
        ):
            yield NotCovered(f"h_data/dataset_samples.npz/{key}")


def _sample(found, index, config, group):
    """What sample `index` of the data set is, by this project."""
    data, ends = config.data, np.cumsum([episode.length for episode in found])
    episode = found[int(np.searchsorted(ends, index, side="right"))]
    start = index - int(ends[found.index(episode)]) + episode.length
    window = windows_lib.window_at(
        episode.length, start, data.num_frames, data.frame_stride, data.action_horizon
    )
    states = windows_lib.window_at(episode.length, start, data.num_frames, 1, data.num_frames - 1)
    x = actions.from_config(config).forward(
        episode.action[window.actions], episode.state[start], window.action_is_pad
    )

    def images(frames):
        chosen = window.frames[frames]
        return {
            camera: np.moveaxis(episode.frames(camera, chosen), -1, 1) for camera in data.cameras
        }

    return {
        "action": group.normalizer("action").normalize(x),
        "proprio": group.normalizer("state").normalize(episode.state[states.actions]),
        "action_is_pad": window.action_is_pad,
        "image_is_pad": window.image_is_pad,
        "proprio_is_pad": states.image_is_pad,
        "images": images,
        "prompt": text_lib.prompt(episode.task_at(start), data.prompt_template),
    }


# ---- the reference's caches ----------------------------------------------------------------------


def _text_cache(group):
    if not group.has("dataset_samples.npz", "dataset_info.json"):
        yield NotCovered("h_data/text_cache, whose prompts are not there")
        return
    data = group.arrays("dataset_samples.npz")
    cache = caches.read_text_cache(group.directory / "text_cache")
    prompts = [sample["prompt"] for sample in group.info()["samples"]]
    named = {cache.path(prompt).name for prompt in prompts}
    there = {path.name for path in (group.directory / "text_cache").iterdir()}
    yield compare(
        "h_data",
        "text_cache",
        "files of the prompts not there",
        len(named - there),
        0,
        tolerance=0.0,
    )
    context, mask = cache.table(prompts)
    yield compare(
        "h_data",
        "text_cache",
        "context",
        context.astype(np.float32),
        np.stack([data[f"{k}.context"] for k in range(len(prompts))]),
        tolerance=0.0,
    )
    # The release shows attention the zeroed padding too: config.loss.mask_text_padding=False.
    yield compare(
        "h_data",
        "text_cache",
        "context_mask",
        np.ones_like(mask),
        np.stack([data[f"{k}.context_mask"] for k in range(len(prompts))]),
        tolerance=0.0,
    )


def _latents(name):
    def check(group):
        if not group.has("dataset_samples.npz"):
            yield NotCovered(f"h_data/{name}, whose samples are not there")
            return
        data = group.arrays("dataset_samples.npz")
        cache = caches.read_latent_cache(group.directory / name)
        got = [np.moveaxis(cache[int(index)].astype(np.float32), -1, 0) for index in data["index"]]
        want = [data[f"{k}.video_latents"] for k in range(len(got))]
        yield compare("h_data", name, "video_latents", got, want, tolerance=0.0)

    return check


_READERS = {
    "libero_image.npz": parity_images.libero_image,
    "robotwin_image.npz": parity_images.robotwin_image,
    "small_images.npz": parity_images.small_images,
    "uint8_roundtrip.npz": parity_images.uint8_roundtrip,
    "frame_indices.npz": _frame_indices,
    "delta_mask.npz": _delta_mask,
    "normalizers.npz": _normalizers,
    "libero_postprocess.npz": _libero_postprocess,
    "lerobot": _lerobot,
    "dataset_stats.json": _dataset_stats,
    "dataset_info.json": _dataset_info,
    "dataset_samples.npz": _dataset_samples,
    "text_cache": _text_cache,
    "latent_single": _latents("latent_single"),
    "latent_sharded": _latents("latent_sharded"),
}
