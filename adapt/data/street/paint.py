"""From a street world, a camera and a look to a picture and its exact labels.

Geometry first: polygons are drawn far to near into a buffer of polygon numbers, the ground is found by
meeting each pixel's ray with the plane.  The label of a pixel is a table look-up in that buffer, so it is
exact.  Then appearance: texture, sun and shadow, lamps, fog, sensor.  Nothing of the second part can change
the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from adapt.data.street import world as w

FAR = 135.0  # metres; beyond stands only the skyline
NEAR = 0.6

f32 = np.float32


@dataclass(frozen=True)
class Camera:
    """Where the camera sits in the vehicle and what its lens does.  Angles in radians, lengths in metres."""

    height: float = 1.35
    view: float = 1.15  # horizontal angle of view
    pitch: float = 0.02  # down
    roll: float = 0.0
    yaw: float = 0.0


@dataclass(frozen=True)
class Look:
    """Light, weather and sensor.  Colours are linear RGB."""

    ambient: tuple[float, float, float]
    sun: tuple[float, float, float]
    sun_from: tuple[float, float, float]  # unit vector towards the sun
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    clouds: float = 0.3  # cover, 0..1
    fog: float = 0.001  # extinction per metre
    lamps: float = 0.0  # street lamps
    beams: float = 0.0  # the vehicle's own headlights
    lit: float = 0.0  # share of lit windows
    exposure: float = 1.0
    gamma: float = 2.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    saturation: float = 1.0
    noise: float = 0.01  # of full scale, in the dark
    shot: float = 0.015  # grows with the root of the signal
    blur: float = 0.45  # pixels at 256 columns
    vignette: float = 0.1
    wet: float = 0.0  # how much the road mirrors the sky


def _noise_table(size: int = 256) -> np.ndarray:
    """Tileable noise with a 1/f spectrum, zero mean, unit variance, clipped to ±2.5."""
    rng = np.random.default_rng(20_261_122)
    frequency = np.fft.fftfreq(size)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) / radius**1.1
    spectrum[0, 0] = 0.0
    table = np.fft.ifft2(spectrum).real
    out: np.ndarray = np.clip(table / table.std(), -2.5, 2.5).astype(f32)
    return out


_CLOUD = _noise_table()
_GRAIN = np.random.default_rng(7).normal(size=(256, 256)).astype(f32).clip(-2.5, 2.5)
_HASH = np.random.default_rng(11).random(65_536).astype(f32)


def _wrap(x: np.ndarray) -> np.ndarray:
    """Whole part modulo 256, for rows and columns of the tables."""
    out: np.ndarray = np.floor(x).astype(np.int32) & 255
    return out


def _rough(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    out: np.ndarray = _CLOUD[_wrap(a * scale), _wrap(b * scale)]
    return out


def _hash(*parts: np.ndarray | float) -> np.ndarray:
    """Uniform 0..1 from whole numbers, by table."""
    key = np.zeros((), np.int64)
    for part, prime in zip(parts, (73, 1_009, 7_919), strict=False):
        key = key + np.asarray(part).astype(np.int64) * prime
    out: np.ndarray = _HASH[key & 0xFFFF]
    return out


@lru_cache(maxsize=8)
def _pixels(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the pixel centres from the middle, in half widths: right, up."""
    x = (np.arange(width, dtype=f32) + 0.5 - width / 2) / (width / 2)
    y = -(np.arange(height, dtype=f32) + 0.5 - height / 2) / (width / 2)
    return np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))


def _axes(camera: Camera) -> np.ndarray:
    """Rows: the camera's right, up and forward in the vehicle's frame (x right, y up, z forward)."""
    cy, sy = math.cos(camera.yaw), math.sin(camera.yaw)
    cp, sp = math.cos(camera.pitch), math.sin(camera.pitch)
    cr, sr = math.cos(camera.roll), math.sin(camera.roll)
    forward = np.array([sy * cp, -sp, cy * cp])
    right0 = np.array([cy, 0.0, -sy])
    up0 = np.cross(forward, right0)
    return np.stack([cr * right0 + sr * up0, cr * up0 - sr * right0, forward])


class View:
    """One picture's geometry: polygon numbers, labels, depth and texture coordinates."""

    def __init__(
        self,
        world: w.World,
        camera: Camera,
        s: float,
        t: float,
        size: tuple[int, int],
        sun: tuple[float, float, float] | None,
    ) -> None:
        self.world, self.camera, self.s = world, camera, s
        self.height, self.width = size
        self.axes = _axes(camera)
        self.focal = 1.0 / math.tan(camera.view / 2)
        right, up = _pixels(*size)
        self.rays = (
            right[..., None] * self.axes[0].astype(f32)
            + up[..., None] * self.axes[1].astype(f32)
            + f32(self.focal) * self.axes[2].astype(f32)
        ) / f32(self.focal)
        self.ground_s, self.road_x, self.road_z, self.road_a = world.course(s, FAR + 25)
        # The vehicle keeps to its lane and wanders a little in it.
        self.lateral = world.ego + 0.25 * math.sin(s / 23.0 + world.seed)
        self._project(s, t, sun)
        self._ground()

    def _project(self, s: float, t: float, sun: tuple[float, float, float] | None) -> None:
        shapes = self.world.shapes(s, t)
        at = shapes.s + shapes.speed * t
        angle = np.interp(at, self.ground_s, self.road_a)
        cos, sin = np.cos(angle), np.sin(angle)
        x = np.interp(at, self.ground_s, self.road_x) + shapes.d * cos - self.lateral
        z = np.interp(at, self.ground_s, self.road_z) - shapes.d * sin
        seen = (at > s - 12) & (at < s + FAR)
        self.lamps = np.stack([x, shapes.lamp, z], -1)[(shapes.lamp > 0) & seen].astype(f32)
        # Polygons of objects in view, far to near.
        order = np.argsort(-(at + shapes.order)[shapes.face_owner], kind="stable")
        order = order[seen[shapes.face_owner[order]]]
        cos, sin, x, z = (q.astype(f32) for q in (cos, sin, x, z))

        def turn(p: np.ndarray, o: np.ndarray) -> np.ndarray:
            return np.stack(
                [p[:, 0] * cos[o] + p[:, 2] * sin[o], p[:, 1], p[:, 2] * cos[o] - p[:, 0] * sin[o]], -1
            )

        points = turn(shapes.points, shapes.owner)
        points[:, 0] += x[shapes.owner]
        points[:, 2] += z[shapes.owner]
        owner = shapes.face_owner
        origin = turn(shapes.frame[:, 0], owner)
        origin[:, 0] += x[owner]
        origin[:, 2] += z[owner]
        origin[:, 1] -= self.camera.height
        normal, along, up = (turn(shapes.frame[:, i], owner) for i in (1, 2, 3))
        facing = (origin * normal).sum(-1)
        first = np.concatenate([[0], np.cumsum(shapes.count)])
        eye = points.copy()
        eye[:, 1] -= self.camera.height
        eye = eye @ self.axes.T.astype(f32)
        keep = order[facing[order] < -1e-3]
        buffer = Image.new("I", (self.width, self.height), -1)
        draw = ImageDraw.Draw(buffer)
        flat = self._screen(eye)
        nearest = np.minimum.reduceat(eye[:, 2], first[:-1])
        furthest = np.maximum.reduceat(eye[:, 2], first[:-1])
        polygon = draw.polygon
        for face in keep.tolist():
            if furthest[face] <= NEAR:
                continue
            a, b = int(first[face]), int(first[face + 1])
            if nearest[face] > NEAR:
                polygon(flat[a:b].ravel().tolist(), fill=face)
            else:
                clipped = _clip(eye[a:b])
                if len(clipped) > 2:
                    polygon(self._screen(clipped).ravel().tolist(), fill=face)
        self.face = np.asarray(buffer, np.int32)
        self.shapes = shapes
        self.plane = np.concatenate([normal / np.minimum(facing, -1e-3)[:, None], along, up], -1).astype(f32)
        self.offset = np.stack([(origin * along).sum(-1), (origin * up).sum(-1)], -1).astype(f32)
        self.normal = normal
        self.shadow: np.ndarray | None = None
        if sun is not None:
            self._shadows(points, first, order, sun)

    def _screen(self, eye: np.ndarray) -> np.ndarray:
        """Pixel coordinates for the drawing library, float32 [v,2]."""
        scale = self.focal * self.width / 2 / np.maximum(eye[:, 2:3], f32(NEAR * 0.5))
        flat = eye[:, :2] * scale * np.array([1.0, -1.0], f32) + np.array(
            [self.width / 2 - 0.5, self.height / 2 - 0.5], f32
        )
        on_screen: np.ndarray = np.clip(flat, -8000, 8000)
        return on_screen

    def _shadows(
        self, points: np.ndarray, first: np.ndarray, order: np.ndarray, sun: tuple[float, float, float]
    ) -> None:
        cast = points - np.array(sun, f32) * (points[:, 1:2] / f32(sun[1]))
        cast[:, 1] = -self.camera.height
        eye = cast @ self.axes.T.astype(f32)
        flat = self._screen(eye)
        nearest = np.minimum.reduceat(eye[:, 2], first[:-1])
        furthest = np.maximum.reduceat(eye[:, 2], first[:-1])
        image = Image.new("L", (self.width, self.height), 0)
        polygon = ImageDraw.Draw(image).polygon
        for face in order[(furthest[order] > NEAR) & (nearest[order] < 70)].tolist():
            a, b = int(first[face]), int(first[face + 1])
            if nearest[face] > NEAR:
                polygon(flat[a:b].ravel().tolist(), fill=255)
            else:
                clipped = _clip(eye[a:b])
                if len(clipped) > 2:
                    polygon(self._screen(clipped).ravel().tolist(), fill=255)
        self.shadow = np.asarray(image, f32) * f32(1 / 255)

    def _ground(self) -> None:
        """Classes and coordinates of the pixels that no polygon covers."""
        world = self.world
        rays = self.rays
        low = self.face < 0
        down = rays[..., 1] < -self.camera.height / FAR
        ground = low & down
        self.ground = ground
        r = rays[ground]
        depth = -self.camera.height / r[:, 1]
        x, z = depth * r[:, 0], depth * r[:, 2]
        # Twice is enough: first by z, then corrected for the road's slant.
        along = np.interp(z, self.road_z, self.ground_s)
        for _ in range(2):
            cx = np.interp(along, self.ground_s, self.road_x)
            cz = np.interp(along, self.ground_s, self.road_z)
            slant = np.interp(along, self.ground_s, self.road_a)
            px, pz = x + self.lateral - cx, z - cz
            along = along + pz * np.cos(slant) + px * np.sin(slant)
        d = px * np.cos(slant) - pz * np.sin(slant)
        # (pz and px belong to the last step's foot; its remainder along the road is below a pixel.)
        self.g_s, self.g_d, self.g_depth = along.astype(f32), d.astype(f32), depth
        self.g_x, self.g_z = x, z
        reach = np.abs(d)
        label = np.full(d.shape, w.ROAD, np.uint8)
        cell = np.floor(along / w.CELL).astype(np.int64)
        first = int(cell.min()) if cell.size else 0
        last = int(cell.max()) if cell.size else 0
        walk = np.zeros((last - first + 1, 2), f32)
        kind = np.zeros((last - first + 1, 2), np.uint8)
        soil = np.zeros((last - first + 1, 2, 3), f32)
        zebra = np.zeros(d.shape, bool)
        for k in range(first, last + 1):
            for i, side in enumerate((-1, 1)):
                part = world.side(k, side)
                walk[k - first, i], kind[k - first, i], soil[k - first, i] = (
                    part.pavement,
                    part.ground,
                    part.soil,
                )
            for a, b in world.crossings(k):
                bars = (along > a) & (along < b) & (reach < world.half - 0.2)
                zebra |= bars & (np.floor(d / 0.5).astype(np.int32) % 2 == 0)
        right = (d > 0).astype(np.int64)
        pavement = walk[cell - first, right]
        off = reach > world.half
        label[off] = np.where(reach < world.half + pavement, w.PAVEMENT, kind[cell - first, right])[off]
        self.soil = soil[cell - first, right]
        lines = zebra
        step = along % 9.0
        dash = step < 4.0
        middle = np.abs(d) < 0.09 if not world.solid else (np.abs(np.abs(d) - 0.16) < 0.07)
        lines |= middle & (dash | world.solid)
        if world.lanes == 2:
            lines |= (np.abs(reach - world.lane) < 0.08) & dash
        rim = world.half - world.bay
        if world.edge:
            lines |= np.abs(reach - rim + 0.18) < 0.08
        if world.bay:
            lines |= (reach > rim) & (reach < world.half) & (along % 6.2 < 0.14)
        label[lines & ~off] = w.MARKING
        self.g_label = label
        self.label = np.full(self.face.shape, w.SKY, np.uint8)
        covered = ~low
        self.label[covered] = self.shapes.label[self.face[covered]]
        self.label[ground] = label
        # The skyline: woods and roofs on the horizon, by azimuth.
        edge = low & ~down
        self.edge = edge
        azimuth = np.arctan2(rays[..., 0], rays[..., 2])[edge] + float(self.world.heading(self.s))
        elevation = rays[..., 1][edge] / np.hypot(rays[..., 0], rays[..., 2])[edge]
        seed = world.seed * 13 % 256
        wood = 0.030 + 0.016 * _CLOUD[_wrap(azimuth * 90), seed]
        block = _hash(np.floor(azimuth * 22), world.seed)
        town = np.where(
            block < world.urban * 0.7, 0.02 + 0.085 * _hash(np.floor(azimuth * 22), world.seed + 1), 0.0
        )
        far = np.full(elevation.shape, w.SKY, np.uint8)
        far[elevation < wood] = w.VEGETATION
        far[elevation < town] = w.BUILDING
        self.far = far
        self.azimuth, self.elevation = azimuth.astype(f32), elevation
        self.label[edge] = far


def _clip(eye: np.ndarray) -> np.ndarray:
    """The part of a polygon before the near plane (Sutherland-Hodgman against one plane)."""
    kept: list[np.ndarray] = []
    previous = eye[-1]
    for point in eye:
        if (point[2] > NEAR) != (previous[2] > NEAR):
            share = (NEAR - previous[2]) / (point[2] - previous[2])
            kept.append(previous + share * (point - previous))
        if point[2] > NEAR:
            kept.append(point)
        previous = point
    return np.array(kept, f32).reshape(-1, 3)


def paint(view: View, look: Look, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 [H,W,3].  ``rng`` gives the sensor's noise."""
    h, width = view.height, view.width
    albedo = np.zeros((h, width, 3), f32)
    glow = np.zeros((h, width, 3), f32)
    light = np.zeros((h, width), f32)  # share of the sun's light
    depth = np.full((h, width), 1e4, f32)
    _paint_ground(view, albedo, light, depth, look)
    _paint_faces(view, albedo, glow, light, depth, look)
    _paint_far(view, albedo, light, depth)
    colour = albedo * albedo  # textures were mixed as the eye sees them; light adds in linear values
    ambient, sun = np.array(look.ambient, f32), np.array(look.sun, f32)
    shine = ambient + light[..., None] * sun
    if look.lamps or look.beams:
        shine = shine + _lamp_light(view, depth, look)
    picture = colour * shine + glow
    if look.wet:
        road = view.label == w.ROAD
        picture[road] += look.wet * np.array(look.horizon, f32)
    _paint_sky(view, picture, look)
    haze = np.array(look.horizon, f32)
    clear = np.exp(-f32(look.fog) * np.minimum(depth, 600.0))[..., None]
    picture = picture * clear + haze * (1 - clear)
    if look.lamps or look.lit > 0.2:
        picture += _bloom(glow)
    return _sensor(picture, look, rng)


def _paint_ground(view: View, albedo: np.ndarray, light: np.ndarray, depth: np.ndarray, look: Look) -> None:
    world, label = view.world, view.g_label
    s, d, z = view.g_s, view.g_d, view.g_depth
    near = 1.0 / (1.0 + z / 14.0)  # texture fades with distance, as a lens would have it
    coarse, fine = _rough(s, d, 6.0), _rough(d, s, 23.0)
    grain = _GRAIN[_wrap(s * 40), _wrap(d * 40)]
    base = np.empty((*label.shape, 3), f32)
    asphalt = np.array(world.asphalt, f32)
    patch = _hash(np.floor(s / 7.0), np.floor(d / 3.1), world.seed) < 0.13
    tracks = 0.03 * np.cos(d * (2 * math.pi / (world.lane / 2)))
    tone = 1 + 0.05 * coarse + near * (0.06 * fine + 0.12 * grain) - 0.16 * patch + tracks
    base[:] = asphalt * tone[:, None]
    mark = label == w.MARKING
    worn = 0.86 + 0.10 * coarse[mark] + 0.06 * grain[mark]
    paint_colour = np.array((0.86, 0.66, 0.20) if world.yellow else (0.90, 0.90, 0.88), f32)
    white = np.abs(d[mark]) > 0.4
    inks = np.where(white[:, None], np.array((0.90, 0.90, 0.88), f32), paint_colour)
    worn = np.clip(worn, 0.25, 1.0)[:, None]
    base[mark] = inks * worn + base[mark] * (1 - worn)
    walk = label == w.PAVEMENT
    ws, wd = s[walk], np.abs(d[walk]) - world.half
    joint = ((ws % 0.9) < 0.05) | ((wd % 0.9) < 0.05)
    slab = 1 + 0.06 * (_hash(np.floor(ws / 0.9), np.floor(wd / 0.9), world.seed) - 0.5) + 0.05 * coarse[walk]
    slab = slab + near[walk] * (0.08 * grain[walk] - 0.22 * joint)
    kerb = wd < 0.16
    slab = np.where(kerb, 1.18 + 0.05 * fine[walk], slab)
    base[walk] = np.array(world.slab, f32) * slab[:, None]
    land = label == w.TERRAIN
    tuft = 1 + 0.22 * coarse[land] + near[land] * (0.25 * fine[land] + 0.28 * grain[land])
    earth = (_rough(s[land], d[land], 3.0) > 1.1)[:, None]
    base[land] = np.where(earth, np.array((0.42, 0.34, 0.25), f32), view.soil[land]) * tuft[:, None]
    ground = view.ground
    albedo[ground] = np.clip(base, 0.01, 1.0)
    depth[ground] = z
    lit = np.full(label.shape, look.sun_from[1], f32)
    if view.shadow is not None:
        lit = lit * (1 - view.shadow[ground])
    light[ground] = lit


def _paint_faces(
    view: View, albedo: np.ndarray, glow: np.ndarray, light: np.ndarray, depth: np.ndarray, look: Look
) -> None:
    covered = view.face >= 0
    face = view.face[covered]
    shapes = view.shapes
    rays = view.rays[covered]
    plane = view.plane[face]
    far = 1.0 / np.maximum((rays * plane[:, :3]).sum(-1), f32(1 / 400))
    a = far * (rays * plane[:, 3:6]).sum(-1) - view.offset[face, 0]
    b = far * (rays * plane[:, 6:9]).sum(-1) - view.offset[face, 1]
    base = shapes.colour[face].copy()
    emit = np.zeros_like(base)
    material = shapes.material[face]
    params = shapes.params[face]
    near = 1.0 / (1.0 + far / 20.0)
    base *= (1 + 0.06 * _rough(a, b, 17.0) * near + 0.03 * _rough(b, a, 3.0))[:, None]
    for kind, painter in _PAINTERS.items():
        mine = np.flatnonzero(material == kind)
        if mine.size:
            base[mine], emit[mine] = painter(a[mine], b[mine], base[mine], params[mine], near[mine], look)
    # Soft dirt and shade at the foot of everything that stands on the ground.
    albedo[covered] = np.clip(base, 0.01, 1.0)
    glow[covered] = emit
    depth[covered] = far
    sun = (view.normal @ np.array(look.sun_from, f32)).clip(0.0, 1.0)
    flat = (shapes.material == w.LEAVES) | (shapes.label == w.PERSON) | (shapes.label == w.POLE)
    sun = np.where(flat, 0.35 + 0.35 * max(0.0, -look.sun_from[2]), sun)
    light[covered] = sun[face]


Painted = tuple[np.ndarray, np.ndarray]


def _facade(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    pitch, storey, style, share = params.T
    col, row = np.floor(a / pitch), np.floor(b / storey)
    x, y = a / pitch - col, b / storey - row
    ground_floor = row < 1
    wide = np.where(ground_floor & (style % 3 == 0), 0.85, share)
    window = (
        (np.abs(x - 0.5) < wide / 2)
        & (y > np.where(ground_floor & (style % 3 == 0), 0.08, 0.26))
        & (y < 0.80)
    )
    h = _hash(col, row, style)
    glass = 0.10 + 0.42 * h * h
    tint = np.array((0.85, 0.95, 1.08), f32)
    curtain = (h > 0.72) & (y > 0.5)
    pane = np.where(curtain[:, None], np.array((0.74, 0.72, 0.66), f32), glass[:, None] * tint)
    brick = 1 + near * 0.10 * (((b % 0.22) < 0.05) & (style % 2 == 0)) + 0.05 * _rough(a, b, 9.0)
    sill = (y < 0.26) & (y > 0.22) & (np.abs(x - 0.5) < wide / 2)
    wall = base * (brick + 0.12 * sill)[:, None]
    wall *= (1 - 0.16 * (b < 0.5))[:, None]
    lit = window & (_hash(col, row, style + 3) < look.lit)
    emit = lit[:, None] * np.array((0.50, 0.34, 0.15), f32) * (0.35 + 0.65 * h)[:, None]
    return np.where(window[:, None], pane, wall), emit * min(1.0, 1.2 * look.lit + 0.2)


def _roof(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    return base * (1 - near * 0.18 * ((b % 0.35) < 0.1))[:, None], np.zeros_like(base)


def _leaves(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    scale, rough, seed, _ = params.T
    clump = _CLOUD[_wrap(a * scale * 4 + seed), _wrap(b * scale * 4)]
    leaf = _GRAIN[_wrap(a * scale * 6 + seed), _wrap(b * scale * 6)]
    tone = 1 + rough * 0.55 * clump + near * rough * 0.55 * leaf + 0.05 * (b - 1.0)
    return base * np.clip(tone, 0.25, 1.9)[:, None], np.zeros_like(base)


def _boards(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    pitch, style, height, _ = params.T
    gap = (a % pitch) < pitch * 0.28
    rail = np.abs(b - height * 0.8) < 0.06
    slats = np.where(style == 0, np.where(gap & ~rail, 0.45, 1.0), 1.0)
    rows = np.where(style == 1, np.where((b % 0.3) < 0.05, 0.7, 1.0), 1.0)
    return base * (slats * rows * (1 + 0.12 * _rough(a, b, 20.0) * near))[:, None], np.zeros_like(base)


def _car_side(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    length, height, _, _ = params.T
    x = a / length
    wheel = np.minimum(np.abs(x - 0.18), np.abs(x - 0.80)) * length
    round_ = wheel**2 + (b - 0.10) ** 2
    tyre = (round_ < 0.115) & (b < 0.6)
    hub = round_ < 0.035
    door = np.abs(np.abs(x - 0.5) - 0.14) * length < 0.02
    tone = 1 - 0.35 * (b < 0.14) - 0.25 * door * near + 0.10 * (b / height - 0.5)
    out = base * tone[:, None]
    out = np.where(tyre[:, None], np.array((0.09, 0.09, 0.09), f32), out)
    return np.where(hub[:, None], np.array((0.45, 0.45, 0.46), f32), out), np.zeros_like(base)


def _car_end(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    width, height, front, _ = params.T
    x, y = np.abs(a / width - 0.5) * 2, b / height
    lamp = (x > 0.66) & (x < 0.95) & (y > 0.52) & (y < 0.82)
    plate = (x < 0.28) & (y > 0.30) & (y < 0.50)
    grille = (front > 0.5) & (x < 0.6) & (y > 0.25) & (y < 0.6)
    out = base * (1 - 0.40 * (y < 0.16) + 0.12 * (y - 0.5))[:, None]
    out = np.where(grille[:, None], np.array((0.08, 0.08, 0.09), f32), out)
    out = np.where(plate[:, None], np.array((0.82, 0.80, 0.70), f32), out)
    red = np.where(
        (front > 0.5)[:, None], np.array((0.92, 0.92, 0.88), f32), np.array((0.62, 0.06, 0.06), f32)
    )
    out = np.where(lamp[:, None], red, out)
    power = np.where(
        (front > 0.5)[:, None], np.array((2.4, 2.2, 1.8), f32), np.array((0.75, 0.05, 0.04), f32)
    )
    emit = lamp[:, None] * power * min(1.0, look.lamps + look.beams)
    return out, emit.astype(f32)


def _cabin(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    length, height, end, _ = params.T
    x, y = a / length, b / height
    frame = (x < 0.06) | (x > 0.94) | (y > 0.90) | ((np.abs(x - 0.52) < 0.035) & (end < 0.5))
    glass = (0.13 + 0.16 * y)[:, None] * np.array((0.9, 1.0, 1.12), f32)
    return np.where(frame[:, None], base, glass), np.zeros_like(base)


def _plate(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    width, height, style, kind = params.T
    x, y = np.abs(a / width - 0.5) * 2, np.abs(b / height - 0.5) * 2
    radius = np.where(
        kind == 0, np.hypot(x, y), np.where(kind == 1, np.maximum(x * 1.9, y * 0.9), np.maximum(x, y))
    )
    face = np.array((0.90, 0.90, 0.88), f32)
    inside = radius < 0.70
    glyph = (radius < 0.45) & (_hash(np.floor(x * 4), np.floor(b / height * 5), style) < 0.5)
    rim = (style >= 1)[:, None]
    out = np.where(inside[:, None] & rim, face, base)
    out = np.where(glyph[:, None], np.where(rim, np.array((0.1, 0.1, 0.1), f32), face), out)
    signal = kind == 9
    third = np.floor(b / height * 3)
    on = signal & (third == 2 - style) & (np.hypot(x, (b / height * 3 - third - 0.5) * 2) < 0.75)
    light = np.array(((0.95, 0.10, 0.08), (0.95, 0.62, 0.10), (0.10, 0.85, 0.35)), f32)[
        np.clip(style, 0, 2).astype(int)
    ]
    out = np.where(signal[:, None], base, out)
    out = np.where(on[:, None], light, out)
    return out, (on[:, None] * light * 0.9).astype(f32)


def _lamp(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, params: np.ndarray, near: np.ndarray, look: Look
) -> Painted:
    emit = np.broadcast_to(np.array((2.6, 2.1, 1.3), f32) * look.lamps, base.shape)
    return base * 1.1, emit


_PAINTERS = {
    w.FACADE: _facade,
    w.ROOF: _roof,
    w.LEAVES: _leaves,
    w.BOARDS: _boards,
    w.CAR_SIDE: _car_side,
    w.CAR_END: _car_end,
    w.CABIN: _cabin,
    w.PLATE: _plate,
    w.LAMP: _lamp,
}


def _paint_far(view: View, albedo: np.ndarray, light: np.ndarray, depth: np.ndarray) -> None:
    far = view.far
    base = np.full((*far.shape, 3), 0.5, f32)
    rough = _CLOUD[_wrap(view.azimuth * 400), _wrap(view.elevation * 900)]
    wood, town = far == w.VEGETATION, far == w.BUILDING
    base[wood] = np.array(view.world.flora[0], f32) * (1 + 0.25 * rough[wood])[:, None]
    tone = 0.45 + 0.3 * _hash(np.floor(view.azimuth * 22), view.world.seed + 5)
    base[town] = tone[town, None] * (1 - 0.25 * ((view.elevation[town] * 90 % 1) < 0.4))[:, None]
    albedo[view.edge] = np.clip(base, 0, 1)
    light[view.edge] = 0.4
    depth[view.edge] = np.where(far == w.SKY, 1e4, 260.0)


def _paint_sky(view: View, picture: np.ndarray, look: Look) -> None:
    sky = view.label == w.SKY
    rays = view.rays[sky]
    rise = rays[:, 1] / np.sqrt((rays * rays).sum(-1))
    share = np.clip(rise * 2.4, 0, 1)[:, None] ** 0.7
    zenith, horizon = np.array(look.zenith, f32), np.array(look.horizon, f32)
    colour = horizon * (1 - share) + zenith * share
    reach = 1.0 / (np.maximum(rays[:, 1], 0.0) + 0.16)
    angle = float(view.world.heading(view.s))
    x = rays[:, 0] * math.cos(angle) + rays[:, 2] * math.sin(angle)
    z = rays[:, 2] * math.cos(angle) - rays[:, 0] * math.sin(angle)
    seed = view.world.seed % 97 * 3
    cover = _smooth(x * reach * 14 + seed, z * reach * 14) * 0.5
    cloud = np.clip(cover + 2.2 * (look.clouds - 0.5) + 0.25, 0, 1)[:, None]
    bright = 0.65 * horizon + 0.5 * np.array(look.sun, f32) * 0.55 + 0.22 * zenith
    colour = colour * (1 - 0.85 * cloud) + bright * 0.85 * cloud
    toward = np.clip((rays @ np.array(look.sun_from, f32)) / np.sqrt((rays * rays).sum(-1)), 0, 1)
    colour += (0.35 * toward**24 * (1 - 0.6 * look.clouds))[:, None] * np.array(look.sun, f32)
    clear = math.exp(-look.fog * 420)
    picture[sky] = colour * clear + horizon * (1 - clear)


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear look-up in the noise table."""
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (x - x0).astype(f32), (y - y0).astype(f32)
    i, j = x0.astype(np.int32) & 255, y0.astype(np.int32) & 255
    i1, j1 = (i + 1) & 255, (j + 1) & 255
    top = _CLOUD[i, j] * (1 - fx) + _CLOUD[i1, j] * fx
    bottom = _CLOUD[i, j1] * (1 - fx) + _CLOUD[i1, j1] * fx
    out: np.ndarray = top * (1 - fy) + bottom * fy
    return out


def _lamp_light(view: View, depth: np.ndarray, look: Look) -> np.ndarray:
    """Light of street lamps and of the vehicle's own beams, linear RGB [H,W,3]."""
    near = np.minimum(depth, 150.0)
    place = view.rays * near[..., None]
    x, y, z = place[..., 0], place[..., 1] + view.camera.height, place[..., 2]
    total = np.zeros(depth.shape, f32)
    if look.lamps:
        for lx, ly, lz in view.lamps.tolist():
            # 1/(1 + (r/r0)²) with most of the light going down.
            total += f32(1.0) / (1 + ((x - lx) ** 2 + (z - lz) ** 2 + 0.5 * (y - ly + 1.0) ** 2) * f32(0.035))
    warm = np.array((1.0, 0.80, 0.52), f32) * f32(0.55 * look.lamps)
    lit = total[..., None] * warm
    if look.beams:
        spread = np.exp(-((x / (1.5 + 0.30 * z)) ** 2)) * np.exp(
            -((np.maximum(y - 0.7, 0) / (0.4 + 0.05 * z)) ** 2)
        )
        beam = spread / (1 + (z / 13.0) ** 2)
        lit = lit + (f32(1.5 * look.beams) * beam)[..., None] * np.array((1.0, 0.95, 0.85), f32)
    out: np.ndarray = lit
    return out


def _bloom(glow: np.ndarray) -> np.ndarray:
    """Glare around bright lights: the light blurred widely."""
    h, width = glow.shape[:2]
    image = Image.fromarray((np.clip(glow, 0, 2.55) * 100).astype(np.uint8))
    small = image.resize((max(1, width // 4), max(1, h // 4)), Image.Resampling.BOX)
    wide = small.filter(ImageFilter.GaussianBlur(1.5 * width / 256)).resize(
        (width, h), Image.Resampling.BILINEAR
    )
    return np.asarray(wide, f32) * f32(0.01 * 0.8)


def _sensor(picture: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    h, width = picture.shape[:2]
    gain = np.array(look.balance, f32) * f32(look.exposure)
    picture = picture * gain
    if look.saturation != 1.0:
        grey = picture @ np.array((0.3, 0.59, 0.11), f32)
        picture = grey[..., None] + f32(look.saturation) * (picture - grey[..., None])
    if look.vignette:
        right, up = _pixels(h, width)
        picture *= (1 - f32(look.vignette) * (right * right + up * up))[..., None]
    # A shoulder instead of a hard clip, then the display curve.
    picture = np.clip(picture, 0, None)
    picture = picture / (1 + 0.25 * picture) * f32(1.12)
    tone = np.sqrt(np.clip(picture, 0, 1.0))
    if look.blur:
        image = Image.fromarray((tone * 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(look.blur * width / 256)
        )
        tone = np.asarray(image, f32) * f32(1 / 255)
    if look.gamma != 2.0:
        tone = np.interp(tone, _RAMP, _RAMP ** (2.0 / look.gamma)).astype(f32)
    sigma = f32(look.noise) + f32(look.shot) * tone
    tone = tone + sigma * rng.standard_normal(tone.shape, f32)
    out: np.ndarray = (np.clip(tone, 0, 1) * 255 + 0.5).astype(np.uint8)
    return out


_RAMP = np.linspace(0, 1, 257)
