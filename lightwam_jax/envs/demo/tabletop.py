"""A MuJoCo table-top task that needs eyes, language and a hand: "put the red cube in the tray".

Several coloured objects lie at random places and the instruction names one of them; colours are
shuffled over the places in every episode, so that nothing but the words tells which one is meant.
Success: the named object rests in the tray, let go, and no other object does.

Contacts are real: the gripper holds by friction, can push, miss, and drop. The task is nevertheless
kind: the open gripper leaves about 2 cm on either side of an object, and the tray about 3.
"""

import dataclasses

import mujoco
import numpy as np

from lightwam_jax.envs.demo import render as render_lib
from lightwam_jax.envs.demo import scene as scene_lib

ACTION_DIM = 4  # velocity x, y, z of the hand as a share of SPEED; gripper: > 0 closes
PROPRIO_DIM = 5  # hand x, y, z (m); gap between the pads (m); 1 when both pads touch an object
CAMERAS = ("scene", "wrist")
MAX_STEPS = 60
FPS = 10
SPEED = 0.25  # m/s
_SUBSTEPS = 20
TASK_VERSION = 5  # raise when recorded demonstrations no longer fit the task


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """The knobs; the defaults favour what a small policy learns quickly over richness.

    Attributes:
      objects: objects on the table; an ear-less policy succeeds once in this many episodes.
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


def sample_scene(seed, difficulty):
    """Returns the `demo_scene.Scene` of a seed.

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
    """One simulated table. The same seed and actions give the same bits in any process."""

    def __init__(self, image_size=64, difficulty=None, smooth=False):
        """Makes a table that `reset` lays.

        Args:
          image_size: pixels per side of the images in observations.
          difficulty: `Difficulty`; None: the default.
          smooth: whether those images are anti-aliased, which takes about half as long again.
        """
        self.image_size = image_size
        self.smooth = smooth
        self.difficulty = difficulty or Difficulty()
        self.scene = None

    def reset(self, seed):
        """Starts the episode of a seed (an int >= 0) and returns `observe()`."""
        self.scene = sample_scene(seed, self.difficulty)
        self.model = mujoco.MjModel.from_xml_string(scene_lib.mjcf(self.scene))
        self.data = mujoco.MjData(self.model)
        self._renderer = render_lib.Renderer(self.model)
        self._joints = [self.model.joint(n).qposadr[0] for n in ("x", "y", "z", "left", "right")]
        self._pads = [self.model.geom(n).id for n in ("left", "right")]
        self._objects = [self.model.geom(f"object_{i}").id for i in range(len(self.scene.objects))]
        self._bodies = self.model.geom_bodyid[self._objects]
        self.data.qpos[self._joints] = (
            *self.scene.hand,
            scene_lib.OPENING / 2,
            scene_lib.OPENING / 2,
        )
        self.data.ctrl[3:] = scene_lib.OPENING / 2
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.observe()

    def step(self, action):
        """Moves for 1 / FPS seconds.

        Args:
          action: [4] float in -1..1 (clipped): velocity of the hand as a share of SPEED, gripper
            (> 0 closes).

        Returns:
          (success, done): done also when a wrong object lies in the tray or time is up.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(
                f"action is {action}; expected {ACTION_DIM} finite numbers "
                "(velocity x, y, z and gripper): check the policy's normalisation"
            )
        self.data.ctrl[:3] = np.clip(action[:3], -1, 1) * SPEED
        self.data.ctrl[3:] = 0.0 if action[3] > 0 else scene_lib.OPENING / 2
        mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        # mj_step leaves positions one step ahead of contacts and frames; bring them together.
        mujoco.mj_forward(self.model, self.data)
        self.steps += 1
        rests = [self.rests(i) for i in range(len(self._objects))]
        success = rests[self.scene.target] and sum(rests) == 1
        wrong = any(r for i, r in enumerate(rests) if i != self.scene.target)
        return success, success or wrong or self.steps >= MAX_STEPS

    def observe(self):
        """Returns {"images": {camera: [S, S, 3] uint8}, "state": [5] float32, "prompt": str}."""
        images = {camera: self.render(camera) for camera in CAMERAS}
        return {"images": images, "state": self.state, "prompt": self.scene.prompt}

    def render(self, camera="scene", size=None):
        """Returns an image [size, size, 3] uint8; without a size, just as the policy sees it."""
        if camera not in CAMERAS:
            raise KeyError(f"no camera {camera!r}; the table has {', '.join(CAMERAS)}")
        if size is None:
            return self._renderer.render(self.data, camera, self.image_size, self.smooth)
        return self._renderer.render(self.data, camera, size)

    @property
    def state(self):
        """Proprioception [5] float32; see PROPRIO_DIM."""
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
