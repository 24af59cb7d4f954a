"""The demo suite: a MuJoCo table-top task that needs eyes, language and a hand.

"put the red cube in the tray": several coloured objects lie at random places and the instruction
names one of them. Colours are shuffled over the places in every episode, so that only the words
tell which one is meant. Success: the named object rests in the tray, let go, and no other does.

Contacts are real: the gripper holds by friction, can push, miss, and drop. The task is still kind:
the open gripper leaves about 2 cm on either side of an object, and the tray about 3.
"""

import dataclasses
import importlib.metadata

import mujoco
import numpy as np

from lightwam_jax.envs import base as envs_base
from lightwam_jax.envs.demo import expert as expert_lib
from lightwam_jax.envs.demo import render as render_lib
from lightwam_jax.envs.demo import scene as scene_lib

TASKS = ("tabletop",)
CAMERAS = ("scene", "wrist")
# Hand x, y, z (m); gap between the pads (m); 1 when both pads touch an object.
STATE = ("x", "y", "z", "gap", "held")
# Velocity of the hand as a share of `scene.SPEED`, -1..1; gripper: above 0 closes.
ACTION = ("vx", "vy", "vz", "gripper")
FPS = scene_lib.FPS
MOST_STEPS = 60
ROBOT = "demo"
FUMBLES = (0.004, 2)
TASK_VERSION = 5  # raise when recorded demonstrations no longer fit the task
_SUBSTEPS = 20  # of the physics, per control step


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """What can be made harder; the defaults are what a small policy learns quickly.

    Attributes:
      objects: on the table; who ignores the instruction succeeds once in this many episodes.
      colours, shapes: what they are drawn from; colours never repeat within an episode.
      object_x, object_y: range of the middles, metres.
      spacing: least distance between two middles, metres.
      yaw: largest turn of an object, radians (the hand itself cannot turn).
      tray_x, tray_y: range of the middle of the tray, metres.
      hand_x, hand_y, hand_z: where the hand starts, metres: over the whole table, so that its
        place says nothing about the object that is meant.
    """

    objects: int = 3
    colours: tuple = ("red", "green", "blue", "yellow")
    shapes: tuple = ("cube", "cylinder")
    object_x: tuple = (-0.12, 0.03)
    object_y: tuple = (-0.09, 0.09)
    spacing: float = 0.085
    yaw: float = 0.15
    tray_x: tuple = (0.165, 0.165)
    tray_y: tuple = (-0.04, 0.04)
    hand_x: tuple = (-0.16, 0.10)
    hand_y: tuple = (-0.11, 0.11)
    hand_z: tuple = (0.085, 0.155)


SETTINGS = {"task_version": TASK_VERSION, "difficulty": dataclasses.asdict(Difficulty())}


def make(image_size=64, **difficulty):
    """Returns a new `TabletopEnv`.

    Args:
      image_size: pixels per side of the images the policy sees; as recorded.
      **difficulty: fields of `Difficulty` to change.

    Raises:
      ValueError: another argument, or an image_size that is no number of pixels.
    """
    known = [field.name for field in dataclasses.fields(Difficulty)]
    if unknown := sorted({*difficulty} - {*known}):
        raise ValueError(
            f"the demo's environment has no {', '.join(unknown)}; it has image_size, "
            f"{', '.join(known)}"
        )
    if not (isinstance(image_size, int) and image_size > 0):
        raise ValueError(f"image_size is {image_size!r}; expected a number of pixels above 0")
    return TabletopEnv(image_size, Difficulty(**difficulty))


def episodes(tasks, count, first_seed):
    """Returns `count` episodes, of the seeds from `first_seed` on; the one task is `TASKS[0]`."""
    if unknown := sorted({*tasks} - {*TASKS}):
        raise ValueError(f"the demo has no task {', '.join(unknown)}; it has {', '.join(TASKS)}")
    return [envs_base.EpisodeSpec(TASKS[0], 0, first_seed + i) for i in range(count)]


def disturbed_by(episode):
    """Returns the seed of the disturbances of a recorded episode."""
    return [TASK_VERSION, episode.seed, 1]


def sample_scene(seed, difficulty):
    """Returns the `scene.Scene` of a seed.

    Raises:
      ValueError: the objects do not fit at the wanted spacing.
    """
    d = difficulty
    if not 1 <= d.objects <= len(d.colours):
        raise ValueError(
            f"objects={d.objects} with {len(d.colours)} colours; expected 1 to {len(d.colours)}, "
            "since no two objects of an episode share a colour"
        )
    rng = np.random.default_rng([TASK_VERSION, seed])
    low, high = np.array([d.object_x, d.object_y]).T
    for _ in range(10_000):
        places = rng.uniform(low, high, (d.objects, 2))
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(d.objects)
        if gaps.min() >= d.spacing:
            break
    else:
        raise ValueError(
            f"{d.objects} objects do not fit into x {d.object_x}, y {d.object_y} at a spacing of "
            f"{d.spacing} m: give fewer objects, more room or less spacing"
        )
    colours = rng.permutation(len(d.colours))[: d.objects]
    shapes = rng.integers(len(d.shapes), size=d.objects)
    yaws = rng.uniform(-d.yaw, d.yaw, d.objects)
    objects = tuple(
        (d.colours[c], d.shapes[s], float(x), float(y), float(yaw))
        for c, s, (x, y), yaw in zip(colours, shapes, places, yaws)
    )
    tray = (float(rng.uniform(*d.tray_x)), float(rng.uniform(*d.tray_y)))
    hand = rng.uniform(*np.array([d.hand_x, d.hand_y, d.hand_z]).T)
    return scene_lib.Scene(
        objects, int(rng.integers(d.objects)), tray, tuple(float(v) for v in hand)
    )


class TabletopEnv:
    """One simulated table; `envs/base.py` says what each method of the protocol promises.

    The same episode and actions give the same bits in any process.
    """

    def __init__(self, image_size=64, difficulty=None):
        """`image_size`: pixels per side of what the policy sees; `difficulty`: None: defaults."""
        self.image_size = image_size
        self.difficulty = difficulty or Difficulty()
        self.scene = None

    def reset(self, episode):
        """Lays the table of an episode (`base.EpisodeSpec`) and returns `observe()`."""
        self.scene = sample_scene(episode.seed, self.difficulty)
        self.model = mujoco.MjModel.from_xml_string(scene_lib.mjcf(self.scene))
        self.data = mujoco.MjData(self.model)
        self._renderer = render_lib.Renderer(self.model)
        self._joints = [self.model.joint(n).qposadr[0] for n in ("x", "y", "z", "left", "right")]
        self._pads = [self.model.geom(n).id for n in ("left", "right")]
        self._objects = [self.model.geom(f"object_{i}").id for i in range(len(self.scene.objects))]
        self._bodies = self.model.geom_bodyid[self._objects]
        half = scene_lib.OPENING / 2
        self.data.qpos[self._joints] = (*self.scene.hand, half, half)
        self.data.ctrl[3:] = half
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.observe()

    def observe(self):
        """Returns {"images": {camera: uint8 [S,S,3]}, "state": f32 [5], "prompt": str}."""
        images = {camera: self.image(camera) for camera in CAMERAS}
        return {"images": images, "state": self.state, "prompt": self.scene.prompt}

    def step(self, action):
        """Moves for 1 / FPS seconds: `action` [4] as `ACTION` says, clipped to -1..1.

        Returns:
          (None, success, done): done also when a wrong object lies in the tray or time is up.

        Raises:
          ValueError: not four finite numbers.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (len(ACTION),) or not np.isfinite(action).all():
            raise ValueError(
                f"action is {action}; expected {len(ACTION)} finite numbers "
                "(velocity x, y, z and gripper): check the policy's normalisation"
            )
        self.data.ctrl[:3] = np.clip(action[:3], -1, 1) * scene_lib.SPEED
        self.data.ctrl[3:] = 0.0 if action[3] > 0 else scene_lib.OPENING / 2
        mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        # mj_step leaves positions one step ahead of contacts and frames; bring them together.
        mujoco.mj_forward(self.model, self.data)
        self.steps += 1
        rests = [self.rests(i) for i in range(len(self._objects))]
        success = rests[self.scene.target] and sum(rests) == 1
        wrong = any(r for i, r in enumerate(rests) if i != self.scene.target)
        return None, success, success or wrong or self.steps >= MOST_STEPS

    def expert_action(self):
        """Returns the scripted expert's action f32 [4] for the present state."""
        return expert_lib.act(self)

    def image(self, camera, size=None):
        """Returns the camera's view, uint8 [size,size,3]; without a size, as the policy sees it.

        What the policy sees is not anti-aliased, which would take half as long again.
        """
        if camera not in CAMERAS:
            raise KeyError(f"no camera {camera!r}; the table has {', '.join(CAMERAS)}")
        return self._renderer.render(self.data, camera, size or self.image_size, bool(size))

    def other_instructions(self):
        """Returns the instructions that name the other objects on the table."""
        others = (i for i in range(len(self.scene.objects)) if i != self.scene.target)
        return [dataclasses.replace(self.scene, target=i).prompt for i in others]

    def describe(self):
        """Returns the versions that decide physics and pixels."""
        return {
            "versions": {"mujoco": importlib.metadata.version("mujoco")},
            "task_version": TASK_VERSION,
            "renderer": "rays, in numpy",
        }

    @property
    def state(self):
        """Proprioception f32 [5], as `STATE` says."""
        held = any(self.held(i) for i in range(len(self._objects)))
        return np.array([*self.hand, self.gap, held], np.float32)

    @property
    def hand(self):
        """Place of the point between the finger tips, [3] metres."""
        return self.data.qpos[self._joints[:3]]

    @property
    def gap(self):
        """Distance between the pads, metres."""
        return float(self.data.qpos[self._joints[3]] + self.data.qpos[self._joints[4]])

    def place(self, index):
        """Middle of object `index`, [3] metres."""
        return self.data.xpos[self._bodies[index]]

    def touched(self, index):
        """Which pads (left, right) touch object `index`, two bools."""
        pairs = self.data.contact.geom[: self.data.ncon]
        mine = pairs[(pairs == self._objects[index]).any(1)]
        return tuple(bool((mine == pad).any()) for pad in self._pads)

    def held(self, index):
        """Whether both pads touch object `index`."""
        return all(self.touched(index))

    def inside(self, index):
        """Whether the middle of object `index` is over the tray's floor and not above its wall."""
        x, y, z = self.place(index)
        dx, dy = x - self.scene.tray[0], y - self.scene.tray[1]
        return max(abs(dx), abs(dy)) < scene_lib.TRAY_HALF and z < scene_lib.TRAY_WALL + 0.02

    def rests(self, index):
        """Whether object `index` lies in the tray, let go and (nearly) still."""
        if not self.inside(index) or any(self.touched(index)):
            return False
        velocity = self.data.cvel[self._bodies[index]]  # rotation, then translation
        return float(np.linalg.norm(velocity[3:])) < 0.05
