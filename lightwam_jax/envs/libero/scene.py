"""What LIBERO's scripted expert sees of the simulation, and how it moves the hand.

Metres and radians, in the frame of the world. A rotation of the hand is a matrix [3,3]: its first
column is the direction in which the fingers open, its last the one in which they point.
"""

import functools

import numpy as np
from scipy.spatial import transform

# One unit of an action asks for 0.05 metres or 0.5 radians, of which the controller does a third in
# a step. So twice as much is asked for as is missing.
_REACH, _TURN = 0.025, 0.25
_FASTEST_TURN = 0.6  # of an action
_STILL = 0.01  # metres per second: the fingers have stopped


class Scene:
    """One simulated scene. It reads the simulation anew at every call."""

    def __init__(self, env):
        """`env`: LIBERO's inner environment, just reset."""
        self.env = env
        self._model, self._robot = env.sim.model, env.robots[0]
        parents = self._model.body_parentid
        roots = [{body} for body in range(self._model.nbody)]
        for body in range(1, self._model.nbody):  # a parent comes before its children
            roots[body] |= roots[parents[body]]
        self._roots = roots
        # Kept with the scene, which lives for one episode.
        self._among, self._local = functools.cache(self._shapes), functools.cache(self._boxes)
        pads = self._robot.gripper.important_geoms
        self._pads = np.zeros((2, self._model.ngeom), bool)
        for side, names in zip(self._pads, (pads["left_finger"], pads["right_finger"])):
            side[[self._model.geom_name2id(name) for name in names]] = True
        self._arm = self._among(self._model.body_name2id(self._robot.robot_model.root_body))
        self.rest = self.rotation  # of the hand at the start

    @property
    def hand(self):
        """Where the grip is, [3]."""
        return self.env.sim.data.site_xpos[self._robot.eef_site_id].copy()

    @property
    def base(self):
        """Where the robot stands, [3]."""
        return self._robot.base_pos

    @property
    def rotation(self):
        """The rotation of the hand, [3,3]."""
        return self.env.sim.data.site_xmat[self._robot.eef_site_id].reshape(3, 3).copy()

    @property
    def opening(self):
        """How far the fingers are apart."""
        return np.abs(self.env.sim.data.qpos[self._robot._ref_gripper_joint_pos_indexes]).sum()

    @property
    def still(self):
        """Whether the fingers have stopped."""
        speeds = self.env.sim.data.qvel[self._robot._ref_gripper_joint_vel_indexes]
        return bool(np.abs(speeds).max() < _STILL)

    def move(self, goal, rotation, gripper, slow=1.0):
        """Returns the action f64 [7] towards a place [3] and a rotation [3,3] of the hand.

        Args:
          gripper: -1 opens, 1 closes. slow: the largest part of an action that it moves with.
        """
        step = (goal - self.hand) / _REACH
        step *= min(1.0, slow / max(np.abs(step).max(), 1e-9))
        turn = rotation_vector(rotation @ self.rotation.T) / _TURN
        turn *= min(1.0, _FASTEST_TURN / max(np.abs(turn).max(), 1e-9))
        return np.clip([*step, *turn, gripper], -1, 1)

    # ---- things ------------------------------------------------------------------------------

    def root(self, name):
        """The body of an object or a fixture, by name."""
        return self.env.obj_body_id[name]

    def place(self, name):
        """Where a thing's body is, [3]."""
        return self.env.sim.data.body_xpos[self.root(name)].copy()

    def loose(self, name):
        """Whether it is an object that can be carried, not a fixture or a region."""
        return name in self.env.objects_dict

    @property
    def names(self):
        """All objects and fixtures except the table."""
        return list(self.env.obj_body_id)

    def box(self, body):
        """Returns (lowest, highest) corner of what belongs to a body."""
        points = self.points(body)
        return points.min(axis=0), points.max(axis=0)

    def points(self, body, per_edge=2):
        """Points of the boxes round a body's collision shapes, [n,3].

        A grid over each box, `per_edge` points along an edge: its corners, with 2.
        """
        geoms, local = self._local(body, per_edge)
        data = self.env.sim.data
        turns = data.geom_xmat[geoms].reshape(-1, 1, 3, 3)
        return (data.geom_xpos[geoms][:, None] + (turns @ local[..., None])[..., 0]).reshape(-1, 3)

    def ridge(self, body):
        """Returns (middle of the top [3], direction across [3]) of a body's highest shape."""
        geoms, local = self._local(body, 2)
        corners = self.points(body).reshape(len(geoms), -1, 3)
        highest = int(np.argmax(corners[..., 2].max(axis=1)))
        turn = self.env.sim.data.geom_xmat[geoms[highest]].reshape(3, 3)
        level = [k for k in range(3) if abs(turn[2, k]) < 0.5]
        narrow = min(level, key=lambda k: np.ptp(local[highest, :, k]))
        middle = corners[highest].mean(axis=0)
        middle[2] = corners[highest, :, 2].max()
        across = turn[:, narrow] * [1, 1, 0]
        return middle, across / np.linalg.norm(across)

    def tops(self, bodies, start, end, radius):
        """The highest point that bodies have within `radius` of the line between two places."""
        if not bodies:
            return -np.inf
        points = np.concatenate([self.points(body, per_edge=3) for body in bodies])
        way = (end - start)[:2]
        along = (points[:, :2] - start[:2]) @ way / max(way @ way, 1e-9)
        nearest = start[:2] + np.clip(along, 0, 1)[:, None] * way
        near = np.linalg.norm(points[:, :2] - nearest, axis=1) < radius
        return points[near, 2].max(initial=-np.inf)

    # ---- contacts ----------------------------------------------------------------------------

    def between(self, body):
        """Whether both fingers touch what belongs to a body."""
        theirs = self._among(body)[self._contacts()].any(axis=1)
        return all((side[self._contacts()].any(axis=1) & theirs).any() for side in self._pads)

    def in_hand(self, body):
        """Where a body is in the frame of the hand, [3]."""
        return self.rotation.T @ (self.env.sim.data.body_xpos[body] - self.hand)

    def rests(self, body):
        """Whether a body touches anything but the robot."""
        mine = self._among(body)[self._contacts()]
        known = mine | self._arm[self._contacts()]
        return bool((mine.any(axis=1) & ~known.all(axis=1)).any())

    def _contacts(self):
        return self.env.sim.data._data.contact.geom

    # ---- regions and joints ------------------------------------------------------------------

    def region(self, name):
        """Returns (middle [3], half its height) of a region."""
        turned = self.env.sim.data.get_site_xmat(name) @ self.env.object_sites_dict[name].size
        return self.env.sim.data.get_site_xpos(name).copy(), abs(turned[2])

    def fixture_of(self, name):
        """The name of what has a region; None: the table."""
        return self.env.object_states_dict[name].parent_name

    def region_joint(self, name):
        """The joint of the part that a region lies in; None where it does not move."""
        joints = getattr(self.env.object_sites_dict.get(name), "joints", None)
        return joints[0] if joints else None

    def joint(self, name):
        """Returns (position, body, anchor [3], axis [3]) of a joint."""
        joint, data = self._model.joint_name2id(name), self.env.sim.data
        position = data.qpos[self._model.jnt_qposadr[joint]]
        axis = data.xaxis[joint] / np.linalg.norm(data.xaxis[joint])
        return position, self._model.jnt_bodyid[joint], data.xanchor[joint].copy(), axis

    def true(self, predicate):
        """Whether a part of the goal has been reached."""
        return bool(self.env._eval_predicate(predicate))

    # ---- what does not change ----------------------------------------------------------------

    def _shapes(self, body):
        """Which shapes belong to a body or to those that hang on it, bool [shapes]."""
        return np.array([body in self._roots[b] for b in self._model.geom_bodyid])

    def _boxes(self, body, per_edge):
        """Returns (shapes [g], points of their boxes in their own frames [g,n,3])."""
        geoms = np.flatnonzero(self._among(body) & (self._model.geom_contype != 0))
        boxes = self._model._model.geom_aabb[geoms]  # centre and half size
        grid = np.array(np.meshgrid(*[np.linspace(-1, 1, per_edge)] * 3)).reshape(3, -1).T
        return geoms, boxes[:, None, :3] + grid * boxes[:, None, 3:]


def rotation_vector(matrix):
    """Returns a rotation [3,3] as its axis times its angle, [3]."""
    sine = (
        np.array(
            [matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]
        )
        / 2
    )
    cosine = (np.trace(matrix) - 1) / 2
    if cosine < -0.99:  # near half a turn its axis is not to be read from there
        return transform.Rotation.from_matrix(matrix).as_rotvec()
    size = np.linalg.norm(sine)
    return sine * (np.arctan2(size, cosine) / size if size > 1e-9 else 1.0)


def turned(angle):
    """Returns the rotation [3,3] about the vertical by an angle."""
    return transform.Rotation.from_euler("z", angle).as_matrix()


def pointing(approach, fingers):
    """Returns the hand's rotation [3,3] that points along one direction, fingers along another."""
    fingers = fingers - (fingers @ approach) * approach
    fingers /= np.linalg.norm(fingers)
    return np.stack([fingers, np.cross(approach, fingers), approach], axis=1)


def up(metres):
    """Returns a step upwards, [3]."""
    return np.array([0.0, 0.0, metres])
