"""Checks of the data part: windows, normalisation, statistics, whole samples, imported caches.

Sizes and counts are read off the files. Those of images alone are in `images.py`.
"""

import functools
import re
import types

import numpy as np

from converters import caches
from converters.parity import images as parity_images
from converters.parity.fixtures import Compare, NotCovered, matching
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
        return self._fixtures.told("h_data/dataset_info.json")

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
        sizes = {"action_dim": "action", "proprio_dim": "observation.state"}
        c = base.get_config("tiny", **{ours: features[x]["shape"][0] for ours, x in sizes.items()})
        c.data.source, c.data.path = "lerobot", str(self.directory / "lerobot")
        c.data.cameras, c.data.delta_mask = cameras, self.delta_mask()
        c.data.layout = "single" if len(cameras) == 1 else "horizontal"
        if "samples" in told:
            frames = told["video_sample_indices"]
            _, _, height, width = told["samples"][0]["video_shape"]
            c.data.canvas, c.data.camera_size = (height, width), (height, width // len(cameras))
            c.data.num_frames, c.data.frame_stride = frames[-1] + 1, frames[1] - frames[0]
            horizon = len(self.arrays("dataset_samples.npz")["0.action"])
            c.data.action_horizon = horizon
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
    data, compare = group.arrays("frame_indices.npz"), Compare("h_data", "frame_indices")
    for key in sorted(data):
        match = re.fullmatch(r"len(\d+)_n(\d+)_s(\d+)_(frame_index|image_is_pad)", key)
        if not match:
            yield NotCovered(f"h_data/frame_indices.npz/{key}")
            continue
        length, count, stride = map(int, match.groups()[:3])
        windows = (
            windows_lib.window_at(length, start, count * stride, stride, 1)
            for start in range(length)
        )
        got = [w.frames if match[4] == "frame_index" else w.image_is_pad for w in windows]
        yield compare.exact(key, got, data[key])


def _delta_mask(group):
    if not group.has("dataset_info.json", "dataset_stats.json"):
        yield NotCovered("h_data/delta_mask.npz, whose mask and statistics are not there")
        return
    data = group.arrays("delta_mask.npz")
    x = actions.zero_padded_deltas(data["raw_action"], data["action_is_pad"], group.delta_mask())
    got = group.normalizer("action").normalize(x)
    yield _relative("delta_mask", "normalized_action", got, data["normalized_action"])


def _normalizers(group):
    data = group.arrays("normalizers.npz")
    table = {key.replace("stat_", "global_"): data[key] for key in matching(data, "stat_*")}
    for key in matching(data, "*.scale"):
        name = key.removesuffix(".scale")
        made = normalize.from_statistics({"x": {"default": table}}, "x", _mode(name, "_"))
        for tensor, got in (
            ("scale", made.scale),
            ("offset", made.offset),
            ("forward", made.normalize(data["x"])),
            ("backward_of_forward", made.inverse(data[f"{name}.forward"])),
        ):
            tensor = f"{name}.{tensor}"
            yield _relative("normalizers", tensor, got, data[tensor])


def _relative(component, tensor, got, expected, tolerance=_EXACT):
    """Compares each number to float32 rounding of itself, or of 1 where it is smaller."""
    size = np.maximum(np.abs(expected), 1)
    compare = Compare("h_data", component)
    return compare(tensor, got / size, expected / size, tolerance=tolerance)


def _libero_postprocess(group):
    data = group.arrays("libero_postprocess.npz")
    denormalized = data["denormalized"]
    if group.has("dataset_stats.json", "dataset_info.json"):
        got = group.normalizer("action").inverse(data["normalized"])
        yield _relative("libero_postprocess", "denormalized", got, denormalized)
    else:
        yield NotCovered("h_data/libero_postprocess.npz/normalized, whose statistics are not there")
    gripper = (denormalized.shape[-1] - 1,)
    for tensor, snap in (("gripper_flipped", False), ("gripper_binarized", True)):
        pair = actions.ActionTransform(gripper_dims=gripper, closed_open=(1, -1), snap=snap)
        got = pair.inverse(denormalized, None)
        yield _relative("libero_postprocess", tensor, got, data[tensor])


# ---- the dataset --------------------------------------------------------------------------------


def _lerobot(group):
    (found, _, problems), told = group.episodes(), group.info()
    compare = Compare("h_data", "lerobot")
    yield compare.none(f"problems {'; '.join(problems)}", len(problems))
    if "episode_lengths" in told:
        lengths = [episode.length for episode in found]
        yield compare.exact("episode_lengths", lengths, told["episode_lengths"])
    if "fps" in told:
        yield compare.exact("fps", [e.fps for e in found], np.full(len(found), told["fps"]))


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
                got_array, wanted = np.array(have[key]), np.array(want[key])
                yield _relative("dataset_stats", f"{name} {key}", got_array, wanted, 1e-6)
            else:
                yield NotCovered(f"h_data/dataset_stats.json/{name}/{key}")
    for key in ("num_episodes", "num_transition"):
        yield Compare("h_data", "dataset_stats").exact(key, got[key], told[key])


def _dataset_info(group):
    told, compare = group.info(), Compare("h_data", "splits")
    for key, want in told.get("splits", {}).items():
        name, fraction = key.rsplit("_", 1)
        count = int(name) if name.isdigit() else len(told["episode_lengths"])
        train, val = episodes_lib.split(range(count), float(fraction))
        for part, numbers in want.items():
            got = {"train": train, "val": val}[re.fullmatch(r"(?:n_)?(train|val).*", part)[1]]
            if part.startswith("n_"):
                got = sum(told["episode_lengths"][i] for i in got)
            elif "first" in part:
                got = got[: len(numbers)]
            yield compare.exact(f"{key} {part}", got, numbers)
    known = {"samples", "norm_mode", "delta_action_dim_mask", "splits", "fps"}
    known |= {"episode_lengths", "video_sample_indices"}
    yield from (NotCovered(f"h_data/dataset_info.json/{key}") for key in sorted(set(told) - known))


def _dataset_samples(group):
    needed = ("lerobot", "dataset_info.json", "dataset_stats.json")
    if not group.has(*needed):
        yield NotCovered(f"h_data/dataset_samples.npz, which needs {', '.join(needed)}")
        return
    data, (found, config, _) = group.arrays("dataset_samples.npz"), group.episodes()
    compare = Compare("h_data", "dataset_samples")
    got = [_sample(found, int(index), config, group) for index in data["index"]]
    for k, fields in enumerate(got):
        for key in [key for key in data if key.startswith(f"{k}.video_frames_")]:
            frames = [int(number) for number in key.split("_")[2:]]
            video, tolerance = parity_images.video(fields["images"](frames), config.data)
            yield compare(key, video, data[key], tolerance=tolerance)
    for field in ("action", "proprio", "action_is_pad", "proprio_is_pad", "image_is_pad"):
        want = np.stack([data[f"{k}.{field}"] for k in range(len(got))])
        have = np.stack([fields[field] for fields in got])
        if want.dtype == bool:
            yield compare.exact(field, have, want)
        else:
            yield _relative("dataset_samples", field, have, want)
    pairs = zip(got, group.info()["samples"], strict=True)
    wrong = sum(fields["prompt"] != sample["prompt"] for fields, sample in pairs)
    yield compare.none("prompts that differ", wrong)
    yield compare.exact("length", sum(episode.length for episode in found), data["length"])
    for key in sorted(set(data) - {"index", "length"}):
        field = key.split(".", 1)[1]
        cached = any(map(group.has, _CACHED.get(field, ())))
        if not (cached or field in got[0] or field.startswith("video_frames_")):
            yield NotCovered(f"h_data/dataset_samples.npz/{key}")


def _sample(found, index, config, group):
    """What sample `index` of the dataset is, by this project."""
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
        pick = lambda camera: np.moveaxis(episode.frames(camera, window.frames[frames]), -1, 1)
        return {camera: pick(camera) for camera in data.cameras}

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
    data, compare = group.arrays("dataset_samples.npz"), Compare("h_data", "text_cache")
    cache = caches.read_text_cache(group.directory / "text_cache")
    prompts = [sample["prompt"] for sample in group.info()["samples"]]
    named = {cache.path(prompt).name for prompt in prompts}
    there = {path.name for path in (group.directory / "text_cache").iterdir()}
    yield compare.none("files of the prompts not there", len(named - there))
    context, mask = cache.table(prompts)
    stacked = lambda field: np.stack([data[f"{k}.{field}"] for k in range(len(prompts))])
    yield compare.exact("context", context, stacked("context"))
    # The release shows attention the zeroed padding too: config.loss.mask_text_padding=False.
    yield compare.exact("context_mask", np.ones_like(mask), stacked("context_mask"))


def _latents(name, group):
    if not group.has("dataset_samples.npz"):
        yield NotCovered(f"h_data/{name}, whose samples are not there")
        return
    data = group.arrays("dataset_samples.npz")
    cache = caches.read_latent_cache(group.directory / name)
    got = [np.moveaxis(cache[int(index)].astype(np.float32), -1, 0) for index in data["index"]]
    want = [data[f"{k}.video_latents"] for k in range(len(got))]
    yield Compare("h_data", name).exact("video_latents", got, want)


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
    "latent_single": functools.partial(_latents, "latent_single"),
    "latent_sharded": functools.partial(_latents, "latent_sharded"),
}
