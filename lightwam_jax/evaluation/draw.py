"""Images of what a policy looks at and imagines: query attention, future video, image strips.

Everything takes and returns uint8 arrays [..., H, W, 3]; `save_png` and `save_mp4` write them.
"""

import functools
import math
import typing

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.encoders import base as encoders_base
from lightwam_jax.encoders import quality
from lightwam_jax.models import lightwam

INK, SOFT, PAPER = (29, 39, 51), (93, 107, 124), (255, 255, 255)
GAP = 8  # pixels between images


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
    names = [name.removeprefix("attention_") for name in taps if name.startswith("attention_")]
    if not names:
        raise ValueError(
            "the taps hold no attention: there are no learned queries to draw "
            "without config.model.pooling='learned_query'"
        )
    cell = 2 * encoders_base.STRIDES[config.codec]  # the backbone reads patches of 2x2 latent cells
    height, width = (side // cell for side in config.canvas)
    maps = {}
    for name in names:
        weights, importance = taps[f"attention_{name}"], taps[f"query_importance_{name}"]
        summary = np.einsum("q,bqs->bs", importance, weights)
        grid = summary.reshape(-1, height, width, 1).astype(np.float32)
        parts = cameras_lib.split(grid, config)
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
        chunk = observations[start : start + rows]
        chunk = chunk + chunk[:1] * (rows - len(chunk))
        images = {c: np.stack([o["images"][c] for o in chunk]) for c in policy.config.data.cameras}
        state = np.stack([o["state"] for o in chunk])
        _, taps = policy.act(images, state, [o["prompt"] for o in chunk], return_taps=True)
        chunks.append(attention_maps(taps, policy.config.data))
    return {
        name: {
            camera: np.concatenate([chunk[name][camera] for chunk in chunks])[: len(observations)]
            for camera in maps
        }
        for name, maps in chunks[0].items()
    }


def attention_grid(policy, observations, images=None, edge=168):
    """A row per observation: for each camera the image, then the attention of every layer.

    Args:
      policy: `Policy`.
      observations: dicts {"images", "state", "prompt"} as environments give them.
      images: per observation {camera: uint8 [H,W,3]}, sharper than what the policy sees; or None.
      edge: height of a tile in pixels.

    Returns:
      uint8 [H,W,3].
    """
    maps = attention(policy, observations)
    cameras = policy.config.data.cameras
    rows = []
    for i, observation in enumerate(observations):
        shown = cameras_lib.shown(
            images[i] if images else observation["images"], policy.config.data
        )
        for camera in cameras:
            tiles = [shown[camera], *(draw_over(shown, maps[name], i)[camera] for name in maps)]
            title = f"“{observation['prompt']}”" if camera == cameras[0] else ""
            rows.append(Row(tiles, camera, title))
    names = [name.split("_", 1) for name in maps]
    return grid(rows, ["", *(f"layer {layer}, {source}" for layer, source in names)], edge)


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
    canvases, first, valid, state = [], [], [], []
    for episode, start in windows:
        w = windows_lib.window_at(
            episode.length, start, data.num_frames, data.frame_stride, data.action_horizon
        )
        images = {camera: episode.frames(camera, w.frames) for camera in data.cameras}
        canvases.append(policy.canvas(images))
        first.append({camera: frames[0] for camera, frames in images.items()})
        valid.append(~w.image_is_pad)
        state.append(episode.state[start])
    canvases = np.stack(canvases)
    images = {camera: np.stack([each[camera] for each in first]) for camera in data.cameras}
    prompts = [episode.task for episode, _ in windows]
    latents = lightwam.pool_latents(policy.assets.codec.encode(canvases), factor)
    clips = {
        "codec": policy.assets.codec.decode(latents),
        "predicted": policy.predict_video(images, np.stack(state), prompts, seed, steps),
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
        "prompts": prompts,
    }


def future_grid(result, shown, columns=5, edge=112):
    """Real frames, what the codec can show of them, and the imagined ones with PSNR and SSIM.

    Args:
      result: of `future`. shown: which of its windows. columns: frames per row.
      edge: height of a tile in pixels.

    Returns:
      uint8 [H,W,3].
    """
    frames = np.unique(np.linspace(0, len(result["offsets"]) - 1, columns).round().astype(int))
    rows = []
    for i in shown:
        notes = {name: [_quality(result, name, i, k) for k in frames] for name in result["psnr"]}
        notes["predicted"][0] = "given"
        rows += [
            Row(result["real"][i, frames], "real", f"“{result['prompts'][i]}”"),
            Row(result["codec"][i, frames], "codec limit", "", notes["codec"]),
            Row(result["predicted"][i, frames], "imagined", "", notes["predicted"]),
        ]
    header = ["now" if offset == 0 else f"+{offset} steps" for offset in result["offsets"][frames]]
    return grid(rows, header, edge)


def future_video(result, shown, edge=160):
    """Real and imagined frames side by side, a row per window, to play as a video.

    Args:
      result: of `future`. shown: which of its windows. edge: height of a tile in pixels.

    Returns:
      uint8 [frames,H,W,3].
    """
    video = []
    for k, offset in enumerate(result["offsets"]):
        rows = [
            Row(
                [result["real"][i, k], result["predicted"][i, k]],
                "",
                f"“{result['prompts'][i]}”",
                ["", "given" if k == 0 else _quality(result, "predicted", i, k)],
            )
            for i in shown
        ]
        video.append(
            grid(rows, ["real", "imagined"], edge, "now" if offset == 0 else f"+{offset} steps")
        )
    return np.stack(video)


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


# ---- grids, strips, videos -----------------------------------------------------------------------


class Row(typing.NamedTuple):
    """One row of a grid: tiles uint8 [h,w,3], a label left of it, a title above, notes below."""

    tiles: list
    label: str = ""
    title: str = ""
    notes: tuple = ()


def grid(rows, header=(), edge=128, title=""):
    """Lays out labelled rows of tiles on white.

    Args:
      rows: `Row`s. header: text above each column.
      edge: height of a tile; widths follow.
      title: of the whole image.

    Returns:
      uint8 [H,W,3].
    """
    margin = GAP + max(_width(row.label, 14) for row in rows) + GAP
    tiles = [[_fit(tile, edge) for tile in row.tiles] for row in rows]
    columns = [
        max(line[k].width for line in tiles if k < len(line)) for k in range(max(map(len, tiles)))
    ]
    lefts = [margin + sum(columns[:k]) + GAP * k for k in range(len(columns) + 1)]
    above = [28 if row.title else 0 for row in rows]
    heights = [a + edge + (22 if row.notes else 0) + GAP for row, a in zip(rows, above)]
    top = (40 if title else GAP) + (24 if any(header) else 0)
    width = max(lefts[-1], 2 * GAP + _width(title, 20))
    canvas = Image.new("RGB", (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, INK, _font(20))
    for left, text in zip(lefts, header):
        draw.text((left, top - 22), text, SOFT, _font(14))
    for row, line, lift, height in zip(rows, tiles, above, heights):
        draw.text((GAP, top + 5), row.title, INK, _font(16))
        draw.text((GAP, top + lift + edge // 2 - 9), row.label, SOFT, _font(14))
        for k, tile in enumerate(line):
            canvas.paste(tile, (lefts[k], top + lift))
        for left, note in zip(lefts, row.notes):
            draw.text((left, top + lift + edge + 2), note, SOFT, _font(14))
        top += height
    return np.asarray(canvas)


def episode_strip(policy, record, video, count=6, edge=150):
    """One episode in one image: both cameras over time, and where the policy looked.

    Args:
      policy: `Policy`.
      record, video: an episode and what `rollout.replay` returned for it.
      count: columns. edge: of a tile in pixels.

    Returns:
      uint8 [H,W,3].
    """
    cameras = policy.config.data.cameras
    steps = np.asarray(video["frame_steps"])
    frames = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    images = [
        cameras_lib.shown(
            {camera: video["frames"][camera][k] for camera in cameras}, policy.config.data
        )
        for k in frames
    ]
    rows = [Row([p[camera] for p in images], f"{camera} camera") for camera in cameras]
    if policy.config.model.pooling == "learned_query":
        maps = list(attention(policy, video["observations"]).values())[-1]  # last adapter layer
        plans = np.searchsorted(video["plan_steps"], steps[frames], "right") - 1  # those in force
        overlaid = [draw_over(image, maps, plan) for image, plan in zip(images, plans)]
        rows += [Row([p[camera] for p in overlaid], "attention") for camera in cameras]
    outcome = "solved" if record.success else "not solved"
    title = f"“{record.prompt}”: {outcome} in {record.steps} steps"
    return grid(rows, [f"step {steps[k]}" for k in frames], edge, title)


def side_by_side(frames, cameras):
    """{camera: uint8 [n,H,W,3]} -> uint8 [n,H,V*W,3], in the order of `cameras`."""
    return np.concatenate([frames[camera] for camera in cameras], axis=2)


def save_png(path, image):
    """Writes uint8 [H,W,3]."""
    Image.fromarray(np.asarray(image)).save(path)


def save_mp4(path, frames, fps=10, hold=1.0):
    """Writes uint8 [n,H,W,3] as H.264 that every browser plays.

    Args:
      path: file to write.
      frames: sides are padded to even numbers.
      fps: frames per second.
      hold: seconds the last frame stays.
    """
    import av

    frames = np.asarray(frames)
    n, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index in [*range(n), *[n - 1] * math.ceil(hold * fps)]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[index], format="rgb24")))
        container.mux(stream.encode())


def _fit(tile, edge):
    image = Image.fromarray(np.asarray(tile))
    wide = round(image.width * edge / image.height)
    # Small images are shown as the pixels they are.
    how = Image.Resampling.NEAREST if edge > 2 * image.height else Image.Resampling.LANCZOS
    return image.resize((wide, edge), how)


@functools.cache
def _font(size):
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # the same on every machine
    return ImageFont.truetype(path, size)


def _width(text, size):
    return math.ceil(_font(size).getlength(text))
