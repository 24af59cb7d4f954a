"""The scenes of LIBERO's tasks and their cameras, shared by the environments of a process.

LIBERO compiles a scene anew at every reset, always from the same description, and OpenGL gets its
meshes and textures anew as well: two thirds of the time of a reset. Textures make up most of a
model, and only OpenGL needs them. So a scene is compiled once without textures, and environments
simulate copies of that, equal bit for bit in all that is simulated; and once with them, for a
context of OpenGL that all environments of the task draw in. It goes when the last of these does.
"""

import contextlib
import copy
import ctypes
import os
import weakref
import xml.etree.ElementTree

import numpy as np

MOST_GEOMS = 1000  # in a picture, as in robosuite
_BUFFER = (640, 480)  # of a context at first, as in robosuite
_scenes = weakref.WeakValueDictionary()  # (description, rendering): `Scene`


def scene(modules, description, rendering):
    """Returns the `Scene` of a description in XML: that of another environment, or a new one."""
    key = description, rendering
    if (found := _scenes.get(key)) is None:
        _scenes[key] = found = Scene(modules, description, rendering)
    return found


class Scene:
    """A compiled scene and what OpenGL holds of it."""

    def __init__(self, modules, description, rendering):
        """See `scene`."""
        self._mujoco, self._description, self._rendering = modules.mujoco, description, rendering
        self._contexts = modules.binding_utils
        # MuJoCo would keep up to 500 MB of meshes and textures for other compilations. Keeping the
        # meshes alone for the second one saves 1 s, and costs the 200 MB that matter most.
        self._mujoco.mj_setCacheCapacity(self._mujoco.mj_getCache(), 0)
        self._bare = self._compiled(without_textures(description))
        self._draw_in_new_context(*_BUFFER)

    def model(self):
        """Returns a copy of the model without textures, for one simulation."""
        return copy.copy(self._bare)

    def complete_model(self):
        """Returns the model as LIBERO itself compiles it."""
        return self._compiled(self._description)

    def _compiled(self, description):
        model = self._mujoco.MjModel.from_xml_string(description)
        # For mj_saveLastXML MuJoCo keeps what it compiled last: 300 MB of sources.
        self._mujoco.MjModel.from_xml_string("<mujoco/>")
        give_memory_back()
        return model

    def draw(self, picture, width, height):
        """Draws what a `MjvScene` shows; returns uint8 [height,width,3], upside down."""
        if width > self._context.offWidth or height > self._context.offHeight:
            self._free()
            self._draw_in_new_context(width, height)
        self._gl.make_current()
        pixels = np.empty((height, width, 3), np.uint8)
        viewport = self._mujoco.MjrRect(0, 0, width, height)
        self._mujoco.mjr_render(viewport, picture, self._context)
        self._mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return pixels

    def renderer(self):
        """Returns what OpenGL calls the renderer."""
        from OpenGL import GL

        self._gl.make_current()
        return GL.glGetString(GL.GL_RENDERER).decode()

    def _draw_in_new_context(self, width, height):
        model = self.complete_model()
        if self._rendering == "fast":
            model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        self._gl = self._contexts.GLContext(max_width=width, max_height=height, device_id=-1)
        self._gl.make_current()
        self._context = self._mujoco.MjrContext(
            model, self._mujoco.mjtFontScale.mjFONTSCALE_150.value
        )
        self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._free = weakref.finalize(self, _free, self._gl, self._context)
        self._free.atexit = False  # OpenGL has gone by then
        del model
        give_memory_back()


def _free(gl, context):
    """Frees what a context holds in OpenGL, which frees in whatever context is current."""
    gl.make_current()
    context.free()
    gl.free()


class Camera:
    """Takes images of the moment last exposed, upside down as the simulator's own."""

    def __init__(self, modules, sim, scene, rendering):
        """See `Scene`; `sim` is robosuite's simulation of it."""
        self._mujoco, self._sim, self._scene = modules.mujoco, sim, scene
        model = sim.model._model
        # A copy of the simulation is rendered: nothing in an episode depends on being looked at.
        self._shown = self._mujoco.MjData(model)
        self._picture = self._mujoco.MjvScene(model, maxgeom=MOST_GEOMS)
        self._options = self._mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # shapes for collisions
        self._no_perturbation = self._mujoco.MjvPerturb()
        self._view = self._mujoco.MjvCamera()
        self._view.type = self._mujoco.mjtCamera.mjCAMERA_FIXED.value
        self._culls = rendering == "fast"  # what is out of sight may cast shadows into it

    def expose(self):
        """Keeps the moment that is simulated now."""
        self._mujoco.mj_copyData(self._shown, self._sim.model._model, self._sim.data._data)

    def render(self, camera, size):
        """Returns the view of a camera of the scene as uint8 [size,size,3]."""
        model = self._sim.model._model
        self._view.fixedcamid = self._sim.model.camera_name2id(camera)
        every = self._mujoco.mjtCatBit.mjCAT_ALL.value
        self._mujoco.mjv_updateScene(
            model, self._shown, self._options, self._no_perturbation, self._view, every,
            self._picture,
        )  # fmt: skip
        if self._culls:
            self._cull(model)
        return self._scene.draw(self._picture, size, size)

    def name(self):
        """Returns what OpenGL calls the renderer."""
        return self._scene.renderer()

    def _cull(self, model):
        """Takes out of the picture what is certainly out of sight: MuJoCo draws that too.

        Nothing is taken out while something reflects, since a reflection may show it. MuJoCo lets
        planes and boxes reflect.
        """
        kinds = self._mujoco.mjtGeom
        mirrors = kinds.mjGEOM_PLANE.value, kinds.mjGEOM_BOX.value
        hidden = out_of_sight(self._picture.camera, self._shown.geom_xpos, model.geom_rbound)
        geom, gone = self._mujoco.mjtObj.mjOBJ_GEOM.value, []
        for i in range(self._picture.ngeom):
            drawn = self._picture.geoms[i]
            if drawn.objtype == geom and hidden[drawn.objid]:
                gone.append(drawn)
            elif drawn.reflectance > 0 and drawn.type in mirrors:
                return
        for drawn in gone:
            drawn.type = kinds.mjGEOM_NONE.value


def out_of_sight(cameras, centres, radii):
    """Returns which spheres are certainly outside a square picture, as bool [N].

    Args:
      cameras: the left and right eye of a `MjvScene`; the picture is taken from their middle.
      centres: [N,3] in metres. radii: [N] in metres; 0: endless.
    """
    eye = cameras[0]
    forward, up = np.array(eye.forward, np.float64), np.array(eye.up, np.float64)
    middle = (np.array(cameras[0].pos, np.float64) + np.array(cameras[1].pos, np.float64)) / 2
    near, top = eye.frustum_near, (eye.frustum_top - eye.frustum_bottom) / 2
    offset = centres - middle
    ahead, margins = offset @ forward, radii * 1.01 + 1e-3
    out = (ahead + margins < near) | (ahead - margins > eye.frustum_far)
    for side in (np.cross(forward, up), up):
        # The distance to the nearer of two opposite planes through the eye.
        distance = (np.abs(offset @ side) * near - ahead * top) / np.hypot(near, top)
        out |= distance > margins
    return out & (radii > 0)


def without_textures(description):
    """Returns a scene's XML with a single texel in the place of every texture."""
    root = xml.etree.ElementTree.fromstring(description)
    for texture in root.iter("texture"):
        # A texture without a name has that of its file.
        file = texture.get("file")
        name = texture.get("name") or (file and os.path.splitext(os.path.basename(file))[0])
        kept = {"name": name} if name else {}
        kept |= {"type": texture.get("type", "cube"), "builtin": "flat", "width": "1"}
        texture.attrib.clear()
        texture.attrib.update(kept | {"height": "1"})
    return xml.etree.ElementTree.tostring(root, encoding="unicode")


def give_memory_back():
    """Returns to the system what the allocator keeps after something large was freed."""
    with contextlib.suppress(AttributeError, OSError):  # other systems than glibc's
        ctypes.CDLL(None).malloc_trim(0)
