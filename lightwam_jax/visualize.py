"""Pictures of what a policy looks at and imagines: query attention, future video, film strips.

Everything takes and returns uint8 arrays [..., H, W, 3]; `save_png` and `save_mp4` write them.
"""

import functools
import math

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from lightwam_jax.data import codec
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.data import transforms

INK, SOFT, PAPER = (29, 39, 51), (93, 107, 124), (255, 255, 255)
GAP = 8  # pixels between pictures


# ---------------------------------------------------------------- attention


def attention_maps(taps, config):
    """Summary attention of the learned queries: sum over queries of importance times weights.

    Args:
      taps: of `Policy.act(..., return_taps=True)`.
      config: `DataConfig`.

    Returns:
      {"{layer}_{source}": {camera: float32 [B,h,w]}}; over all cameras a map sums to 1.

    Raises:
      ValueError: no attention in the taps (pooling is "mean").
    """
    names = [name.removeprefix("attention_") for name in taps if name.startswith("attention_")]
    if not names:
        raise ValueError("the taps hold no query attention: config.model.pooling='mean' has no learned queries to draw")
    cell = 2 * codec.STRIDE  # the backbone reads patches of 2x2 latent cells
    height, width = (side // cell for side in config.canvas)
    maps = {}
    for name in names:
        summary = np.einsum("q,bqs->bs", taps[f"query_importance_{name}"], taps[f"attention_{name}"])
        grid = summary.reshape(-1, height, width, 1).astype(np.float32)
        maps[name] = {camera: part[..., 0]
                      for camera, part in transforms.split(grid, config.cameras, config.layout).items()}
    return maps


def overlay(picture, heat, peak=None):
    """Draws a coarse map over a picture: what is not attended to turns grey and dark.

    Args:
      picture: uint8 [H,W,3].
      heat: float [h,w], non-negative.
      peak: value shown at full strength; None: the largest of this map.

    Returns:
      uint8 [H,W,3].
    """
    height, width = picture.shape[:2]
    strength = np.clip(heat / max(peak or heat.max(), 1e-12), 0, 1).astype(np.float32)
    smooth = Image.fromarray(strength).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey = picture.mean(-1, keepdims=True)
    base = picture * (0.35 + 0.65 * strength) * strength + grey * 0.55 * (1 - strength)
    glow = _palette()[(255 * strength[..., 0]).astype(np.uint8)]
    alpha = 0.55 * strength**0.8 * (1 - 0.35 * strength)  # the most attended spots stay recognisable
    return np.clip(base * (1 - alpha) + glow * alpha, 0, 255).astype(np.uint8)


@functools.cache
def _palette():
    import matplotlib
    return 255 * matplotlib.colormaps["inferno"](np.linspace(0.1, 0.95, 256))[:, :3]


def attention_sheet(policy, observations, pictures=None, edge=176):
    """A row per observation and camera: the picture, then the attention of each adapter layer.

    Args:
      policy: `Policy`.
      observations: dicts {"images", "state", "prompt"} as environments give them.
      pictures: per observation {camera: uint8 [H,W,3]}, sharper than what the policy sees; or None.
      edge: height of a tile in pixels.

    Returns:
      uint8 [H,W,3].
    """
    maps = attention(policy, observations)
    header = ["", *(f"layer {name.split('_')[0]} ({name.split('_', 1)[1]})" for name in maps)]
    rows = []
    for i, observation in enumerate(observations):
        for camera in policy.config.data.cameras:
            seen = (pictures[i] if pictures else observation["images"])[camera]
            tiles = [seen]
            for name in maps:  # one scale per map over both cameras, so that they can be compared
                peak = max(m[i].max() for m in maps[name].values())
                tiles.append(overlay(seen, maps[name][camera][i], peak))
            first = camera == policy.config.data.cameras[0]
            rows.append((observation["prompt"] if first else "", camera, tiles))
    return sheet(rows, header, edge)


def attention(policy, observations):
    """Returns `attention_maps` of a list of observations."""
    images = {c: np.stack([o["images"][c] for o in observations]) for c in policy.config.data.cameras}
    state = np.stack([o["state"] for o in observations])
    _, taps = policy.act(images, state, [o["prompt"] for o in observations], return_taps=True)
    return attention_maps(taps, policy.config.data)


# ---------------------------------------------------------------- future video


def future(policy, windows, seed=0, steps=10):
    """Predicts the future frames of recorded windows and compares.

    Args:
      policy: `Policy`.
      windows: [(episode, start)], at most 64.
      seed, steps: of the solver.

    Returns:
      {"real", "predicted": uint8 [N,frames,h,w,3] at the predicted resolution; "psnr", "still": float [N,frames], dB
      against the real frames, of the prediction and of simply repeating frame 0; "offsets": [frames], raw steps;
      "valid": bool [N,frames], False past the end of an episode; "prompts": [N]}.
    """
    data = policy.config.data
    canvases, valid, state = [], [], []
    for episode, start in windows:
        w = episodes_lib.window(episode.length, start, data.num_frames, data.frame_stride, data.action_horizon)
        canvases.append(policy.canvas({c: episode.frames(c, w.frames) for c in data.cameras}))
        valid.append(~w.image_is_pad)
        state.append(episode.state[start])
    canvases = np.stack(canvases)
    images = transforms.split(canvases[:, 0], data.cameras, data.layout)
    prompts = [episode.task for episode, _ in windows]
    predicted = policy.predict_video(images, np.stack(state), prompts, seed, steps)
    real = shrink(canvases, policy.config.loss.downsample)
    compare = lambda a: np.array([[codec.psnr(x, y) for x, y in zip(*clips)] for clips in zip(a, real)])
    return {"real": real, "predicted": predicted, "psnr": compare(predicted),
            "still": compare(np.repeat(real[:, :1], real.shape[1], axis=1)), "valid": np.stack(valid),
            "offsets": np.arange(data.video_frames) * data.frame_stride, "prompts": prompts}


def future_sheet(result, columns=5, edge=96):
    """Real frames above predicted ones, with the PSNR of each offset; `result` is `future`'s.

    Returns uint8 [H,W,3].
    """
    frames = np.unique(np.linspace(0, result["real"].shape[1] - 1, columns).round().astype(int))
    header = [("now" if offset == 0 else f"+{offset} steps") for offset in result["offsets"][frames]]
    rows = []
    for i, prompt in enumerate(result["prompts"]):
        rows.append((prompt, "real", [result["real"][i, k] for k in frames]))
        notes = [f"{result['psnr'][i, k]:.1f} dB" if result["valid"][i, k] else "past the end" for k in frames]
        rows.append(("", "imagined", [result["predicted"][i, k] for k in frames], notes))
    return sheet(rows, header, edge)


def shrink(frames, factor):
    """Averages uint8 frames [...,H,W,3] over factor x factor pixels."""
    *lead, height, width, channels = frames.shape
    blocks = frames.reshape(*lead, height // factor, factor, width // factor, factor, channels)
    return np.rint(blocks.mean((-4, -2), dtype=np.float32)).astype(np.uint8)


# ---------------------------------------------------------------- sheets, strips, films


def sheet(rows, header=(), edge=128):
    """Lays out labelled rows of tiles on white.

    Args:
      rows: (title above the row or "", label left of it, tiles uint8 [h,w,3], notes under the tiles or absent).
      header: text above each column.
      edge: height of a tile; widths follow.

    Returns:
      uint8 [H,W,3].
    """
    margin = 12 + max((_text_width(row[1], 13) for row in rows), default=0)
    tiles = [[_fit(tile, edge) for tile in row[2]] for row in rows]
    columns = [max(line[k].width for line in tiles if k < len(line)) for k in range(max(map(len, tiles)))]
    width = margin + sum(columns) + GAP * (len(columns) + 1)
    heights = [(26 if row[0] else 0) + edge + (20 if len(row) > 3 else 0) + GAP for row in rows]
    top = 26 if any(header) else GAP
    canvas = Image.new("RGB", (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for k, text in enumerate(header):
        draw.text((margin + sum(columns[:k]) + GAP * (k + 1), 6), text, SOFT, _font(13))
    for row, line, height in zip(rows, tiles, heights):
        y = top
        if row[0]:
            draw.text((GAP, y + 4), row[0], INK, _font(15))
            y += 26
        draw.text((GAP, y + edge // 2 - 8), row[1], SOFT, _font(13))
        x = margin + GAP
        for k, tile in enumerate(line):
            canvas.paste(tile, (x, y))
            if len(row) > 3:
                draw.text((x, y + edge + 2), row[3][k], SOFT, _font(13))
            x += columns[k] + GAP
        top += height
    return np.asarray(canvas)


def film_strip(policy, record, film, count=6, edge=200):
    """One episode in one picture: both cameras over time, and where the policy looked.

    Args:
      policy: `Policy`; record, film: an episode and its `rollout.replay`, with its `frame_steps` and `plan_steps`.
      count: columns.
      edge: of a tile in pixels.

    Returns:
      uint8 [H,W,3].
    """
    cameras = policy.config.data.cameras
    maps = attention(policy, film["observations"])
    name = list(maps)[-1]  # the last adapter layer
    frames = np.unique(np.linspace(0, len(film["frame_steps"]) - 1, count).round().astype(int))
    plans = [max(0, int(np.searchsorted(film["plan_steps"], film["frame_steps"][k], "right")) - 1) for k in frames]
    rows = [(f"“{record.prompt}”" if i == 0 else "", camera, [film["frames"][camera][k] for k in frames])
            for i, camera in enumerate(cameras)]
    for camera in cameras:
        peak = max(m.max() for m in maps[name].values())
        rows.append(("", f"attention, {camera}", [overlay(film["frames"][camera][k], maps[name][camera][p], peak)
                                                  for k, p in zip(frames, plans)]))
    header = [f"step {film['frame_steps'][k]}" for k in frames]
    return sheet(rows, header, edge)


def side_by_side(frames, cameras):
    """{camera: uint8 [n,H,W,3]} -> uint8 [n,H,V*W,3], in the order of `cameras`."""
    return np.concatenate([frames[camera] for camera in cameras], axis=2)


def save_png(path, picture):
    """Writes uint8 [H,W,3]."""
    Image.fromarray(np.asarray(picture)).save(path)


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
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index in [*range(n), *[n - 1] * math.ceil(hold * fps)]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[index], format="rgb24")))
        container.mux(stream.encode())


def _fit(tile, edge):
    image = Image.fromarray(np.asarray(tile))
    wide = round(image.width * edge / image.height)
    sharp = edge % image.height == 0 or edge > 2 * image.height  # show small pictures as the pixels they are
    return image.resize((wide, edge), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)


@functools.cache
def _font(size):
    import matplotlib
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _text_width(text, size):
    return math.ceil(_font(size).getlength(text))
