"""Exact frames: every image carries its number in bars that survive any codec."""

import concurrent.futures
import os

import av
import numpy as np
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.formats import video

FPS, LENGTH = 30, 50
# B-frames, a single keyframe, keyframes close together, and keyframes behind which a frame may
# need one from before them.
KINDS = {
    "h264": ("libx264", {}),
    "h264_b_frames": ("libx264", {"bf": "3", "g": "12", "b-adapt": "0", "preset": "medium"}),
    "h264_one_keyframe": ("libx264", {"bf": "2", "g": "999", "sc_threshold": "0"}),
    "h264_open": ("libx264", {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12"}),
    "h264_intra_refresh": ("libx264", {"intra-refresh": "1", "g": "12"}),
    "hevc": ("libx265", {"x265-params": "open-gop=1:bframes=3:keyint=12:log-level=none"}),
    "av1": ("libsvtav1", {"g": "30", "preset": "10"}),
    "av1_lerobot": ("libsvtav1", {"g": "2", "crf": "30", "preset": "10"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}),
}


def counted(length, height=64, width=96):
    """Images of a moving ramp, uint8 [n, H, W, 3]; eight bars above show the number in binary."""
    ramp = np.linspace(40, 210, width)[None, :, None] * np.array([1.0, 0.8, 0.6])
    out = np.empty((length, height, width, 3), np.uint8)
    for i in range(length):
        out[i] = np.roll(ramp, 3 * i, axis=1)
        out[i, : height // 2] = np.repeat(255 * (i >> np.arange(8) & 1), width // 8)[None, :, None]
    return out


def numbers(frames):
    """What the bars of frames [k, H, W, 3] say, [k]."""
    count, height, width, _ = frames.shape
    bars = frames[:, 4 : height // 2 - 4].reshape(count, -1, 8, width // 8, 3)[:, :, :, 3:-3]
    return ((bars.mean((1, 3, 4)) > 127) * 2 ** np.arange(8)).sum(1).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: file of 50 counted frames}."""
    folder = tmp_path_factory.mktemp("videos")
    for kind, (codec, options) in KINDS.items():
        video.write(folder / f"{kind}.mp4", counted(LENGTH), FPS, codec, **options)
    return {kind: folder / f"{kind}.mp4" for kind in KINDS}


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux only")
def test_writing_leaves_the_thread_as_it_was(tmp_path):
    """As root, SVT-AV1 makes its caller a real-time thread, and all processes started later."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    for codec in ("libsvtav1", "libx264"):
        with video.Writer(tmp_path / f"{codec}.mp4", FPS, codec) as writer:
            writer.add(counted(3))
            assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before


def packets(path):
    with av.open(str(path)) as container:
        return [(p.pts, p.dts, p.is_keyframe) for p in container.demux(video=0) if p.size]


def remux(source, target, later=0.0, **options):
    """Copies the packets of a file, `later` seconds shifted; options go to the container."""
    with av.open(str(source)) as before, av.open(str(target), "w", options=options) as after:
        stream = after.add_stream_from_template(before.streams.video[0], opaque=True)
        shift = round(later / before.streams.video[0].time_base)
        for packet in before.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = (
                    packet.pts + shift,
                    packet.dts + shift,
                    stream,
                )
                after.mux(packet)
    return target


def test_the_files_are_what_their_names_say(files):
    for kind, reordered, keyframes in [
        ("h264", False, 5),
        ("h264_b_frames", True, 5),
        ("h264_one_keyframe", True, 1),
        ("h264_open", True, 5),
        ("h264_intra_refresh", False, 5),
        ("hevc", True, 5),
        ("av1_lerobot", False, 25),
        ("mpeg4", True, 5),
    ]:
        found = packets(files[kind])
        assert ([p[0] for p in found] != sorted(p[0] for p in found)) == reordered, kind
        assert sum(p[2] for p in found) == keyframes, kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_the_right_one(files, kind):
    everything = video.frames(files[kind], np.arange(LENGTH) / FPS)
    assert numbers(everything) == list(range(LENGTH))
    assert np.abs(everything.astype(int) - counted(LENGTH)).mean() < 4
    for i in range(LENGTH):  # each by a seek of its own, at its time in float32
        one = video.frames(files[kind], [np.float32(i / FPS)])
        np.testing.assert_array_equal(one[0], everything[i])


@pytest.mark.parametrize("kind", KINDS)
def test_windows_repeats_and_any_order(files, kind):
    rng = np.random.default_rng(0)
    windows = [np.minimum(start + np.arange(0, 33, 4), LENGTH - 1) for start in (0, 7, 22, 45, 49)]
    for indices in [*windows, rng.permutation(LENGTH), [30, 2, 30, 2, 49, 0], [3], [LENGTH - 1, 0]]:
        assert numbers(video.frames(files[kind], np.array(indices) / FPS)) == list(indices)
    assert video.frames(files[kind], []).shape == (0, 64, 96, 3)


@pytest.mark.parametrize(
    "kind, later, name, options",
    [
        ("h264_b_frames", 0.5, "later.mp4", {}),
        ("h264_b_frames", 0.0, "dts.mp4", {"use_editlist": "0"}),  # begins at 2 / fps
        ("h264_b_frames", 0.0, "no_index.ts", {}),
        ("mpeg4", 0.5, "later.mkv", {}),
        ("av1", 0.5, "later.mkv", {}),  # times in milliseconds
    ],
)
def test_times_are_those_of_the_container(files, tmp_path, kind, later, name, options):
    path = remux(files[kind], tmp_path / name, later, **options)
    with av.open(str(path)) as container:
        begin = next(container.decode(video=0)).time
    for indices in ([0, 4, 8], [11, 12, 13], [37], [49, 24]):
        found = video.frames(path, begin + np.array(indices) / FPS)
        assert numbers(found) == indices
    assert begin > 0.05
    with pytest.raises(episodes.FrameError, match=f"nearest is at {begin:.4f} s"):
        video.frames(path, [0.0])


@pytest.mark.parametrize(
    "time, nearest",
    [
        (LENGTH / FPS, 49 / FPS),
        (10.0, 49 / FPS),
        (-1 / FPS, 0),
        (10.5 / FPS, None),
        (12 / FPS + 0.001, 12 / FPS),
    ],
)
def test_no_frame_at_a_time_is_an_error(files, time, nearest):
    with pytest.raises(episodes.FrameError) as error:
        video.frames(files["h264"], [3 / FPS, time, 5 / FPS], numbers=[103, 77, 105])
    assert error.value.frame == 77 and error.value.file == str(files["h264"])
    assert f"no frame at {time:.4f} s" in str(error.value)
    assert nearest is None or f"nearest is at {nearest:.4f} s" in str(error.value)
    found = video.frames(files["h264"], [time], tolerance=20)
    assert nearest is None or numbers(found) == [round(nearest * FPS)]


@pytest.mark.parametrize("kind", ["h264_b_frames", "h264_one_keyframe", "av1", "mpeg4"])
def test_a_truncated_file_gives_no_wrong_frame(files, tmp_path, kind):
    whole = remux(files[kind], tmp_path / "whole.mp4", movflags="faststart")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with pytest.raises(episodes.FrameError, match="truncated"):
        video.probe(cut)
    sound, seen = video.frames(whole, np.arange(LENGTH) / FPS), 0
    for i in range(LENGTH):
        try:
            np.testing.assert_array_equal(video.frames(cut, [i / FPS], [i])[0], sound[i])
            seen += 1
        except episodes.FrameError as error:
            assert error.frame == i and error.file == str(cut)
    assert 0 < seen < LENGTH
    with pytest.raises(episodes.FrameError) as error:
        video.frames(cut, np.arange(LENGTH) / FPS)
    assert 0 < error.value.frame <= seen


def test_a_damaged_frame_is_never_concealed(files, tmp_path):
    path = tmp_path / "damaged.mp4"
    video.write(path, counted(LENGTH), FPS, g="999", sc_threshold="0")  # bf=0: no order to mind
    sound = video.frames(path, np.arange(LENGTH) / FPS)
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][25]
    content = bytearray(path.read_bytes())
    content[packet.pos + 20 : packet.pos + packet.size] = np.random.default_rng(0).bytes(
        packet.size - 20
    )
    path.write_bytes(content)
    np.testing.assert_array_equal(video.frames(path, np.arange(25) / FPS), sound[:25])
    for i in (25, 26, 49):
        with pytest.raises(episodes.FrameError, match="cannot be decoded") as error:
            video.frames(path, [3 / FPS, i / FPS], [3, i])
        assert error.value.frame == i


def test_missing_and_foreign_files(files, tmp_path):
    foreign, cut, sound = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.wav"
    foreign.write_text("no video at all", encoding="utf-8")
    cut.write_bytes(files["h264"].read_bytes()[:-700])  # the index lies at the end
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for path, reason in (
        (tmp_path / "none.mp4", "no such file"),
        (foreign, "cannot be opened"),
        (cut, "no video stream"),
        (sound, "has no video stream"),
    ):
        for call in (video.probe, lambda path: video.frames(path, [0.0])):
            with pytest.raises(episodes.FrameError, match=reason) as error:
                call(path)
            assert error.value.frame is None and error.value.file == str(path)


def test_probe(files):
    for kind, codec in (("h264", "h264"), ("av1", "av1"), ("mpeg4", "mpeg4")):
        assert video.probe(files[kind]) == video.VideoInfo(
            LENGTH, FPS, 64, 96, codec, pytest.approx(LENGTH / FPS), "yuv420p"
        )


def test_many_threads_read_the_same_files(files):
    jobs = [(path, start) for start in range(0, 40, 5) for path in files.values()]
    read = lambda job: numbers(video.frames(job[0], (job[1] + np.arange(0, 9, 2)) / FPS))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for (_, start), found in zip(jobs, pool.map(read, jobs)):
            assert found == list(range(start, start + 9, 2))


@pytest.mark.parametrize("fps", [29.97, 12.5, 7])
def test_frame_i_is_shown_at_i_over_fps(tmp_path, fps):
    with video.Writer(tmp_path / "a.mp4", fps, tune="zerolatency") as writer:
        for part in np.split(counted(60), [7, 30, 31]):
            writer.add(part, keyframe=True)
            assert writer.bytes > 0
    assert writer.frames == 60 and writer.bytes < (tmp_path / "a.mp4").stat().st_size
    times = (np.arange(60) / fps).astype(np.float32)
    assert numbers(video.frames(tmp_path / "a.mp4", times)) == list(range(60))
    keyframes = [i for i, packet in enumerate(packets(tmp_path / "a.mp4")) if packet[2]]
    assert {0, 7, 30, 31} <= set(keyframes)


def test_a_video_for_browsers(tmp_path):
    """Its index comes before its frames; images of odd size get another row and column."""
    images = counted(3, 63, 96)[:, :, :95]
    video.write(tmp_path / "a.mp4", images, FPS, crf="1", pad=True, faststart=True)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    seen = video.frames(tmp_path / "a.mp4", np.arange(3) / FPS).astype(int)
    assert seen.shape == (3, 64, 96, 3)
    assert np.abs(seen[:, :63, :95] - images).mean() < 3
    assert np.abs(seen[:, 63, :95] - images[:, 62]).mean() < 3
    video.write(tmp_path / "b.mp4", counted(3), FPS)
    content = (tmp_path / "b.mp4").read_bytes()
    assert content.index(b"moov") > content.index(b"mdat")


def test_images_that_make_no_video(tmp_path):
    for images, reason in (
        (counted(2, 63, 96), "even sides"),
        (counted(2) / 255, "float64"),
        (counted(2)[..., :1], "expected uint8"),
    ):
        with pytest.raises(ValueError, match=reason):
            video.write(tmp_path / "a.mp4", images, FPS)
    with (
        pytest.raises(ValueError, match="one file has one size"),
        video.Writer(tmp_path / "b.mp4", FPS) as writer,
    ):
        writer.add(counted(2))
        writer.add(counted(2, 32, 96))
