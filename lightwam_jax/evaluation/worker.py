"""What runs inside a simulator process: environments and the episodes in them. Never imports jax.

What an environment has to provide: `envs/base.py`.
"""

import base64
import dataclasses
import hashlib
import time
import traceback
import zlib

import numpy as np

from lightwam_jax.envs import base as envs_base
from lightwam_jax.inference import chunking


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """What came of an episode.

    Attributes:
      success: None when the episode could not be run; then `error` says why.
      seconds: spent in the simulator, without waiting for plans.
      checksum: CRC-32 of the executed actions: equal checksums, equal episodes.
      actions: f32 [steps, A], for `replay`.
      counts: what else was counted (`realtime_episode.py`); plain numbers.
      times: seconds of "reset" (with the first images), "steps" (with the expert), "images", and of
        waiting for "plans" (and the other episodes of the batch).
    """

    episode: envs_base.EpisodeSpec
    success: bool | None
    steps: int
    prompt: str
    error: str | None
    seconds: float
    checksum: int
    actions: np.ndarray = dataclasses.field(repr=False, compare=False)
    counts: dict = dataclasses.field(default_factory=dict, hash=False)
    times: dict = dataclasses.field(default_factory=dict, compare=False)

    def to_json(self):
        """Returns it as a plain dict; the actions are base64 of little-endian float32."""
        names = ("success", "steps", "prompt", "error", "seconds", "checksum")
        values = self.episode.to_json() | {name: getattr(self, name) for name in names}
        actions = base64.b64encode(self.actions.astype("<f4").tobytes()).decode()
        more = {name: x for name in ("counts", "times") if (x := getattr(self, name))}
        return values | {"actions": actions} | more

    @classmethod
    def from_json(cls, content):
        """Returns the result that `to_json` wrote; ValueError if it was damaged since."""
        try:
            content = {"counts": {}, "times": {}} | content
            values = {f.name: content[f.name] for f in dataclasses.fields(cls)[1:]}
            raw = base64.b64decode(values["actions"])
            episode, steps = envs_base.EpisodeSpec.from_json(content), values["steps"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no result of an episode: {error}") from error
        if zlib.crc32(raw) != values["checksum"]:
            raise ValueError(f"the actions of episode {episode.key} do not fit their checksum")
        actions = np.frombuffer(raw, "<f4").astype(np.float32)
        return cls(episode, **values | {"actions": actions.reshape(steps, -1 if steps else 0)})


def failed_to_run(episode, error):
    """Returns the `EpisodeResult` of an episode that says nothing about the policy."""
    return EpisodeResult(episode, None, 0, "", error, 0.0, 0, np.zeros((0, 0), np.float32))


def serve(pipe, spec, replan_steps, max_steps, expert, player=None):
    """Serves environments until the main process hangs up; `player` is as `play`, the default.

    Says ("ready", None, None) first. Messages in: ("start", slot, `EpisodeSpec`) and ("plan", slot,
    chunk [T,A]). Each is answered with ("observation", slot, observation) when the episode needs a
    plan, ("result", slot, `EpisodeResult`) when it is over, or ("error", slot, traceback).
    """
    envs, episodes, player = {}, {}, player or play
    pipe.send(("ready", None, None))
    while True:
        try:
            kind, slot, payload = pipe.recv()
        except EOFError:
            return
        try:
            if kind == "start":
                if slot not in envs:
                    envs[slot] = spec.make()
                episodes[slot] = player(envs[slot], payload, replan_steps, max_steps, expert)
                payload = None
            reply = ("observation", slot, episodes[slot].send(payload))
        except StopIteration as end:
            reply = ("result", slot, end.value)
        except Exception:  # an error of this episode; the others of this process go on
            reply = ("error", slot, traceback.format_exc())
            envs.pop(slot, None)  # its state is unknown: the next episode gets a new one
        pipe.send(reply)


def play(env, episode, replan_steps, max_steps, expert=False):
    """Generator: yields an observation, is sent a chunk [T,A], ..., returns an `EpisodeResult`."""
    times, mark = {"reset": 0.0, "steps": 0.0, "images": 0.0, "plans": 0.0}, time.monotonic()

    def took(name):
        nonlocal mark
        now = time.monotonic()
        times[name], mark = times[name] + now - mark, now

    observation = env.reset(episode)
    took("reset")
    prompt, queue, executed = observation["prompt"], chunking.ChunkQueue(replan_steps), []
    success = done = False
    while not done and len(executed) < max_steps:
        if expert:
            action = env.expert_action()
        else:
            if queue.empty:
                seen = env.observe() if executed else observation
                took("images")
                queue.push((yield seen))
                took("plans")
            action = queue.pop()
        executed.append(np.asarray(action, np.float32))
        _, success, done = env.step(executed[-1])
        took("steps")
    seconds = times["reset"] + times["steps"] + times["images"]
    return played(episode, success, prompt, executed, seconds, times=times)


def played(episode, success, prompt, executed, seconds, counts=None, times=None):
    """Returns the `EpisodeResult` of the actions [A] that an episode executed."""
    actions = np.stack(executed)
    values = bool(success), len(executed), prompt, None, seconds, zlib.crc32(actions.tobytes())
    return EpisodeResult(episode, *values, actions, counts or {}, times or {})


def describe(spec, episode):
    """Returns what decides physics and pixels of an environment, for the manifest.

    That is its own `describe()`, and "reset_frame": 16 hex digits over the first images and the
    state of `episode`. Machines that render alike agree in it.
    """
    env = spec.make()
    seen, digest = env.reset(episode), hashlib.sha256()
    for camera in sorted(seen["images"]):
        digest.update(camera.encode() + seen["images"][camera].tobytes())
    digest.update(seen["state"].astype("<f4").tobytes())
    own = env.describe() if hasattr(env, "describe") else {}
    return {**own, "reset_frame": {"episode": episode.key, "sha256": digest.hexdigest()[:16]}}


def replay(spec, result, every, size, replan_steps):
    """Repeats an episode that ran and takes its images.

    Args:
      spec: `EnvSpec`. result: its `EpisodeResult`.
      every: steps between two images. size: their edge in pixels.
      replan_steps: steps between two observations.

    Returns:
      {"frames": {camera: uint8 [n,size,size,3]}, "frame_steps": [n], "observations": [m], what the
      policy saw at each plan, "plan_steps": [m]}; the last frame shows the end.

    Raises:
      RuntimeError: the episode ended otherwise than it did before.
    """
    env = spec.make()
    cameras = list(env.reset(result.episode)["images"])
    frame_steps = sorted({*range(0, result.steps, every), result.steps})
    plan_steps = list(range(0, result.steps, replan_steps))
    frames, observations, success = {camera: [] for camera in cameras}, [], False
    for step in range(result.steps + 1):
        if step in frame_steps:
            for camera in cameras:
                frames[camera].append(env.image(camera, size))
        if step in plan_steps:
            observations.append(env.observe())
        if step < result.steps:
            _, success, _ = env.step(result.actions[step])
    if bool(success) != result.success:
        raise RuntimeError(
            f"episode {result.episode.key} ended with success={result.success} and, repeated with "
            f"the same actions, with {bool(success)}: episode and actions have to decide "
            "everything that happens in an environment"
        )
    return {
        "frames": {camera: np.stack(images) for camera, images in frames.items()},
        "frame_steps": frame_steps,
        "observations": observations,
        "plan_steps": plan_steps,
    }
