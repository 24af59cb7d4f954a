"""Images without any GL: `mujoco.mj_multiRay` finds what a pixel sees, numpy shades it.

One path for every MuJoCo version: normals are computed here from the primitive shapes, because only
newer versions return them. Rays that cannot meet an object are not cast (the table is a plane), and
only the pixels on the outline of something are supersampled.
"""

import functools

import mujoco
import numpy as np

# A point light: rays from it tell what is in shadow.
_LIGHT = np.array([-0.35, -0.30, 0.95], np.float32)
_BACKDROP = 0.80
_PLANE, _BOX, _SPHERE, _CYLINDER = (
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}"))
    for name in ("PLANE", "BOX", "SPHERE", "CYLINDER")
)
# MuJoCo 4 takes an optional array of normals between `dist` and `nray`; 3.x does not.
_TAKES_NORMAL = "normal:" in mujoco.mj_multiRay.__doc__
# Of a pixel on an outline: two rays more, in pixels from its middle.
_PARTS = np.array([(-1, -1), (1, 1)]) / 3


def cast(model, data, origin, directions):
    """Casts rays from one point.

    Args:
      origin: [3] float.
      directions: [n, 3] float, unit length.

    Returns:
      geom [n] int32 (-1: nothing), distance [n] float64.
    """
    count = len(directions)
    geom, distance = np.full(count, -1, np.int32), np.full(count, -1.0)
    if count:
        origin, rays = np.float64(origin), np.float64(directions).reshape(-1)
        out = (geom, distance, None) if _TAKES_NORMAL else (geom, distance)
        mujoco.mj_multiRay(model, data, origin, rays, None, 1, -1, *out, count, 10.0)
    return geom, distance


@functools.lru_cache(maxsize=16)
def _pinhole(size, fovy):
    """Unit rays in the camera frame: middles [size**2, 3], parts [size**2, 2, 3]."""
    middle = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).reshape(-1, 1, 2) + 0.5

    def rays(pixel):
        flat = (pixel / size * 2 - 1) * np.tan(np.deg2rad(fovy) / 2) * (1, -1)
        ray = np.concatenate([flat, -np.ones_like(flat[..., :1])], -1)
        return np.float32(ray / np.linalg.norm(ray, axis=-1, keepdims=True))

    return rays(middle)[:, 0], rays(middle + _PARTS)


class Renderer:
    """Draws one compiled model, made of the plane z = 0, boxes, cylinders and spheres."""

    def __init__(self, model):
        self._model = model
        self._solid = np.flatnonzero(model.geom_type != _PLANE)
        self._table = int(np.flatnonzero(model.geom_type == _PLANE)[0])
        self._bound = np.float32(model.geom_rbound[self._solid])
        self._kind = model.geom_type.copy()
        self._size = np.float32(model.geom_size)
        self._colour = np.float32(model.geom_rgba[:, :3])
        known = np.isin(model.geom_type, (_PLANE, _BOX, _SPHERE, _CYLINDER))
        if not known.all():
            raise ValueError(
                f"geoms {np.flatnonzero(~known).tolist()} are no planes, boxes, spheres or "
                "cylinders: build the scene of those, or teach the renderer their normals"
            )

    def render(self, data, camera, size, smooth=True):
        """Draws a square image.

        Args:
          data: MjData after `mj_forward`. camera: its name. size: pixels per side.
          smooth: whether to anti-alias the outlines.

        Returns:
          [size, size, 3] uint8.
        """
        index = self._model.camera(camera).id
        origin = np.float32(data.cam_xpos[index])
        turn = np.float32(data.cam_xmat[index]).reshape(3, 3).T
        middles, parts = _pinhole(size, float(self._model.cam_fovy[index]))
        colour, geom = self._shade(data, origin, middles @ turn)
        if smooth:
            body = np.append(self._model.geom_bodyid, -1)[geom]  # -1: the backdrop
            edge = np.flatnonzero(_outlines(body.reshape(size, size)))
            fine, _ = self._shade(data, origin, parts[edge].reshape(-1, 3) @ turn)
            total = colour[edge] + fine.reshape(len(edge), -1, 3).sum(1)
            colour[edge] = total / (1 + len(_PARTS))
        return (colour.reshape(size, size, 3) * 255 + 0.5).astype(np.uint8)

    def _hits(self, data, origin, rays):
        """`cast`, only for rays through a geom's bounding sphere; the others see the table."""
        offset = np.float32(data.geom_xpos[self._solid]) - origin
        far = np.sqrt((offset * offset).sum(1))
        reach = np.minimum(self._bound / far, 1)
        cosine = np.where(reach < 1, np.sqrt(1 - reach * reach) - 1e-6, -1)  # -1: inside the sphere
        above = (offset / far[:, None]) @ rays.T - cosine[:, None]
        near = np.flatnonzero(above.max(0) >= 0)
        down = np.minimum(rays[:, 2], np.float32(-1e-9))
        distance = origin[2] / -down
        geom = np.where(distance < 10, self._table, -1).astype(np.int32)
        geom[near], distance[near] = cast(self._model, data, origin, rays[near])
        return geom, distance

    def _shade(self, data, origin, rays):
        """Rays [n, 3] -> colour [n, 3] in 0..1, geom [n]."""
        geom, distance = self._hits(data, origin, rays)
        point = origin + np.where(geom >= 0, distance, np.float32(0))[:, None] * rays
        to_light = _LIGHT - point
        gap = np.sqrt(np.einsum("nc,nc->n", to_light, to_light))
        to_light /= gap[:, None]
        blocker, blocked_at = self._hits(data, _LIGHT, -to_light)
        lit = (blocker < 0) | (blocked_at > gap - 1e-4)

        light = 0.54 + 0.62 * to_light[:, 2] * lit  # right for the table; the solids come next
        colour = _wood(self._colour[self._table], point) * light[:, None]
        solid = np.flatnonzero((geom >= 0) & (geom != self._table))
        on, at, toward, lit = geom[solid], point[solid], to_light[solid], lit[solid]
        normal = self._normals(data, on, at)
        facing = np.maximum(np.einsum("nc,nc->n", normal, toward), 0) * lit
        # Less light bounces in near the table: objects look as if they stood on it.
        ambient = (0.40 + 0.14 * normal[:, 2]) * (0.72 + 0.28 * np.clip(at[:, 2] / 0.03, 0, 1))
        mirror = 2 * facing[:, None] * normal - toward
        shine = np.maximum(-np.einsum("nc,nc->n", mirror, rays[solid]), 0)
        shine = np.square(np.square(np.square(shine)))
        gloss = 0.22 * shine * shine * shine * lit
        colour[solid] = self._colour[on] * (ambient + 0.62 * facing)[:, None] + gloss[:, None]
        colour[geom < 0] = _BACKDROP
        return np.minimum(colour, 1.0), geom

    def _normals(self, data, geom, point):
        """Outward normals [n, 3] at the points [n, 3] on the surfaces of the solids geom [n]."""
        turn = np.float32(data.geom_xmat).reshape(-1, 3, 3)[geom]
        local = np.einsum("nw,nwl->nl", point - np.float32(data.geom_xpos)[geom], turn)
        kind, size = self._kind[geom], self._size[geom]
        box, tube = kind == _BOX, kind == _CYLINDER
        out = local / size[:, :1]  # spheres, and the sides of cylinders once z is dropped
        out[tube, 2] = 0
        cap = tube & (np.abs(local[:, 2]) > size[:, 1] - 1e-5)
        out[cap] = np.sign(local[cap]) * np.float32([0, 0, 1])
        face = np.argmax(np.abs(local[box]) / size[box], axis=1)
        out[box] = np.eye(3, dtype=np.float32)[face] * np.sign(local[box])
        return np.einsum("nwl,nl->nw", turn, out)


def _outlines(body):
    """Pixels [h, w] bool whose right, left, upper or lower neighbour sees another body."""
    edge = np.zeros(body.shape, bool)
    down, right = body[1:] != body[:-1], body[:, 1:] != body[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def _wood(colour, point):
    """Soft planks [n, 3]: slow waves only, so that small images (and codecs) do not alias."""
    x, y = point[:, 0], point[:, 1]
    plank = np.floor(y / 0.11 + 0.5)
    waves = 1 + 0.022 * np.sin(95 * y + 2.2 * np.sin(7 * x + 3 * plank))
    return colour * (waves + 0.035 * np.sin(12.9 * plank))[:, None]
