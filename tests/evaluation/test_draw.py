import json

import av
import numpy as np
import pytest

from lightwam_jax import html_report
from lightwam_jax.data import episodes
from lightwam_jax.encoders import quality
from lightwam_jax.evaluation import closed_loop, draw, worker
from tests.inference.test_policy import CAMERAS, make_config, make_policy, observe


@pytest.fixture(scope="module")
def policy():
    return make_policy(make_config())


def recordings(length=12, seed=0):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (length, 32, 32, 3), np.uint8) for c in CAMERAS}
    return episodes.ArrayEpisode(
        "e",
        20.0,
        "put the red cube in the tray",
        rng.normal(size=(length, 5)).astype(np.float32),
        np.zeros((length, 4), np.float32),
        images,
    )


def listed(rows):
    images, state, prompts = observe(rows)
    return [
        {"images": {c: images[c][i] for c in CAMERAS}, "state": state[i], "prompt": prompts[i]}
        for i in range(rows)
    ]


def test_attention_is_weighted_by_importance_and_cut_per_camera():
    config = make_config().data  # canvas 32 x 64: 2 x 4 cells, the wrist has the right half
    weights = np.zeros((1, 2, 8))
    weights[0, 0, 0] = 1  # query 0 looks at the top left of the scene
    weights[0, 1, 7] = 1  # query 1 looks at the bottom right of the wrist
    taps = {"attention_3_delta": weights, "query_importance_3_delta": np.array([0.25, 0.75])}
    maps = draw.attention_maps(taps, config)
    np.testing.assert_allclose(maps["3_delta"]["scene"][0], [[0.25, 0], [0, 0]])
    np.testing.assert_allclose(maps["3_delta"]["wrist"][0], [[0, 0], [0, 0.75]])
    with pytest.raises(ValueError, match="pooling='learned_query'"):
        draw.attention_maps({"pooled_3_delta": weights}, config)


def test_overlay_lights_what_is_attended_and_leaves_indifference_dim():
    image = np.full((32, 32, 3), 100, np.uint8)
    lit = draw.overlay(image, np.array([[1.0, 0], [0, 0]]), cells=4)
    assert lit[4, 4].mean() > 1.8 * lit[28, 28].mean()
    np.testing.assert_allclose(lit[28, 28], 60, atol=1)
    even = draw.overlay(image, np.full((2, 2), 0.25), cells=4)
    assert even.std(axis=(0, 1)).max() < 1 and even.mean() < 100


def test_attention_chunks_agree_with_one_batch(policy):
    many = draw.attention(policy, listed(11))
    few = draw.attention(policy, listed(11)[9:])
    assert many["1_adapted"]["wrist"].shape == (11, 2, 2)
    for name, maps in few.items():
        for camera in maps:
            np.testing.assert_array_equal(many[name][camera][9:], maps[camera])


def test_the_grid_lights_the_attended_camera_in_the_column_of_its_layer(policy, monkeypatch):
    hot = {("1_adapted", "scene"): (0, 1), ("3_delta", "wrist"): (1, 0)}
    maps = {
        layer: {camera: np.full((1, 2, 2), 0.01) for camera in CAMERAS}
        for layer in ("1_adapted", "3_delta")
    }
    for (layer, camera), cell in hot.items():
        maps[layer][camera][0][cell] = 0.93
    monkeypatch.setattr(draw, "attention", lambda policy, observations: maps)
    grey = {camera: np.full((32, 32, 3), 100, np.uint8) for camera in CAMERAS}
    drawn = []
    monkeypatch.setattr(
        html_report, "grid", lambda rows, header, edge: drawn.append((rows, header))
    )
    draw.attention_grid(policy, [{"images": grey, "prompt": "put it away"}])
    ((rows, header),) = drawn
    assert header == ["", "layer 1, adapted", "layer 3, delta"]
    assert [row.label for row in rows] == list(CAMERAS) and "put it away" in rows[0].title
    for row in rows:
        np.testing.assert_array_equal(row.tiles[0], grey[row.label])
        for layer, tile in zip(maps, row.tiles[1:]):
            cells = tile.astype(float).mean(-1)[[8, 8, 24, 24], [8, 24, 8, 24]].reshape(2, 2)
            if cell := hot.get((layer, row.label)):
                assert cells.argmax() == np.ravel_multi_index(cell, (2, 2))
                assert cells.max() > 1.5 * np.sort(cells.ravel())[-2]
            else:
                assert np.ptp(cells) < 1, "nothing to see in the other camera"


def test_future_measures_against_real_frames(policy):
    result = draw.future(policy, [(recordings(), 0), (recordings(), 8)], steps=2)
    assert result["real"].shape == result["predicted"].shape == (2, 5, 16, 32, 3)
    np.testing.assert_array_equal(result["valid"], [[True] * 5, [True, True, False, False, False]])
    np.testing.assert_array_equal(result["offsets"], [0, 2, 4, 6, 8])
    expected = quality.psnr(result["predicted"][0, 3], result["real"][0, 3])
    assert result["psnr"]["predicted"][0, 3] == pytest.approx(expected)
    expected = quality.ssim(result["predicted"][1, 2], result["real"][1, 2])
    assert result["ssim"]["predicted"][1, 2] == pytest.approx(expected)
    # frame 0 is given: the prediction of it is what the codec makes of it
    assert np.abs(result["predicted"][:, 0].astype(int) - result["codec"][:, 0]).max() <= 2
    grid = draw.future_grid(result, [0, 1], columns=3, edge=32)
    assert grid.dtype == np.uint8 and grid.shape[1] > 3 * 64


def test_future_video_shows_imagined_beside_real(policy):
    result = draw.future(policy, [(recordings(), 0), (recordings(), 8)], steps=2)
    result["real"][1, 3], result["predicted"][1, 3] = 255, 0
    video = draw.future_video(result, [1], edge=32)
    assert video.dtype == np.uint8 and len(video) == 5
    assert not np.array_equal(video[1], video[2])
    # In frame 3 the left half of the tiles' rows is white and the right one holds a black tile.
    black = (video[3] == 0).all(axis=-1)
    left = np.flatnonzero(black.sum(axis=0) >= 32)[0]
    assert left > 64 and black[:, left : left + 64].sum() >= 32 * 64


def test_future_is_written_as_images_video_and_numbers(policy, tmp_path):
    recorded = [recordings(14), recordings(14, seed=1)]
    closed_loop.draw_future(policy, tmp_path, recorded)
    numbers = json.loads((tmp_path / "future.json").read_text(encoding="utf-8"))
    assert numbers["offsets"] == [2, 4, 6, 8] and numbers["windows"][0] == 14
    assert set(numbers["psnr"]) == set(numbers["ssim"]) == {"codec", "predicted", "still"}
    assert all(len(means) == 4 for kind in ("psnr", "ssim") for means in numbers[kind].values())
    assert all(-1 <= mean <= 1 for means in numbers["ssim"].values() for mean in means)
    for name in ("future.png", "psnr.png", "ssim.png"):
        assert (tmp_path / name).stat().st_size > 5000
    with av.open(str(tmp_path / "future.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5 + 4  # and the last one for a second


def test_shrink_averages_squares():
    frames = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, -1)
    np.testing.assert_array_equal(draw.shrink(frames, 2)[0, ..., 0], [[2, 4], [10, 12]])


def test_the_strip_pairs_frames_with_the_plan_in_force(policy, monkeypatch):
    """Plans at 0, 4 and 8; the images shown are of steps 0, 4, 7 and 9."""
    steps = [0, 2, 4, 6, 7, 8, 9]
    frames = {
        c: np.stack([np.full((64, 64, 3), 10 * s + k, np.uint8) for s in steps])
        for k, c in enumerate(CAMERAS)
    }
    video = {
        "frames": frames,
        "frame_steps": steps,
        "observations": listed(3),
        "plan_steps": [0, 4, 8],
    }
    maps = {
        layer: {c: np.full((3, 2, 2), value) for c in CAMERAS}
        for value, layer in enumerate(("1_adapted", "3_delta"))
    }
    drawn, asked = [], []

    def draw_over(images, last, plan):
        assert last is maps["3_delta"], "the last adapter's"
        asked.append(int(plan))
        return {c: image + 1 for c, image in images.items()}

    monkeypatch.setattr(draw, "attention", lambda policy, seen: maps)
    monkeypatch.setattr(draw, "draw_over", draw_over)
    monkeypatch.setattr(html_report, "grid", lambda *arguments: drawn.append(arguments))
    result = worker.EpisodeResult(3, True, 9, "put it away", None, 1.0, 0, np.zeros((9, 4)))
    draw.episode_strip(policy, result, video, count=4, edge=40)
    ((rows, header, edge, title),) = drawn
    assert header == ["step 0", "step 4", "step 7", "step 9"] and edge == 40
    assert asked == [0, 1, 1, 2]
    labels = ["scene camera", "wrist camera", "attention", "attention"]
    assert [row.label for row in rows] == labels
    for row, offset in zip(rows, (0, 1, 1, 2)):  # the wrist is one brighter, an overlay too
        assert [tile[0, 0, 0] for tile in row.tiles] == [10 * s + offset for s in (0, 4, 7, 9)]
    assert title == "“put it away”: solved in 9 steps"


def test_the_strip_is_drawn(policy):
    video = {
        "frames": {c: np.full((4, 64, 64, 3), 90, np.uint8) for c in CAMERAS},
        "frame_steps": [0, 2, 4, 5],
        "observations": listed(2),
        "plan_steps": [0, 4],
    }
    result = worker.EpisodeResult(3, False, 5, "put it away", None, 1.0, 0, np.zeros((5, 4)))
    strip = draw.episode_strip(policy, result, video, count=3, edge=40)
    assert strip.dtype == np.uint8 and strip.shape[0] > 4 * 40 and strip.shape[1] > 3 * 40
    # A row of a tile: the images as they are, the attention coloured.
    grey = (strip == 90).all(-1).sum(1)
    assert (grey == 3 * 40).sum() == 2 * 40


def test_mp4_is_what_browsers_play(tmp_path):
    frames = np.zeros((6, 33, 47, 3), np.uint8)
    frames[3:] = 255
    draw.save_mp4(tmp_path / "video.mp4", frames, fps=5, hold=0.4)
    with av.open(str(tmp_path / "video.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (48, 34)
        shown = [f.to_ndarray(format="rgb24").mean() for f in video.decode(video=0)]
    assert len(shown) == 8 and shown[0] < 20 and shown[-1] > 235
