"""A scripted expert for LIBERO's tasks of picking up one thing and placing it: object and spatial.

It sees the simulation, not the images: hover, descend, close, lift, carry, lower, open. Things
narrower than the gripper are taken across their narrow side, wider ones (bowls) by the rim. What
slips out of the hand is taken again. It was written with boxes and cylinders for assets; how often
it succeeds is in docs/libero.md.
"""

import numpy as np

_REACH = 0.05  # metres that one unit of an action asks for
_TURN = 0.5  # radians likewise
_OPENING = 0.072  # metres: what is wider does not fit between the fingers
_CLOSING = 8  # steps to close the gripper
_OPENING_STEPS = 6
_DEPTH = 0.03  # metres that the grip reaches below the top of a thing
_CLEARANCE = 0.012  # metres between the grip and what the thing stands on
_HOVER = 0.08  # metres above a thing before descending and after lifting


class Expert:
    """Acts in one episode; make another for the next."""

    def __init__(self, env):
        """`env`: LIBERO's inner environment, just reset and settled.

        Raises:
          NotImplementedError: the goal is not one thing in or on another.
        """
        goal = env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on") or goal[0][1] not in env.objects_dict:
            raise NotImplementedError(f"the scripted expert places one thing; the goal is {goal}")
        self._env, (_, self._thing, self._target) = env, goal[0]
        self._phase, self._steps = "hover", 0
        self._grasp = self._choose_grasp()

    def act(self):
        """Returns the next action f64 [7] in the simulator's units: gripper -1 opens, 1 closes."""
        action = getattr(self, f"_{self._phase}")()
        self._steps += 1
        return np.clip(action, -1, 1)

    # ---- phases --------------------------------------------------------------------------------

    def _hover(self):
        self._grasp = self._follow(self._grasp)
        point, yaw = self._grasp[:2]
        above = point + _up(_HOVER + _DEPTH)
        # First up, then across: what stands in between is not swept away.
        low = self._hand[2] < above[2] - 0.03
        goal = np.array([*self._hand[:2], above[2]]) if low and self._off(point) > 0.03 else above
        if self._off(point) < 0.006 and abs(self._yaw_error(yaw)) < 0.05:
            self._next("descend")
        return self._move(goal, yaw, -1)

    def _descend(self):
        point, yaw = self._grasp[:2]
        if self._hand[2] < point[2] + 0.004 or self._steps > 40:
            self._next("close")
        return self._move(point, yaw, -1, slow=0.6)

    def _close(self):
        point, yaw = self._grasp[:2]
        if self._steps >= _CLOSING:
            self._height = self._place(self._thing)[2]
            self._held_at = self._hand - self._place(self._thing)
            self._next("lift")
        return self._move(point, yaw, 1)

    def _lift(self):
        goal = np.array([*self._grasp[0][:2], self._carrying])
        if self._slipped:
            return self._again()
        if self._hand[2] > self._carrying - 0.02 or self._steps > 40:
            self._next("carry")
        return self._move(goal, self._grasp[1], 1, slow=0.8)

    def _carry(self):
        if self._slipped:
            return self._again()
        error = self._goal - self._place(self._thing)
        if np.linalg.norm(error[:2]) < 0.012:
            self._next("lower")
        goal = np.array([*(self._hand + error)[:2], self._carrying])
        return self._move(goal, self._grasp[1], 1, slow=0.7)

    def _lower(self):
        error = self._goal - self._place(self._thing)
        if self._slipped:
            return self._again()
        if error[2] > -0.008 or self._steps > 25:  # or it stands already
            self._next("open")
        return self._move(self._hand + error, self._grasp[1], 1, slow=0.5)

    def _open(self):
        if self._steps >= _OPENING_STEPS:
            self._next("leave")
        return self._move(self._hand, self._grasp[1], -1)

    def _leave(self):
        if self._steps > 30:  # and it is still not solved
            return self._again()
        return self._move(self._hand + _up(0.05), self._grasp[1], -1)

    def _again(self):
        self._grasp = self._choose_grasp()
        self._next("hover")
        return self._move(self._hand + _up(0.05), self._grasp[1], -1)

    def _next(self, phase):
        self._phase, self._steps = phase, 0

    # ---- motion --------------------------------------------------------------------------------

    def _move(self, goal, yaw, gripper, slow=1.0):
        step = (goal - self._hand) / _REACH
        step *= min(1.0, slow / max(np.abs(step).max(), 1e-9))
        return np.array([*step, 0, 0, np.clip(self._yaw_error(yaw) / _TURN, -1, 1), gripper])

    def _off(self, point):
        return np.linalg.norm((point - self._hand)[:2])

    def _yaw_error(self, yaw):
        """What the hand still has to turn about the vertical; half a turn is no turn."""
        x, y = self._fingers[:2]
        return (yaw - np.arctan2(y, x) + np.pi / 2) % np.pi - np.pi / 2

    @property
    def _hand(self):
        """Where the grip is, [3]."""
        return self._env.sim.data.site_xpos[self._env.robots[0].eef_site_id].copy()

    @property
    def _fingers(self):
        """The direction in which the fingers open, [3]."""
        hand = self._env.sim.data.site_xmat[self._env.robots[0].eef_site_id]
        return hand.reshape(3, 3)[:, 0]

    @property
    def _slipped(self):
        thing = self._place(self._thing)
        return self._steps > 8 and np.linalg.norm(self._hand - thing - self._held_at) > 0.05

    # ---- the scene -----------------------------------------------------------------------------

    def _place(self, name):
        """Where a thing's body is, [3]."""
        return self._env.sim.data.body_xpos[self._env.obj_body_id[name]].copy()

    @property
    def _goal(self):
        """Where the thing's body has to be let go, [3]."""
        low = self._box(self._thing)[0][2] - self._place(self._thing)[2]
        if self._target in self._env.objects_dict:
            place = self._place(self._target)
            place[2] = self._box(self._target)[1][2] - low + 0.005  # just above its rim
            return place
        site = self._env.sim.data.get_site_xpos(self._target)
        half = self._env.object_sites_dict[self._target].size[2]
        return site + _up(half - low - 0.05)

    @property
    def _carrying(self):
        """How high the hand is while it carries: the thing passes over its target."""
        hangs = self._place(self._thing)[2] - self._box(self._thing)[0][2] + self._held_at[2]
        tops = [
            self._box(name)[1][2]
            for name in self._env.obj_body_id
            if name != self._thing and not self._env.is_fixture(name)
        ]
        return max(*tops, self._height) + max(hangs, 0.03) + 0.03

    def _points(self, name, per_edge=2):
        """Points of the boxes round a thing's collision shapes, [n,3] in the world.

        A grid over each box, `per_edge` points along an edge: its corners, with 2.
        """
        model, data = self._env.sim.model, self._env.sim.data
        root = self._env.obj_body_id[name]
        bodies = [b for b in range(model.nbody) if b == root or root in _ancestors(model, b)]
        solid = np.isin(model.geom_bodyid, bodies) & (model.geom_contype != 0)
        grid = np.array(np.meshgrid(*[np.linspace(-1, 1, per_edge)] * 3)).reshape(3, -1).T
        points = []
        for g in np.flatnonzero(solid):
            box = model._model.geom_aabb[g]  # centre and half size, in the shape's own frame
            turn = data.geom_xmat[g].reshape(3, 3)
            points.append(data.geom_xpos[g] + (box[:3] + grid * box[3:]) @ turn.T)
        return np.concatenate(points)

    def _box(self, name):
        """Returns (lowest, highest) corner of a thing in the world."""
        corners = self._points(name)
        return corners.min(axis=0), corners.max(axis=0)

    def _choose_grasp(self):
        """Returns (point [3], yaw of the fingers, offset of the point from the thing's body)."""
        corners = self._points(self._thing)
        low, high = corners[:, 2].min(), corners[:, 2].max()
        height = max(high - _DEPTH, low + _CLEARANCE)
        # Across: over half a turn, the direction in which the thing is narrowest.
        yaws = np.linspace(0, np.pi, 36, endpoint=False)
        across = np.stack([np.cos(yaws), np.sin(yaws)])
        along = corners[:, :2] @ across
        widths = np.ptp(along, axis=0)
        if widths.min() < _OPENING:
            fits = widths < widths.min() + 0.004
            # Of those, the one that turns the hand least.
            turns = np.abs([self._yaw_error(yaw) for yaw in yaws])
            best = int(np.argmin(np.where(fits, turns, np.inf)))
            middle = (corners.max(axis=0) + corners.min(axis=0))[:2] / 2
            point = np.array([*middle, height])
            return point, yaws[best], point - self._place(self._thing)
        return self._rim_grasp(corners, height)

    def _rim_grasp(self, corners, height):
        """Like `_choose_grasp`, at the place of the rim farthest from whatever else there is."""
        middle = (corners.max(axis=0) + corners.min(axis=0))[:2] / 2
        radius = np.linalg.norm(corners[:, :2] - middle, axis=1).max() - 0.004
        others = [name for name in self._env.obj_body_id if name != self._thing]
        others = np.concatenate([self._points(name, per_edge=7) for name in others])
        others = others[others[:, 2] > height - 0.01, :2]  # what the fingers could hit

        def score(yaw):
            outside = middle + (radius + 0.03) * np.array([np.cos(yaw), np.sin(yaw)])
            room = min(0.05, np.linalg.norm(others - outside, axis=1).min(initial=1.0))
            return room - 0.02 * abs(self._yaw_error(yaw))

        yaw = max(np.linspace(-np.pi, np.pi, 24, endpoint=False), key=score)
        point = np.array([*(middle + radius * np.array([np.cos(yaw), np.sin(yaw)])), height])
        return point, yaw, point - self._place(self._thing)

    def _follow(self, grasp):
        """The same grasp of a thing that has moved since."""
        return self._place(self._thing) + grasp[2], *grasp[1:]


def _up(metres):
    return np.array([0, 0, metres])


def _ancestors(model, body):
    while body:
        body = model.body_parentid[body]
        yield body
