"""Images of what a policy looks at and imagines: query attention, future video, image strips.

Everything takes and returns uint8 arrays [..., H, W, 3].
"""

import functools
import math

import numpy as np
from PIL import Image

from lightwam_jax import html_report
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.data.formats import video as video_lib
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.encoders import quality
from lightwam_jax.evaluation import rollout
from lightwam_jax.inference import attention as attention_lib
from lightwam_jax.models import lightwam

# ---- attention -----------------------------------------------------------------------------------


def attention_maps(taps, config):
    """Summary attention of the learned queries: sum over queries of importance times weights.

    Args:
      taps: of `Policy.act(..., return_taps=True)`.
      config: `DataConfig`.

    Returns:
      {"{layer}_{source}": {camera: float32 [B,h,w]}}; over all cameras a map sums to 1.

    Raises:
      ValueError: no attention in the taps (pooling without learned queries).
    """
    found = attention_lib.maps(taps, config)
    if not found:
        raise ValueError(
            "the taps hold no attention: there are no learned queries to draw "
            "without config.model.pooling='learned_query'"
        )
    maps = {}
    for name, grid in found.items():
        parts = cameras_lib.split(grid[..., None], config)
        maps[name] = {camera: part[..., 0] for camera, part in parts.items()}
    return maps


def overlay(image, heat, cells, peak=None):
    """Draws a coarse map over an image: what is not attended to turns grey.

    Args:
      image: uint8 [H,W,3].
      heat: float [h,w], part of a map that sums to 1.
      cells: of the whole map, over all cameras; 1 / cells is the average.
      peak: value shown brightest, by default the largest; at least three times the average, so
        that indifferent attention looks indifferent.

    Returns:
      uint8 [H,W,3].
    """
    height, width = image.shape[:2]
    top = max(cells * (heat.max() if peak is None else peak), 3.0)
    strength = np.clip((cells * heat - 0.5) / (top - 0.5), 0, 1).astype(np.float32)
    smooth = Image.fromarray(strength).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey = 0.6 * image.mean(-1, keepdims=True)
    base = grey + (image - grey) * strength
    glow = _palette()[(255 * strength[..., 0]).astype(np.uint8)]
    alpha = 0.6 * strength**0.7
    return np.clip(base * (1 - alpha) + glow * alpha, 0, 255).astype(np.uint8)


@functools.cache
def _palette():
    import matplotlib

    return 255 * matplotlib.colormaps["inferno"](np.linspace(0.1, 0.95, 256))[:, :3]


def attention(policy, observations):
    """Returns `attention_maps` of a list of observations {"images", "state", "prompt"}."""
    rows = policy.config.evaluation.batch  # a size the evaluation has compiled already
    chunks = []
    for start in range(0, len(observations), rows):
        batch = rollout.stack(observations[start : start + rows], rows)
        _, taps = policy.act(*batch, return_taps=True)
        chunks.append(attention_maps(taps, policy.config.data))
    joined = lambda name, camera: np.concatenate([chunk[name][camera] for chunk in chunks])
    return {
        name: {camera: joined(name, camera)[: len(observations)] for camera in maps}
        for name, maps in chunks[0].items()
    }


def attention_grid(policy, observations, edge=None):
    """A row per observation and camera: the image, then the attention of every layer.

    Args:
      policy: `Policy`.
      observations: dicts {"images", "state", "prompt"} as environments give them.
      edge: height of a tile in pixels; None: as a page shows it (`html_report.grid`).

    Returns:
      uint8 [H,W,3].
    """
    maps = attention(policy, observations)
    cameras = policy.config.data.cameras
    rows = []
    for i, observation in enumerate(observations):
        shown = cameras_lib.shown(observation["images"], policy.config.data)
        for camera in cameras:
            tiles = [shown[camera], *(draw_over(shown, maps[name], i)[camera] for name in maps)]
            title = f"“{observation['prompt']}”" if camera == cameras[0] else ""
            rows.append(html_report.Row(tiles, camera, title))
    header = ["layer {}, {}".format(*name.split("_", 1)) for name in maps]
    return html_report.grid(rows, ["", *header], edge)


def draw_over(images, maps, index):
    """`overlay` of every camera, on one scale.

    Args:
      images: {camera: uint8 [H,W,3]}. maps: {camera: [B,h,w]}, one value of `attention_maps`.
      index: row of the maps.
    """
    cells = sum(m[index].size for m in maps.values())
    peak = max(m[index].max() for m in maps.values())
    return {camera: overlay(images[camera], m[index], cells, peak) for camera, m in maps.items()}


# ---- future video --------------------------------------------------------------------------------


def future(policy, windows, seed=0, steps=10):
    """Predicts the future frames of recorded windows and compares.

    Args:
      policy: `Policy`.
      windows: [(episode, start)], at most 64.
      seed, steps: of the solver.

    Returns:
      {"real", "codec", "predicted": uint8 [N,frames,h,w,3] at the predicted resolution, where
      "codec" is what the latent codec can show of the real ones; "psnr", "ssim": {"codec",
      "predicted", "still"}: float [N,frames], the former in dB, against the real frames, where
      "still" repeats the codec's frame 0; "offsets": [frames], raw steps; "valid": bool
      [N,frames], False past the end of an episode; "prompts": [N]}.
    """
    data, factor = policy.config.data, policy.config.loss.downsample
    sizes = (data.num_frames, data.frame_stride, data.action_horizon)
    canvases, valid, now = [], [], []
    for episode, start in windows:
        w = windows_lib.window_at(episode.length, start, *sizes)
        images = {camera: episode.frames(camera, w.frames) for camera in data.cameras}
        canvases.append(policy.canvas(images))
        valid.append(~w.image_is_pad)
        first = {camera: frames[0] for camera, frames in images.items()}
        now.append({"images": first, "state": episode.state[start], "prompt": episode.task})
    canvases = np.stack(canvases)
    observations = rollout.stack(now, len(now))
    latents = lightwam.pool_latents(policy.assets.codec.encode(canvases), factor)
    clips = {
        "codec": policy.assets.codec.decode(latents),
        "predicted": policy.predict_video(*observations, seed, steps),
    }
    clips["still"] = np.repeat(clips["codec"][:, :1], data.video_frames, axis=1)
    real = shrink(encoders_base.to_uint8(canvases), factor)
    measured = {
        measure.__name__: {
            name: np.array([[measure(a, b) for a, b in zip(*pair)] for pair in zip(clip, real)])
            for name, clip in clips.items()
        }
        for measure in (quality.psnr, quality.ssim)
    }
    return {
        "real": real,
        "codec": clips["codec"],
        "predicted": clips["predicted"],
        **measured,
        "offsets": np.arange(data.video_frames) * data.frame_stride,
        "valid": np.stack(valid),
        "prompts": [episode.task for episode, _ in windows],
    }


def future_grid(result, shown, columns=5, edge=None):
    """Real frames, what the codec can show of them, and the imagined ones with PSNR and SSIM.

    Args:
      result: of `future`. shown: which of its windows. columns: frames per row.
      edge: height of a tile in pixels; None: as a page shows it (`html_report.grid`).

    Returns:
      uint8 [H,W,3].
    """
    frames = np.unique(np.linspace(0, len(result["offsets"]) - 1, columns).round().astype(int))
    rows = []
    for i in shown:
        notes = {name: [_quality(result, name, i, k) for k in frames] for name in result["psnr"]}
        notes["predicted"][0] = "given"
        rows += [
            html_report.Row(result["real"][i, frames], "real", f"“{result['prompts'][i]}”"),
            html_report.Row(result["codec"][i, frames], "codec limit", "", notes["codec"]),
            html_report.Row(result["predicted"][i, frames], "imagined", "", notes["predicted"]),
        ]
    return html_report.grid(rows, [_ahead(offset) for offset in result["offsets"][frames]], edge)


def future_video(result, shown, edge=160):
    """Real and imagined frames side by side, a row per window, to play as a video.

    Args:
      result: of `future`. shown: which of its windows. edge: height of a tile in pixels.

    Returns:
      uint8 [frames,H,W,3].
    """
    video = []
    for k, offset in enumerate(result["offsets"]):
        rows = []
        for i in shown:
            tiles = [result["real"][i, k], result["predicted"][i, k]]
            note = _quality(result, "predicted", i, k) if k else "given"
            rows.append(html_report.Row(tiles, "", f"“{result['prompts'][i]}”", ["", note]))
        video.append(html_report.grid(rows, ["real", "imagined"], edge, _ahead(offset)))
    return np.stack(video)


def _ahead(offset):
    return f"+{offset} steps" if offset else "now"


def _quality(result, name, window, frame):
    if not result["valid"][window, frame]:
        return "past the end"
    psnr, ssim = (result[kind][name][window, frame] for kind in ("psnr", "ssim"))
    return f"{psnr:.1f} dB, {ssim:.2f}"


def shrink(frames, factor):
    """Averages uint8 frames [...,H,W,3] over squares of factor x factor pixels."""
    *lead, height, width, channels = frames.shape
    blocks = frames.reshape(*lead, height // factor, factor, width // factor, factor, channels)
    return np.rint(blocks.mean((-4, -2), dtype=np.float32)).astype(np.uint8)


# ---- episodes ------------------------------------------------------------------------------------


def episode_strip(policy, result, video, count=6, edge=None):
    """One episode in one image: all cameras over time, and where the policy looked.

    Args:
      policy: `Policy`.
      result, video: `worker.EpisodeResult`, and what `rollout.replay` returned for it.
      count: columns. edge: of a tile in pixels; None: as a page shows it.

    Returns:
      uint8 [H,W,3].
    """
    cameras = policy.config.data.cameras
    steps = np.asarray(video["frame_steps"])
    frames = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    images = [{camera: video["frames"][camera][k] for camera in cameras} for k in frames]
    images = [cameras_lib.shown(each, policy.config.data) for each in images]
    rows = [html_report.Row([p[camera] for p in images], f"{camera} camera") for camera in cameras]
    if policy.config.model.attends:
        maps = list(attention(policy, video["observations"]).values())[-1]  # last adapter layer
        plans = np.searchsorted(video["plan_steps"], steps[frames], "right") - 1  # those in force
        overlaid = [draw_over(image, maps, plan) for image, plan in zip(images, plans)]
        rows += [html_report.Row([p[camera] for p in overlaid], "attention") for camera in cameras]
    outcome = "solved" if result.success else "not solved"
    title = f"“{result.prompt}”: {outcome} in {result.steps} steps"
    return html_report.grid(rows, [f"step {steps[k]}" for k in frames], edge, title)


def side_by_side(frames, cameras):
    """{camera: uint8 [n,H,W,3]} -> uint8 [n,H,V*W,3], in the order of `cameras`."""
    return np.concatenate([frames[camera] for camera in cameras], axis=2)


def save_mp4(path, frames, fps=10, hold=1.0):
    """Writes uint8 [n,H,W,3] as H.264 that every browser plays.

    Args:
      path: file to write. frames: sides are padded to even numbers. fps: frames per second.
      hold: seconds the last frame stays.
    """
    held = [(0, math.ceil(hold * fps)), (0, 0), (0, 0), (0, 0)]
    frames = np.pad(frames, held, mode="edge")
    video_lib.write(path, frames, fps, crf="20", faststart=True, pad=True)
