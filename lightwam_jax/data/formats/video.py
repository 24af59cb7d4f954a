"""Video files: the exact frames at given times, facts without decoding, and writing.

Every call opens the file anew: PyAV's containers are not thread-safe, and opening costs 1 to 5 ms
where decoding the frames of a window costs 10 to 50.
"""

import contextlib
import fractions
import itertools
import math
import os
import typing

import av
import numpy as np

from lightwam_jax.data.episodes import FrameError

# Seconds between the time asked for and the frame found, where nobody says otherwise. Rounding
# stays below it (float32 times up to half an hour); LeRobot tests its datasets with the same.
TOLERANCE = 1e-4
_SEEK_AHEAD = 2  # frames that must lie before the next keyframe for a seek to be worth its cost
# Keyframes close together: a window is read from the middle of a file.
_OPTIONS = {
    "libx264": {"crf": "18", "g": "10", "bf": "0"},
    "libsvtav1": {"crf": "30", "g": "10", "preset": "8"},
    "mpeg4": {"qscale": "2", "g": "10"},
}


class VideoInfo(typing.NamedTuple):
    """What a file says of itself: codec is e.g. "h264", duration in seconds."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    duration: float
    pix_fmt: str


def probe(path):
    """Returns the `VideoInfo` of a file; nothing is decoded.

    Raises:
      FrameError: missing, not a video, or shorter than its own index says.
    """
    with _open(path) as (container, stream):
        if cut := _cut_off(path, stream):
            raise FrameError(path, None, cut)
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else math.nan
        duration = float(stream.duration * stream.time_base) if stream.duration else count / fps
        context = stream.codec_context
        codec, pix_fmt = context.codec.canonical_name, context.pix_fmt
        return VideoInfo(count, fps, stream.height, stream.width, codec, duration, pix_fmt)


def _cut_off(path, stream):
    """Returns a sentence if a file is shorter than its own index says, else ""."""
    index, size = stream.index_entries, os.path.getsize(path)
    end = index[-1].pos + index[-1].size if len(index) else 0
    if end <= size:
        return ""
    return f"truncated: its frames reach to byte {end:,}, the file ends at {size:,}; copy it again"


def frames(path, times, numbers=None, tolerance=TOLERANCE):
    """Returns the frames at given times as uint8 [k, H, W, 3].

    Args:
      path: file.
      times: [k] presentation times in seconds, in any order; repeats are decoded once.
      numbers: [k] what errors call these frames; None: 0, 1, ... in the order of `times`.
      tolerance: seconds the nearest frame may be away, beyond the rounding of the container.

    Raises:
      FrameError: no such file, no frame at one of the times, or one that cannot be decoded.
    """
    times = np.asarray(times, np.float64)
    numbers = np.arange(len(times)) if numbers is None else np.asarray(numbers)
    ascending, first, place = np.unique(times, return_index=True, return_inverse=True)
    numbers = numbers[first].tolist()
    try:
        return _read(path, ascending, numbers, tolerance, True)[place]
    except FrameError as error:
        if not isinstance(error.__cause__, av.InvalidDataError):
            raise
    # Not closed, a group of images needs frames from before its keyframe.
    return _read(path, ascending, numbers, tolerance, False)[place]


def _read(path, times, numbers, tolerance, seek):
    """Returns `frames` of ascending times; decodes everything before them unless it may seek."""
    with _open(path) as (container, stream):
        out = np.empty((len(times), stream.height, stream.width, 3), np.uint8)
        found = _nearest(container, stream, times, seek)
        for i, (time, number) in enumerate(zip(times, numbers)):
            try:
                frame = next(found)
            except av.FFmpegError as error:
                cut = _cut_off(path, stream)
                reason = f"cannot be decoded, at {time:.4f} s: {cut or error.strerror}"
                raise FrameError(path, number, reason) from (None if cut else error)
            if fault := _fault(path, stream, out.shape[1:3], frame, time, tolerance):
                raise FrameError(path, number, fault)
            try:
                out[i] = frame.to_ndarray(format="rgb24")
            except (ValueError, av.FFmpegError) as error:  # colours that cannot be converted
                raise FrameError(path, number, f"the frame at {time:.4f} s: {error}") from error
    return out


def _fault(path, stream, size, frame, time, tolerance):
    """Returns a sentence if a frame is not what is wanted at `time`, else ""."""
    tick = float(stream.time_base)
    if frame is None or abs(frame.pts * tick - time) > tolerance + tick / 2:
        reason = "frames are missing, or the timestamps and the video do not belong together"
        reason, near = _cut_off(path, stream) or reason, ""
        if frame is not None:
            near, away = f"; the nearest is at {frame.pts * tick:.4f} s", frame.pts * tick - time
            if stream.average_rate and abs(away) * stream.average_rate <= 0.5:
                reason = f"{abs(away):.4f} s away; config.data.tolerance_s allows {tolerance:.4g}"
        return f"no frame at {time:.4f} s{near}: {reason}"
    if frame.is_corrupt:
        return f"the frame at {time:.4f} s is damaged"
    if (frame.height, frame.width) != size:
        return f"{frame.height} x {frame.width} pixels in a video of {size[0]} x {size[1]}"
    return ""


def _nearest(container, stream, times, seek):
    """Yields the frame nearest to each of the ascending times; None where there is no frame."""
    tick = float(stream.time_base)
    previous = last = coming = None
    for time in times:
        if coming is None or (seek and _seek_pays(stream, last, time)):
            coming = _frames_from(container, stream, time if seek else -math.inf)
            previous, last = None, next(coming, None)
        while last is not None and last.pts * tick < time:
            following = next(coming, None)
            if following is None:
                break
            previous, last = last, following
        yield min(
            (f for f in (previous, last) if f is not None),
            key=lambda frame: abs(frame.pts * tick - time),
            default=None,
        )


def _frames_from(container, stream, time):
    """Returns an iterator over the frames, from the last keyframe that is not behind `time` on."""
    begin = min(stream.start_time or 0, 0)
    wanted = target = math.ceil(max(time / stream.time_base, begin))
    while True:
        container.seek(target, stream=stream)
        packets = container.demux(stream)
        key = next(packets)
        if not key.size:  # the file ends before the place that its index names
            return iter(())
        coming = _decoded(key, packets)
        first = next(coming, None)
        if target == begin or (first is not None and first.pts <= wanted):
            return itertools.chain([first] if first is not None else [], coming)
        # Indices count decoding times: this keyframe is shown after our frame, the one before not.
        earlier = key.dts - 1 if key.is_keyframe and key.dts is not None else begin
        target = earlier if begin < earlier < target else begin


def _decoded(key, packets):
    """Yields the frames of packets, `key` first."""
    for packet in itertools.chain([key], packets):
        # What is stored behind a keyframe and shown before it needs frames that we do not have.
        if packet.pts is None or not key.is_keyframe or packet.pts >= key.pts:
            yield from (frame for frame in packet.decode() if frame.pts is not None)


def _seek_pays(stream, last, time):
    """Whether a keyframe some frames ahead of `last` is nearer to `time`."""
    if last is None or not len(stream.index_entries) or not stream.average_rate:
        return False
    place = stream.index_entries.search_timestamp(math.ceil(time / stream.time_base))
    if place < 0:
        return False
    ahead = (stream.index_entries[place].timestamp - last.pts) * stream.time_base
    return ahead * stream.average_rate > _SEEK_AHEAD


@contextlib.contextmanager
def _open(path):
    """Gives (container, its video stream); damage is an error, never a concealed frame."""
    try:
        container = av.open(os.fspath(path))
    except FileNotFoundError:
        raise FrameError(path, None, "no such file") from None
    except (av.FFmpegError, OSError) as error:
        reason = f"cannot be opened ({error.strerror}): not a video, or cut off before its end"
        raise FrameError(path, None, reason) from error
    with container:
        if not container.streams.video:
            raise FrameError(path, None, "has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # its description is cut off
            raise FrameError(path, None, "its codec is not known here, or the file is damaged")
        # Several files are read at once: one thread each is the quickest, and dav1d with more
        # delays its frames.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            yield container, stream
        except av.FFmpegError as error:  # of seeking, or of the packets
            raise FrameError(path, None, f"cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _same_scheduling():
    """Gives the thread back the scheduling it had.

    Run as root, SVT-AV1 makes the thread that opens it a real-time one. All processes started later
    inherit that, and one that waits busily then keeps the machine from everybody else.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


class Writer:
    """An MP4 file under construction: frame i is shown at i / fps. A context manager.

    Attributes: frames, added so far; bytes, encoded so far (encoders lag some frames behind).
    """

    def __init__(
        self,
        path,
        fps,
        codec="libx264",
        pix_fmt="yuv420p",
        *,
        faststart=False,
        pad=False,
        **options,
    ):
        """Opens `path`.

        Args:
          path: file to write.
          fps: frames per second.
          codec, pix_fmt, options: of the encoder: "libx264", "libsvtav1", "mpeg4", ...; crf="20".
          faststart: index at the front, so that browsers play the file while they load it.
          pad: repeat the last row and column of images of odd size, which are refused otherwise.
        """
        self.path, self.frames, self.bytes = path, 0, 0
        self._rate = fractions.Fraction(fps).limit_denominator(100_000)
        container = {"movflags": "faststart"} if faststart else {}
        self._container = av.open(os.fspath(path), "w", format="mp4", options=container)
        options = _OPTIONS.get(codec, {}) | options
        self._stream = self._container.add_stream(codec, rate=self._rate, options=options)
        self._stream.pix_fmt = pix_fmt
        self._size, self._pad = None, pad

    def add(self, frames, keyframe=False):
        """Appends uint8 [k, H, W, 3]; `keyframe`: decoding can begin at the first of them.

        Raises:
          ValueError: not uint8 RGB, of another size than the first, or of odd size.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"{self.path}: frames are {found}; expected uint8 [k, H, W, 3]")
        height, width = frames.shape[1:3]
        images = f"{self.path}: images of {height} x {width} pixels"
        if height % 2 or width % 2:
            if not self._pad:
                raise ValueError(
                    f"{images}; video needs even sides: crop them, or keep images instead of video"
                )
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
        size = frames.shape[1:3]
        if self._size is None:
            self._stream.height, self._stream.width = self._size = size
        if self._size != size:
            raise ValueError(
                f"{images} after those of {self._size[0]} x {self._size[1]}; one file has one size"
            )
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = self.frames, 1 / self._rate
            if keyframe and i == 0:
                frame.pict_type = av.video.frame.PictureType.I
            self._mux(frame)
            self.frames += 1

    def _mux(self, frame):
        with _same_scheduling():
            packets = self._stream.encode(frame)
        for packet in packets:
            self.bytes += packet.size
            self._container.mux(packet)

    def close(self):
        """Completes the file."""
        self._mux(None)
        self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close() if kind is None else self._container.close()


def write(path, frames, fps, codec="libx264", **options):
    """Writes uint8 [n, H, W, 3] as an MP4 file; `options` and errors: see `Writer`."""
    with Writer(path, fps, codec, **options) as writer:
        writer.add(frames)
