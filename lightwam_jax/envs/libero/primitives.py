"""What LIBERO's scripted expert can do with one thing: place it, drag it, pull it open, turn it.

Each primitive decides from the present state alone, as far as that is possible: a policy that sees
one moment can then imitate it. The fingers are around the thing and still: it is moved. They are
not: the hand approaches, along a funnel that ends where the fingers close. So a push, a slip or a
fumble needs no rule of its own. What is remembered is which grasp was chosen, and that the fingers
closed on nothing.
"""

import numpy as np

from lightwam_jax.envs.libero.scene import pointing, rotation_vector, turned, up

_DOWN = np.array([0.0, 0.0, -1.0])
_OPENING = 0.072  # metres: what is wider does not fit between the fingers
_OPEN = 0.06  # metres between fingers that are open enough to go around a thing
_CLOSING = 0.075  # metres between fingers that have begun to close
_EMPTY = 0.002  # metres between fingers that have closed on nothing
_DEPTH = 0.03  # metres that the grip reaches below the top of a thing
_CLEARANCE = 0.012  # metres between the grip and what the thing stands on
_HOVER = 0.11  # metres of approach in front of a grasp
_MARGIN = 0.03  # metres above what is passed over
_ROOM = 0.06  # metres beside the hand's way that have to be free
_SLIP = 0.035  # metres that a thing may move in the hand
_PATIENCE = 15  # steps without progress after which something else is tried


class Primitive:
    """Takes hold of a body and moves it.

    Subclasses have
      body      what the fingers go around
      own       names of what does not stand in the way
      grasp()   where the grip has to be [3], and the rotation of the hand [3,3]
      carry()   the action while the body is held
    """

    body = None
    slack = 0.02  # metres that the hand may be beside the grasp and still close

    def __init__(self, scene):
        """`scene`: see `scene.Scene`."""
        self._scene = scene
        self._missed, self._waited, self._before = False, 0, scene.hand
        self._grip = None  # where the body was in the hand when the fingers closed
        self._freeing = False  # the fingers open, and touch it still

    def act(self):
        """Returns the next action f64 [7] towards this primitive's part of the goal."""
        if self.look():
            self._missed = False
            return self.carry()
        return self._approach()

    def leave(self):
        """Returns the next action f64 [7] of letting go and going away; None when that is done."""
        point, rotation = self.grasp()
        if self._scene.between(self.body) or np.linalg.norm(self._scene.hand - point) < 0.08:
            return self._back(rotation)
        return None

    def look(self):
        """Returns whether the body is in the hand.

        Once it is, a finger that loses touch for a moment does not matter, only a body that moves.
        """
        there, touched = self._scene.in_hand(self.body), self._scene.between(self.body)
        self._freeing &= touched
        if touched and self._scene.still and not self._freeing:
            self._grip = there if self._grip is None else self._grip
        elif self._scene.opening < _EMPTY:
            self._grip = None
        if self._grip is not None and np.linalg.norm(there - self._grip) > _SLIP:
            self._grip = None
        return self._grip is not None

    def _back(self, rotation):
        """Opens, and moves back once the fingers are apart."""
        self._grip, self._freeing = None, self._scene.between(self.body)
        apart = self._scene.opening > 0.04 and not self._freeing
        away = rotation[:, 2] * (0.05 if apart else 0.0)
        return self._scene.move(self._scene.hand - away, rotation, -1)

    def _approach(self):
        hand, opening = self._scene.hand, self._scene.opening
        point, rotation = self.grasp()
        into = rotation[:, 2]
        ahead = (point - hand) @ into
        aside = np.linalg.norm(point - hand - ahead * into)
        off = aside + 0.05 * np.linalg.norm(rotation_vector(rotation @ self._scene.rotation.T))
        if self._missed and ahead > 0.05 and opening > _OPEN:
            self._missed = False
        if self._missed:
            return self._back(rotation)
        # Fingers that have begun to close are not opened again by a small push.
        more = 0.01 if opening < _CLOSING else 0.0
        there = ahead < 0.006 + more and off < self.slack + 0.004 + more
        self._missed = self._stuck() or (there and self._scene.still and opening < _EMPTY)
        if there:
            return self._scene.move(point, rotation, 1)
        # A funnel: what is pushed out of its narrow end goes up before it goes down again.
        ends = [self.slack, self.slack + 0.01, 0.07]
        before = np.interp(off, ends, [0, _DEPTH + 0.015, _HOVER])
        if opening < _OPEN:
            before = max(before, min(ahead, 0.05))
        goal = self._over(point - into * before, aside)
        return self._scene.move(goal, rotation, -1, slow=0.7 + 0.3 * before / _HOVER)

    def _over(self, goal, aside):
        """Returns the way to `goal` [3] that first goes up and then across."""
        hand = self._scene.hand
        if aside < 0.03:
            return goal
        clear = max(goal[2], self._obstacles(hand, goal, _ROOM) + _MARGIN)
        share = np.clip(1.5 - (clear - hand[2]) / 0.04, 0, 1)
        return np.array([*(hand + share * (goal - hand))[:2], clear])

    def _obstacles(self, start, end, radius):
        """The highest point, near a way, of all that is neither held nor moved."""
        others = {name: self._scene.root(name) for name in self._scene.names}
        bodies = [body for name, body in others.items() if name not in self.own]
        return self._scene.tops(bodies, start, end, radius)

    def _stuck(self):
        """Whether the hand has not moved for a while."""
        hand = self._scene.hand
        moved = np.linalg.norm(hand - self._before) > 0.002
        self._waited = 0 if moved else self._waited + 1
        self._before = hand
        if self._waited <= _PATIENCE:
            return False
        self._waited = 0
        self.avoid()
        return True

    def avoid(self):
        """Called when the present grasp cannot be reached."""


class Place(Primitive):
    """Puts a thing in or on another, or a region."""

    def __init__(self, scene, thing, target):
        """`thing`, `target`: their names."""
        super().__init__(scene)
        self.body, self.own = scene.root(thing), (thing,)
        self._thing, self._target = thing, target
        self._left, self._refused = False, []
        self._choose()

    def act(self):
        if not self.look() and self._arrived and not self._left:
            # It lies where it should; if that is not enough it is taken again from above.
            self._left = self._scene.hand[2] > self.grasp()[0][2] + 0.08
            return self._back(self.grasp()[1])
        return super().act()

    def leave(self):
        return self.carry() if self.look() else super().leave()

    def carry(self):
        self._left = False
        hand, thing = self._scene.hand, self._scene.place(self._thing)
        low = self._scene.box(self.body)[0][2]
        error, rotation = self.goal() - thing, self._upright()
        off = np.linalg.norm(error[:2])
        rests = self._scene.rests(self.body)
        lies = error[2] > -0.008 or (rests and error[2] > -0.06)
        if self._stuck() or (off < 0.02 and lies):
            return self._back(rotation)
        tops = self._obstacles(thing, self.goal(), self._radius + 0.05)
        clear = max(tops, low + error[2] + 0.05) + hand[2] - low + _MARGIN
        end = hand + error
        height = end[2] + np.clip((off - 0.012) / 0.03, 0, 1) * (clear - end[2])
        share = np.clip(1.5 - (height - hand[2]) / 0.04, 0, 1) if off > 0.04 else 1.0
        goal = np.array([*(hand + share * error)[:2], height])
        return self._scene.move(goal, rotation, 1, slow=0.5 if off < 0.02 or rests else 0.8)

    def goal(self):
        """Where the thing's body has to be let go, [3]."""
        low = self._scene.box(self.body)[0][2] - self._scene.place(self._thing)[2]
        if self._scene.loose(self._target):
            place = self._scene.place(self._target)
            place[2] = self._scene.box(self._scene.root(self._target))[1][2] - low + 0.005
            return place  # just above its rim
        middle, half = self._scene.region(self._target)
        # On a surface: a little below it, so that it touches. Into a box: below its rim.
        return middle + up(half - low - (0.02 if half < 0.01 else 0.05))

    def grasp(self):
        place, turn = self._scene.place(self._thing), self._turn()
        far = np.linalg.norm(place - self._seen[0]) > 0.03
        if far or np.linalg.norm(rotation_vector(turn @ self._seen[1].T)) > 0.2:
            self._choose()
            place = self._scene.place(self._thing)
        return place + self._offset, self._pointing

    def avoid(self):
        self._refused.append(self._yaw)
        self._choose()

    @property
    def _arrived(self):
        error = self.goal() - self._scene.place(self._thing)
        return np.linalg.norm(error[:2]) < 0.035 and abs(error[2]) < 0.08

    def _turn(self):
        return self._scene.env.sim.data.body_xmat[self.body].reshape(3, 3).copy()

    def _upright(self):
        return pointing(_DOWN, self._scene.rotation[:, 0])

    def _yaw_error(self, yaw):
        """What the hand still has to turn about the vertical; half a turn is no turn."""
        x, y = self._scene.rotation[:2, 0]
        return (yaw - np.arctan2(y, x) + np.pi / 2) % np.pi - np.pi / 2

    def _choose(self):
        """Chooses where to take the thing, as it lies now."""
        place = self._scene.place(self._thing)
        corners = self._scene.points(self.body)
        middle = (corners.max(axis=0) + corners.min(axis=0))[:2] / 2
        self._radius = np.linalg.norm(corners[:, :2] - middle, axis=1).max()
        low, high = corners[:, 2].min(), corners[:, 2].max()
        height = max(high - _DEPTH, low + _CLEARANCE)
        found = self._across(corners, middle) or self._rim(corners, height)
        point, self._yaw, self.slack = found
        self._offset, self._seen = np.array([*point, height]) - place, (place, self._turn())
        x = np.array([np.cos(self._yaw), np.sin(self._yaw), 0])
        self._pointing = pointing(_DOWN, x if x @ self._scene.rotation[:, 0] > 0 else -x)

    def _across(self, corners, middle):
        """Returns (point [2], yaw, slack) across the narrowest side; None: it is too wide."""
        yaws = np.linspace(0, np.pi, 36, endpoint=False)
        widths = np.ptp(corners[:, :2] @ np.stack([np.cos(yaws), np.sin(yaws)]), axis=0)
        if widths.min() >= _OPENING:
            return None
        fits = widths < widths.min() + 0.004
        for refused in self._refused:
            fits &= np.abs((yaws - refused + np.pi / 2) % np.pi - np.pi / 2) > 0.3
        if not fits.any():
            self._refused.clear()
            return self._across(corners, middle)
        # Of those, the one that turns the hand least.
        turns = np.abs([self._yaw_error(yaw) for yaw in yaws])
        slack = np.clip((0.076 - widths.min()) / 2, 0.006, Primitive.slack)
        return middle, yaws[int(np.argmin(np.where(fits, turns, np.inf)))], slack

    def _rim(self, corners, height):
        """Returns (point [2], yaw, slack) where the rim has the most room for the hand."""
        rim = corners[corners[:, 2] > corners[:, 2].max() - 0.008, :2]  # no handle is that high
        middle = (rim.max(axis=0) + rim.min(axis=0)) / 2
        radius = np.linalg.norm(rim - middle, axis=1).max()
        others = [n for n in self._scene.names if n not in self.own]
        others = np.concatenate([self._scene.points(self._scene.root(n), 7) for n in others])
        handle = corners[np.linalg.norm(corners[:, :2] - middle, axis=1) > radius + 0.011]
        others = np.concatenate([others, handle])
        moved = self.goal() - self._scene.place(self._thing)

        def room(hand, side):
            """How free it is beside the hand's fingers and palm, when the grip is there."""
            finger = others[others[:, 2] > hand[2] - 0.02, :2] - hand[:2] - 0.03 * side
            palm = others[others[:, 2] > hand[2] + 0.04, :2] - hand[:2] - 0.09 * side
            free = [np.linalg.norm(part, axis=1).min(initial=1.0) for part in (finger, palm)]
            return sum(min(0.05, each) for each in free)

        def on_rim(yaw):
            """Returns (direction outwards [2], place of the grip [3]) of a side of the rim."""
            side = np.array([np.cos(yaw), np.sin(yaw)])
            wall = ((rim - middle) @ side).max() - 0.004  # corners of boxes lie outside of it
            return side, np.array([*(middle + wall * side), height])

        def score(yaw):
            side, hand = on_rim(yaw)
            refused = sum(np.cos(yaw - other) > 0.8 for other in self._refused)
            # Both sides turn the hand alike: without a preference, chance would choose.
            liked = 0.004 * np.sin(yaw) - 0.02 * abs(self._yaw_error(yaw)) - refused
            return room(hand, side) + room(hand + moved, side) + liked

        yaw = max(np.linspace(-np.pi, np.pi, 24, endpoint=False), key=score)
        return on_rim(yaw)[1][:2], yaw, Primitive.slack


class PutAside(Place):
    """Puts a thing that is in the way on a free spot of the table."""

    def __init__(self, scene, thing, spot):
        """`spot`: where its body should be, [2]."""
        self._spot, self._height = spot, scene.place(thing)[2]
        super().__init__(scene, thing, None)

    def goal(self):
        return np.array([*self._spot, self._height - 0.003])


class Drag(Place):
    """Drags a flat thing over the table by its rim, to a region."""

    def grasp(self):
        low, high = self._scene.box(self.body)
        middle, radius = (low + high) / 2, (high - low)[:2].max() / 2
        way = (self.goal() - middle)[:2]
        way /= max(np.linalg.norm(way), 1e-9)
        x = np.array([*way, 0])
        x = x if x @ self._scene.rotation[:, 0] > 0 else -x
        point = np.array([*(middle[:2] + way * (radius - 0.008)), low[2] + 0.014])
        return point, pointing(_DOWN, x)

    def carry(self):
        low, high = self._scene.box(self.body)
        hand, way = self._scene.hand, (self.goal() - (low + high) / 2)[:2]
        far = np.linalg.norm(way)
        step = way / max(far, 1e-9) * min(0.03, far + 0.005)
        goal = np.array([*(hand[:2] + step), low[2] + 0.012])
        return self._scene.move(goal, self._upright(), 1, slow=0.5)

    def leave(self):
        return Primitive.leave(self)

    def act(self):
        return Primitive.act(self)

    def goal(self):
        return self._scene.region(self._target)[0]


class Pull(Primitive):
    """Pulls a drawer open by its handle."""

    _TILT = np.deg2rad(78)  # of the hand, from pointing down to pointing at the handle

    def __init__(self, scene, region):
        """`region`: the name of the one in the drawer."""
        super().__init__(scene)
        self.own = (scene.fixture_of(region),)
        self._joint = scene.region_joint(region)
        _, self.body, _, axis = scene.joint(self._joint)
        self._out = -axis  # LIBERO's drawers open towards negative positions

    def grasp(self):
        shapes = self._scene.points(self.body).reshape(-1, 8, 3).mean(axis=1)
        handle = shapes[np.argmax(shapes @ self._out)]
        # Far away, and near the robot's foot, the wrist cannot tilt that much.
        near = np.clip((0.5 - np.linalg.norm(handle - self._scene.hand)) / 0.15, 0, 1)
        tilt = self._TILT * near
        into = -self._out * np.sin(tilt) + _DOWN * np.cos(tilt)
        return handle + 0.004 * into, pointing(into, self._flattest(into))

    def _flattest(self, into):
        """The fingers above and below the handle, whichever turns the hand less."""
        fingers = np.cross(np.cross(up(1), self._out), into)
        turns = [
            np.linalg.norm(rotation_vector(pointing(into, side) @ self._scene.rotation.T))
            for side in (fingers, -fingers)
        ]
        return fingers if turns[0] < turns[1] else -fingers

    def carry(self):
        return self._scene.move(self._scene.hand + 0.05 * self._out, self.grasp()[1], 1)

    def leave(self):
        action = super().leave()
        hand, upright = self._scene.hand, pointing(_DOWN, self._scene.rest[:, 0])
        turn = np.linalg.norm(rotation_vector(upright @ self._scene.rotation.T))
        if action is not None or turn < 0.5:
            return action
        # Near its foot: a hand that turns down far away stretches the arm, and is caught there.
        back = (self._scene.base - hand) * [1, 1, 0]
        goal = hand + 0.03 * back / np.linalg.norm(back) + up(0.02)
        return self._scene.move(goal, upright, -1)


class Turn(Primitive):
    """Turns a knob that stands up, anticlockwise."""

    def __init__(self, scene, fixture):
        """`fixture`: the name of what has the knob."""
        super().__init__(scene)
        self.own = (fixture,)
        self._joint = f"{fixture}_button"
        self.body = scene.joint(self._joint)[1]

    def grasp(self):
        middle, across = self._scene.ridge(self.body)
        across = across if across @ self._scene.rotation[:, 0] > 0 else -across
        return middle - up(0.015), pointing(_DOWN, across)

    def carry(self):
        hand, anchor = self._scene.hand, self._scene.joint(self._joint)[2]
        goal = anchor + turned(0.3) @ (hand - anchor)
        rotation = turned(0.3) @ pointing(_DOWN, self._scene.rotation[:, 0])
        return self._scene.move(np.array([*goal[:2], hand[2]]), rotation, 1)
