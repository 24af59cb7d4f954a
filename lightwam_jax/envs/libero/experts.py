"""A scripted expert for LIBERO: suites spatial, object and goal, and the living rooms of suite 10.

A goal is a list of predicates, (in milk basket), (open drawer), and the expert treats those that
are not yet true, one after the other. It sees the simulation, not the images. How often it succeeds
is in docs/libero.md.
"""

import numpy as np

from lightwam_jax.envs.libero import primitives
from lightwam_jax.envs.libero.scene import Scene

_ORDER = ("open", "turnon", "in", "on")
_PULLED, _OPEN = -0.145, -0.1  # of a drawer: where it is let go; to where it may roll back
_STROKE = 0.16  # metres that a drawer comes out
_FLAT = 0.03  # metres: what is lower and wide is dragged over the table
_REACH = 0.55  # metres from the robot's foot to where its hand can do anything
_BESIDE = 0.04  # metres of room between a drawer and what stands beside it


class Expert:
    """Acts in one episode; make another for the next."""

    def __init__(self, env):
        """`env`: LIBERO's inner environment, just reset and settled.

        Raises:
          NotImplementedError: the goal has a predicate that no primitive makes true.
        """
        goal = env.parsed_problem["goal_state"]
        if wrong := [part for part in goal if part[0] not in _ORDER]:
            raise NotImplementedError(f"the scripted expert has no primitive for {wrong}")
        self._goal = sorted(goal, key=lambda part: _ORDER.index(part[0]))
        self._scene, self._made, self._present = Scene(env), {}, None

    def act(self):
        """Returns the next action f64 [7] in the simulator's units: gripper -1 opens, 1 closes."""
        missing = [part for part in self._goal if not self._scene.true(part)]
        if missing or self._present is None:
            wanted = self._primitive((missing or self._goal)[0])
        else:
            wanted = self._present
        if self._present not in (None, wanted):
            action = self._present.leave()
            if action is not None:
                return action
        self._present = wanted
        return wanted.act()

    def _primitive(self, part):
        """The primitive that brings a part of the goal nearer."""
        kind, *names = part
        if kind == "open":
            return self._make(primitives.Pull, *names)
        if kind == "turnon":
            return self._make(primitives.Turn, *names)
        thing, target = names
        if self._closed(target):
            if self._in_the_way(self._scene.points(self._scene.root(thing)), target, _BESIDE):
                return self._make(self._put_aside, thing, target)
            return self._make(primitives.Pull, target)
        low, high = self._scene.box(self._scene.root(thing))
        flat = high[2] - low[2] < _FLAT and (high - low)[:2].min() > 0.1
        if flat and not self._scene.loose(target) and self._scene.fixture_of(target) is None:
            return self._make(primitives.Drag, thing, target)
        return self._make(primitives.Place, thing, target)

    def _make(self, kind, *names):
        """A primitive, the same one as long as the episode lasts."""
        if (kind, names) not in self._made:
            make = kind(*names) if kind == self._put_aside else kind(self._scene, *names)
            self._made[kind, names] = make
        return self._made[kind, names]

    def _closed(self, target):
        """Whether a region is in a drawer that has to be opened first."""
        joint = self._scene.region_joint(target)
        if joint is None:
            return False
        pulling = self._present is self._made.get((primitives.Pull, (target,)), self)
        return self._scene.joint(joint)[0] > (_PULLED if pulling else _OPEN)

    def _in_the_way(self, points, target, room):
        """Whether points [n,3] are where a drawer will be, or the hand that opens it."""
        position, body, _, axis = self._scene.joint(self._scene.region_joint(target))
        drawer = self._scene.points(body)
        drawer = np.concatenate([drawer, drawer - axis * (_STROKE + position)])
        low, high = drawer.min(axis=0)[:2] - room, drawer.max(axis=0)[:2] + room
        return bool(
            (points[:, :2].max(axis=0) > low).all() and (points[:, :2].min(axis=0) < high).all()
        )

    def _put_aside(self, thing, target):
        """A primitive that puts a thing on the nearest spot where it is in nobody's way."""
        body, place = self._scene.root(thing), self._scene.place(thing)
        points = self._scene.points(body)
        radius = np.linalg.norm((points - place)[:, :2], axis=1).max()
        others = [n for n in self._scene.names if n != thing]
        others = np.concatenate([self._scene.points(self._scene.root(n), 7) for n in others])[:, :2]
        steps = np.arange(-0.3, 0.31, 0.02)
        spots = place[:2] + np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)

        def cost(spot):
            crowded = radius + 0.05 - np.linalg.norm(others - spot, axis=1).min()
            far = abs(np.linalg.norm(spot - self._scene.base[:2]) - _REACH) - 0.12
            blocks = self._in_the_way(points + np.append(spot - place[:2], 0), target, _BESIDE)
            return np.linalg.norm(spot - place[:2]) + 5 * max(0, crowded, far) + 10 * blocks

        return primitives.PutAside(self._scene, thing, min(spots, key=cost))
