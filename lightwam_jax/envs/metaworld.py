"""Meta-World v3 (https://meta-world.github.io): 50 tasks of a Sawyer arm with a gripper.

What the policy gets: two cameras, the first four numbers of Meta-World's observation (hand x, y, z
in metres, opening of the gripper 0..1) and an instruction. It does not get the rest of the
observation: the places of the objects and, in numbers 36 to 38, of the goal. Where Meta-World draws
the goal as a coloured ball (reach, push, ...), the cameras see it: there is no other way to know
where to go.

What differs from Meta-World's own images, as `describe` says: corner2 is mounted upside down, so
its images are turned by 180 degrees; it stands nearer and has a longer lens, so that the table
fills the image; shadows, reflections and multisampling are off, because they take most of the time
when rendering on a CPU.
"""

import importlib.metadata
import os
import warnings

import numpy as np

from lightwam_jax.envs import base as envs_base

CAMERAS = ("corner2", "gripperPOV")
STATE = ("x", "y", "z", "gripper")
ACTION = ("dx", "dy", "dz", "gripper")  # -1..1; the hand's target moves by up to 1 cm a step
FPS = 80
ROBOT = "sawyer"
MOST_STEPS = 500  # Meta-World's own limit
_CORNER2 = {"pos": (0.75, 0.075, 0.7), "fovy": 30.0}
_PACKAGES = ("metaworld", "mujoco", "gymnasium", "numpy", "scipy")

INSTRUCTIONS = {
    "assembly-v3": "pick up the ring by its handle and put it on the peg",
    "basketball-v3": "put the basketball into the hoop",
    "bin-picking-v3": "move the block from one bin into the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button down from above",
    "button-press-topdown-wall-v3": "press the button behind the wall down from above",
    "button-press-v3": "press the button on the front of the box",
    "button-press-wall-v3": "reach around the wall and press the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the ring off the peg",
    "door-close-v3": "close the door of the cabinet",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door of the cabinet",
    "door-unlock-v3": "unlock the door",
    "hand-insert-v3": "put the hand into the hole",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-open-v3": "turn the faucet on",
    "faucet-close-v3": "turn the faucet off",
    "hammer-v3": "drive in the nail with the hammer",
    "handle-press-side-v3": "press the handle at the side down",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle at the side up",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "pick-place-wall-v3": "lift the puck over the wall to the goal",
    "pick-out-of-hole-v3": "take the puck out of the hole",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "plate-slide-v3": "slide the plate into the net",
    "plate-slide-side-v3": "slide the plate sideways into the net",
    "plate-slide-back-v3": "slide the plate back out of the net",
    "plate-slide-back-side-v3": "slide the plate sideways out of the net",
    "peg-insert-side-v3": "insert the peg into the hole at the side",
    "peg-unplug-side-v3": "pull the peg out of the hole at the side",
    "soccer-v3": "push the ball into the goal net",
    "stick-push-v3": "push the thermos with the stick",
    "stick-pull-v3": "pull the thermos with the stick",
    "push-v3": "push the puck to the green goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "push-back-v3": "pull the puck back to the goal",
    "reach-v3": "move the hand to the red goal",
    "reach-wall-v3": "move the hand over the wall to the goal",
    "shelf-place-v3": "put the block on the shelf",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-open-v3": "open the window",
    "window-close-v3": "close the window",
}


def _tasks(names):
    return tuple(f"{name}-v3" for name in names.split())


_MT10 = _tasks(
    "reach push pick-place door-open drawer-open drawer-close button-press-topdown "
    "peg-insert-side window-open window-close"
)
_MT25 = _MT10 + _tasks(
    "coffee-pull pick-out-of-hole disassemble pick-place-wall basketball stick-pull "
    "button-press-wall faucet-open door-lock lever-pull sweep-into faucet-close coffee-button "
    "button-press-topdown-wall dial-turn"
)
# As in Meta-World 3.1.1, which calls any single task MT1.
SETS = {"MT10": _MT10, "MT25": _MT25, "MT50": tuple(INSTRUCTIONS)}
TASKS = tuple(INSTRUCTIONS)


def make(image_size=128, corner2=None):
    """Returns a new `MetaWorldEnv`.

    Args:
      image_size: pixels per side of what the policy sees.
      corner2: {"pos": (x, y, z) metres, "fovy": degrees} of that camera; {}: as in Meta-World.

    Raises:
      ImportError: Meta-World is not installed.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported
    warnings.filterwarnings("ignore", "Constant.s. may be too high")  # the experts' own
    try:
        import metaworld  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Meta-World is needed here ({error}): make setup-sim") from error
    return MetaWorldEnv(image_size, _CORNER2 if corner2 is None else corner2)


def episodes(tasks, count, first_seed):
    """Returns `count` episodes of each task, of the seeds from `first_seed` on.

    Args:
      tasks: names of tasks or of `SETS`; all tasks of a set in its order.

    Raises:
      ValueError: an unknown task.
    """
    if "MT1" in tasks:
        raise ValueError("MT1 is any single task of Meta-World: give its name, e.g. reach-v3")
    names = [name for task in tasks for name in SETS.get(task, (task,))]
    if unknown := sorted(set(names) - set(INSTRUCTIONS)):
        raise ValueError(
            f"Meta-World has no task {', '.join(unknown)}; expected names like "
            f"reach-v3 (see {__name__}.INSTRUCTIONS) or {', '.join(SETS)}"
        )
    seeds = range(first_seed, first_seed + count)
    return [envs_base.EpisodeSpec(name, 0, seed) for name in dict.fromkeys(names) for seed in seeds]


class MetaWorldEnv:
    """One simulated table; `envs/base.py` says what each method promises.

    The same episode and actions give the same bits in any process, whatever ran before.
    """

    def __init__(self, image_size, corner2):
        self._image_size, self._corner2 = image_size, corner2
        self._task = self._env = None
        self._renderers = {}  # by size

    def reset(self, episode):
        """Starts an episode (`base.EpisodeSpec`) and returns the first observation."""
        if episode.task != self._task:
            self._load(episode.task)
        self._env.seed(episode.seed)
        self._numbers, _ = self._env.reset()
        return self.observe()

    def observe(self):
        """Returns {"images": {camera: uint8 [S,S,3]}, "state": f32 [4], "prompt": str}."""
        images = {camera: self.image(camera, self._image_size) for camera in CAMERAS}
        return {
            "images": images,
            "state": self._numbers[: len(STATE)].astype(np.float32),
            "prompt": INSTRUCTIONS[self._task],
        }

    def step(self, action):
        """Executes one action f32 [4], clipped to -1..1; returns (None, success, done)."""
        self._numbers, _, _, timeout, info = self._env.step(np.clip(action, -1, 1))
        success = bool(info["success"])
        return None, success, success or timeout

    def expert_action(self):
        """Returns the action f32 [4] of Meta-World's scripted policy for the present state."""
        return np.clip(self._expert.get_action(self._numbers), -1, 1).astype(np.float32)

    def image(self, camera, size):
        """Returns the camera's view as uint8 [size,size,3]."""
        import mujoco

        if size not in self._renderers:
            self._renderers[size] = mujoco.Renderer(self._env.model, size, size)
            # Nothing in sight reflects, and looking for it would take half of the time.
            self._renderers[size].scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # After a reset, Meta-World leaves the goal drawn where it was before.
        mujoco.mj_kinematics(self._env.model, self._env.data)
        self._renderers[size].update_scene(self._env.data, camera)
        pixels = self._renderers[size].render()
        return np.ascontiguousarray(pixels[::-1, ::-1] if camera == "corner2" else pixels)

    def other_instructions(self):
        """Returns the instructions of the other tasks."""
        return [text for task, text in INSTRUCTIONS.items() if task != self._task]

    def describe(self):
        """Returns the versions and settings that decide physics and pixels, as plain values."""
        from OpenGL import GL

        names = (GL.glGetString(name).decode() for name in (GL.GL_RENDERER, GL.GL_VERSION))
        return {
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "renderer": ", ".join((os.environ["MUJOCO_GL"], *names)),
            "cameras": list(CAMERAS),
            "image_size": self._image_size,
            "corner2": {"turned": 180, **self._corner2},
            "shadows": False,
            "samples": 0,
            "reflections": False,
            "goal": "visible where Meta-World draws it; not in the state",
        }

    def close(self):
        """Frees the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    def _load(self, task):
        from metaworld import env_dict, policies

        self.close()
        env = self._env = env_dict.ALL_V3_ENVIRONMENTS[task]()
        # Places and goal are drawn from `seed`, and the experts are told the goal.
        env.seeded_rand_vec, env._freeze_rand_vec, env._set_task_called = True, False, True
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached, and clips the goal to 0
        env.model.vis.quality.shadowsize = env.model.vis.quality.offsamples = 0
        camera = env.model.camera("corner2").id
        if "pos" in self._corner2:
            env.model.cam_pos[camera] = self._corner2["pos"]
        if "fovy" in self._corner2:
            env.model.cam_fovy[camera] = self._corner2["fovy"]
        self._task, self._expert = task, policies.ENV_POLICY_MAP[task]()
