"""The table-top scene of the demo as MJCF text: table, tray, gantry gripper and coloured objects.

The scene is a pure function of a `Scene` (which `tabletop` samples from a seed). So one episode is
one compiled model, and nothing of an earlier episode can leak into the next.
Lengths are metres; x points right, y away from the scene camera, z up; the table top is z = 0.
"""

import dataclasses

# The named colours are far apart at 64 x 64 and from the wood of the table.
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.10, 0.25, 0.88),
    "yellow": (0.98, 0.80, 0.08),
    "purple": (0.52, 0.16, 0.66),
    "orange": (0.98, 0.45, 0.05),
}
SHAPES = {  # MuJoCo type, size, half height
    "cube": ("box", (0.022, 0.022, 0.022), 0.022),
    "cylinder": ("cylinder", (0.022, 0.024), 0.024),
    "ball": ("sphere", (0.023,), 0.023),
}

FPS = 10  # control steps per second
SPEED = 0.25  # m/s: the hand's, at full action
TRAY_HALF = 0.058  # inner half width
TRAY_WALL = 0.014  # height of the wall; lower than the finger tips ever get
OPENING = 0.090  # between the pads when the gripper is open
HAND_LOW = (-0.22, -0.17, 0.027)  # reach of the point between the finger tips
HAND_HIGH = (0.22, 0.17, 0.180)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one episode looks like before the first step.

    Attributes:
      objects: tuple of (colour, shape, x, y, yaw); index 0 is not special.
      target: index of the object that the instruction names.
      tray: (x, y) of the middle of the tray.
      hand: (x, y, z) of the point between the finger tips.
    """

    objects: tuple
    target: int
    tray: tuple
    hand: tuple

    @property
    def prompt(self):
        """The instruction, e.g. "put the red cube in the tray"."""
        colour, shape = self.objects[self.target][:2]
        return f"put the {colour} {shape} in the tray"


def _numbers(values):
    return " ".join(f"{v:.6g}" for v in values)


def _object(index, colour, shape, x, y, yaw):
    kind, size, half = SHAPES[shape]
    # condim 6 with rolling friction keeps balls from rolling away; it costs nothing for the others.
    return (
        f'<body name="object_{index}" pos="{x:.6f} {y:.6f} {half:.6f}" euler="0 0 {yaw:.6f}">'
        f'<freejoint/><geom name="object_{index}" type="{kind}" size="{_numbers(size)}" '
        f'mass="0.05" condim="6" friction="1 0.01 0.002" '
        f'rgba="{_numbers(COLOURS[colour])} 1"/></body>'
    )


def _tray(x, y):
    t, h, inner = 0.004, TRAY_WALL / 2, TRAY_HALF
    outer = inner + 2 * t
    parts = [((0, 0, 0.002), (outer, outer, 0.002))]
    parts += [((s * (inner + t), 0, h), (t, outer, h)) for s in (-1, 1)]
    parts += [((0, s * (inner + t), h), (inner, t, h)) for s in (-1, 1)]
    geoms = "".join(
        f'<geom type="box" pos="{_numbers(p)}" size="{_numbers(s)}" rgba="0.93 0.93 0.95 1"/>'
        for p, s in parts
    )
    return f'<body name="tray" pos="{x:.6f} {y:.6f} 0">{geoms}</body>'


def _finger(name, side):
    return (
        f'<body name="{name}" pos="{side * 0.006} 0 0">'
        f'<joint name="{name}" type="slide" axis="{side} 0 0" range="0 {OPENING / 2}" '
        f'damping="40" armature="0.1"/>'
        f'<geom name="{name}" type="box" pos="0 0 0.025" size="0.006 0.014 0.037" mass="0.05" '
        f'friction="1.2 0.05 0.002" rgba="0.20 0.21 0.24 1"/></body>'
    )


def mjcf(scene):
    """Returns the MJCF text of a `Scene`.

    The hand hangs on three slide joints driven by velocity servos (mass and gain give it a time
    constant of about 20 ms); the fingers are force-limited position servos held symmetric by an
    equality, and hold an object by friction alone.
    """
    slides = "".join(
        f'<joint name="{n}" type="slide" axis="{_numbers(axis)}" range="{low} {high}" '
        f'armature="2"/>'
        for n, axis, low, high in zip("xyz", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), HAND_LOW, HAND_HIGH)
    )
    servos = "".join(f'<velocity joint="{n}" kv="120" forcerange="-60 60"/>' for n in "xyz")
    grip = "".join(
        f'<position joint="{n}" kp="1500" forcerange="-8 8"/>' for n in ("left", "right")
    )
    objects = "".join(_object(i, *o) for i, o in enumerate(scene.objects))
    return f"""<mujoco model="tabletop">
<compiler angle="radian" autolimits="true"/>
<option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="10"/>
<worldbody>
<camera name="scene" pos="0.025 -0.27 0.55" xyaxes="1 0 0 0 0.840 0.543" fovy="40"/>
<geom name="table" type="plane" size="1 1 0.1" friction="1 0.01 0.002" rgba="0.68 0.58 0.47 1"/>
{_tray(*scene.tray)}
<body name="hand" gravcomp="1">{slides}
<camera name="wrist" pos="0 -0.075 0.070" xyaxes="1 0 0 0 0.80 0.60" fovy="80"/>
<geom name="palm" type="box" pos="0 0 0.072" size="0.058 0.017 0.011" mass="0.3"
  rgba="0.36 0.38 0.42 1"/>
<geom name="stem" type="cylinder" pos="0 0 0.108" size="0.013 0.025" mass="0.1"
  rgba="0.55 0.57 0.60 1"/>
{_finger("left", -1)}
{_finger("right", 1)}
</body>
{objects}
</worldbody>
<equality><joint joint1="left" joint2="right" solref="0.005 1"/></equality>
<actuator>{servos}{grip}</actuator>
</mujoco>"""
