"""The doctor's look at images: what their files say, what decodes, what a person should see."""

import collections
import concurrent.futures
import dataclasses

import numpy as np
import tqdm

from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data.episodes import FrameError, Problem, many
from lightwam_jax.encoders import base as encoders_base

_EVEN = 16  # brightest minus darkest value: a lens cap, or black after a codec
_SAME = 8  # largest difference of two images that a codec can make of one
_FROZEN_STEPS = 10  # in a shorter episode nothing need have moved
_BLOCK = 64 << 20  # bytes of decoded images held at once, per thread
_EXAMPLES = 3
_PLAYED = 120  # images of the episode that is played, at most
STRETCHED = "stretched images"
_STRETCH = 1.1  # the released RoboTwin recipe makes its first camera 1.07 times as tall


@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera: `sizes` {"480x640": episodes}, `codecs` {"h264": files}, {} without videos."""

    name: str
    sizes: dict
    codecs: dict


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Some steps of one episode as recorded and as the model sees them.

    raw {camera: uint8 [k, H, W, 3]}, canvas uint8 [k, H, W, 3], action f32 [n, A].
    """

    episode: str
    task: str
    fps: float
    steps: tuple
    raw: dict
    canvas: np.ndarray
    action: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Played:
    """An episode to play: every `stride`-th step of it.

    canvas uint8 [k, H, W, 3]; of all steps state f32 [n, P] and action f32 [n, A].
    """

    episode: str
    task: str
    fps: float
    stride: int
    canvas: np.ndarray
    state: np.ndarray
    action: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """What was seen: `decoded` of `total` images, `which` says in words which ones."""

    which: str
    decoded: int
    total: int
    cameras: tuple = ()
    examples: tuple = ()
    played: Played | None = None


_WHICH = {
    "none": "no file with images was opened (config.data.check_frames='none')",
    "ends": "the first and the last of every episode and camera (config.data.check_frames='ends')",
    "all": "every one (config.data.check_frames='all')",
}


def examine(episodes, broken, config):
    """Opens and decodes what config.data.check_frames asks for, in config.data.threads threads.

    Args:
      episodes: those that have steps.
      broken: ids of those that no example may come from.
      config: `Config`.

    Returns:
      (`Images`, [`Problem`]).
    """
    mode, cameras = config.data.check_frames, config.data.cameras
    total = len(cameras) * sum(e.length for e in episodes)
    if mode == "none":
        return Images(_WHICH[mode], 0, total), []
    jobs = [(episode, camera) for episode in episodes for camera in cameras]
    with concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool:
        videos, unreadable, problems = _probe_all(jobs, pool)
        work = pool.map(lambda job: _look(*job, mode), jobs)
        looks = list(tqdm.tqdm(work, "images", len(jobs), unit="video", leave=False))
    problems += _unknown_cameras(looks) + [p for look in looks for p in look.problems]
    named = {p.file for p in problems}  # a file cut short shows in the last episode that lies in it
    problems += [p for p in unreadable if p.file not in named]
    problems += _sizes(looks, cameras) + _canvases(looks, config.data)
    problems += _stretched(looks, config.data)
    broken = broken | {p.episode for p in problems if p.severity == "error"}
    broken |= {look.episode.id for look in looks if look.unknown}
    examples, wrong = _examples([e for e in episodes if e.id not in broken], config.data)
    decoded = sum(look.decoded for look in looks)
    seen = tuple(_camera(name, looks, videos) for name in cameras)
    played = _played([e for e in episodes if examples and e.id == examples[0].episode], config.data)
    return Images(_WHICH[mode], decoded, total, seen, examples, played), problems + wrong


# ---- files ---------------------------------------------------------------------------------------


def _probe_all(jobs, pool):
    """Opens every video file once; returns ([(camera, info)], problems of opening, others)."""
    members = collections.defaultdict(list)  # {(camera, path): [(episode, first frame)]}
    for episode, camera in jobs:
        place = episode.video(camera)
        if place is not None:
            members[camera, place[0]].append((episode, place[1]))
    if not members:
        return [], [], []
    from lightwam_jax.data.formats import video  # needs PyAV; other sources do not

    def probe(path):
        try:
            return video.probe(path)
        except FrameError as error:
            return error

    infos = tqdm.tqdm(
        pool.map(probe, [path for _, path in members]), "video files", len(members), leave=False
    )
    videos, unreadable, problems = [], [], []
    for ((camera, path), inside), info in zip(members.items(), infos):
        if isinstance(info, FrameError):
            unreadable.append(_undecodable(inside[-1][0], info))
        else:
            videos.append((camera, info))
            problems += _against_metadata(str(path), info, inside)
    return videos, unreadable, problems


def _against_metadata(path, info, members):
    """Returns the problems of a video whose `members` are (episode, its first frame in it)."""
    problems = []
    for episode, first in members:
        have, steps = max(0, info.frames - first), episode.length
        if have < steps:
            kind = "wrong number of frames"
            ends = f"the video ends after {many(have, 'frame')} of it"
            message = f"{ends}, the episode has {many(steps, 'step')}"
            problems.append(Problem.error(kind, episode.id, path, message, have))
        if abs(info.fps / episode.fps - 1) > 0.01:
            message = f"the video runs at {info.fps:.6g} fps, the data at {episode.fps:.6g}"
            problems.append(Problem.error("wrong fps", episode.id, path, message))
    episode, first = members[-1]
    steps, surplus = episode.length, info.frames - first - episode.length
    # A packed file may go on with episodes that config.data.exclude lists.
    if len(members) == 1 and first == 0 and 0 < surplus < steps:
        message = f"the video has {many(info.frames, 'frame')}, the episode {many(steps, 'step')}"
        problems.append(Problem.warning("wrong number of frames", episode.id, path, message, steps))
    return problems


# ---- images ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Look:
    """What came out of one camera of one episode."""

    episode: object
    camera: str
    size: tuple = ()
    decoded: int = 0
    unknown: str = ""  # the message, where there is no such camera
    problems: list = dataclasses.field(default_factory=list)

    def warn(self, kind, message, frame=None):
        place = self.episode.video(self.camera)
        file = place[0] if place else self.episode.file
        message = f"camera {self.camera!r}: {message}"
        self.problems.append(Problem.warning(kind, self.episode.id, file, message, frame))


def _undecodable(episode, error):
    return Problem.error("undecodable image", episode.id, error.file, error.reason, error.frame)


def _look(episode, camera, mode):
    look, even, frozen, first = _Look(episode, camera), [], True, None
    todo = np.unique([0, episode.length - 1]) if mode == "ends" else np.arange(episode.length)
    size = 2
    try:
        while len(todo):
            block, todo = todo[:size], todo[size:]
            frames = episode.frames(camera, block)
            size = max(16, _BLOCK // frames[0].nbytes)
            look.size, look.decoded = frames.shape[1:3], look.decoded + len(frames)
            extent = frames.max((1, 2, 3)) - frames.min((1, 2, 3))
            even += block[extent <= _EVEN].tolist()
            first = frames[:1] if first is None else first
            if frozen:  # compared with the first: slow images change little from one to the next
                change = np.maximum(frames, first) - np.minimum(frames, first)
                frozen = bool((change <= _SAME).all())
    except FrameError as error:
        look.problems.append(_undecodable(episode, error))
    except KeyError as error:
        look.unknown = str(error.args[0])
    if even:
        share = f"{len(even)} of {many(look.decoded, 'decoded image')}"
        verb = "is" if len(even) == 1 else "are"
        look.warn("empty image", f"{share} {verb} black or of one colour", even[0])
    if frozen and not even and look.decoded > 1 and episode.length >= _FROZEN_STEPS:
        look.warn("frozen camera", f"all {look.decoded} decoded images are the same")
    return look


def _unknown_cameras(looks):
    """One problem per episode, or a single one where no episode has the camera."""
    wrong = [look for look in looks if look.unknown]
    problems = [
        Problem.error("no such camera", look.episode.id, look.episode.file, look.unknown)
        for look in wrong
    ]
    for camera in {look.camera for look in wrong}:
        if all(look.unknown for look in looks if look.camera == camera):
            same = [p for p, look in zip(problems, wrong) if look.camera == camera]
            problems = [p for p in problems if p not in same]
            problems.append(same[0]._replace(episode=""))  # of the set: no episode to exclude
    return problems


def _sizes(looks, cameras):
    """Warnings about images of another size than most of their camera."""
    problems = []
    for camera in cameras:
        mine = [look for look in looks if look.camera == camera and look.size]
        counts = collections.Counter(look.size for look in mine)
        usual, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
        for look in mine:
            if look.size != usual:
                others = f"{_size(usual)} in {many(count, 'other episode')}"
                message = f"camera {camera!r} gives {_size(look.size)} here and {others}"
                where = look.episode.id, look.episode.file
                problems.append(Problem.warning("other image size", *where, message))
    return problems


def _canvases(looks, data):
    """Errors of images that config.data cannot lay out: tried once per combination of sizes."""
    sizes = collections.defaultdict(dict)  # {episode id: {camera: size}}
    files = {look.episode.id: str(look.episode.file) for look in looks}
    for look in looks:
        if look.size:
            sizes[look.episode.id][look.camera] = look.size
    tried, problems = set(), []
    for episode, cameras in sizes.items():
        combination = tuple(cameras.items())
        if len(cameras) < len(data.cameras) or combination in tried:
            continue
        tried.add(combination)
        try:
            cameras_lib.canvas({c: np.zeros((*s, 3), np.uint8) for c, s in combination}, data)
        except ValueError as error:
            kind, file = "does not fit the canvas", files[episode]
            only = all(other == cameras for other in sizes.values())
            problems.append(Problem.error(kind, "" if only else episode, file, str(error)))
    return problems


def _stretched(looks, data):
    """Warnings about cameras whose images the canvas shows much taller or wider than they are."""
    problems = []
    for camera in data.cameras:
        sizes = [look.size for look in looks if look.camera == camera and look.size]
        # Other sizes than the usual one are a warning already.
        for size, count in collections.Counter(sizes).most_common(1):
            try:
                place = cameras_lib.given_sizes(data)[camera]
            except ValueError:  # `_canvases` says so
                return []
            taller = place[0] / size[0] / (place[1] / size[1])
            if max(taller, 1 / taller) < _STRETCH:
                continue
            how = f"{taller:.2f} times as tall" if taller > 1 else f"{1 / taller:.2f} times as wide"
            message = (
                f"camera {camera!r} records {_size(size)} (height x width) in "
                f"{many(count, 'episode')}; on the canvas it is {_size(place)}: things look {how} "
                "as they are"
            )
            problems.append(Problem.warning(STRETCHED, "", data.path, message))
    return problems


def _camera(name, looks, videos):
    seen = [_size(look.size) for look in looks if look.camera == name and look.size]
    codecs = [info.codec for camera, info in videos if camera == name]
    return Camera(name, dict(collections.Counter(seen)), dict(collections.Counter(codecs)))


def _size(size):
    return f"{size[0]}x{size[1]}"


def _examples(episodes, data):
    """Returns (`Example`s of some of the `episodes`, problems); long ones are preferred."""
    episodes = [e for e in episodes if e.length >= data.num_frames] or episodes
    if not episodes:
        return (), []
    examples, problems = [], []
    for number in np.unique(np.linspace(0, len(episodes) - 1, _EXAMPLES).astype(int)):
        episode = episodes[number]
        steps = np.unique([0, episode.length // 2, episode.length - 1])
        try:
            raw = {camera: episode.frames(camera, steps) for camera in data.cameras}
            canvas = encoders_base.to_uint8(cameras_lib.canvas(raw, data))
        except FrameError as error:  # of the middle, which "ends" leaves out
            problems.append(_undecodable(episode, error))
            continue
        except ValueError:  # it does not fit the canvas: `_canvases` says so
            continue
        known = episode.id, episode.task, episode.fps, tuple(steps.tolist())
        examples.append(Example(*known, raw, canvas, episode.action))
    return tuple(examples), problems


def _played(episodes, data):
    """The first of the episodes as `Played`; None where there is none, or it does not decode."""
    for episode in episodes[:1]:
        stride = -(-episode.length // _PLAYED)
        steps = np.arange(0, episode.length, stride)
        try:
            raw = {camera: episode.frames(camera, steps) for camera in data.cameras}
        except FrameError:  # not among those looked at with "ends"; training would name it
            return None
        canvas = encoders_base.to_uint8(cameras_lib.canvas(raw, data))
        known = episode.id, episode.task_at(0), episode.fps, stride
        return Played(*known, canvas, episode.state, episode.action)
    return None
