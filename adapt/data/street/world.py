"""What stands where in a procedural street: geometry, classes and materials, no light and no camera.

A world is a pure function of its seed.  It is laid out along a curved road in cells of ``CELL`` metres, each
with a generator of its own, so that a drive of 300 frames and one of 30 see the same street.  Everything is
a planar polygon in the local frame of an object (x to the right, y up, z along the road, metres); an object
has a place on the road (s along it, d to the right of its centre line) and a speed.  Only ``street_paint``
turns this into pictures; no domain (day, fog ...) is known here, which is why domains share their labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

CLASSES = (
    "road",
    "marking",
    "pavement",
    "terrain",
    "building",
    "fence",
    "vegetation",
    "sky",
    "pole",
    "sign",
    "car",
    "person",
)
ROAD, MARKING, PAVEMENT, TERRAIN, BUILDING, FENCE, VEGETATION, SKY, POLE, SIGN, CAR, PERSON = range(12)

# Materials: how a polygon is textured.
PLAIN, FACADE, ROOF, LEAVES, BOARDS, CAR_SIDE, CAR_END, CABIN, PLATE, LAMP = range(10)

CELL = 20.0
AHEAD = 7  # cells in view: 140 m
SPEED = 9.0  # the vehicle's own, m/s
START = 40.0  # where a drive begins

Colour = tuple[float, float, float]
Point = tuple[float, float, float]

BRICKS: tuple[Colour, ...] = (
    (0.62, 0.38, 0.30),
    (0.74, 0.66, 0.54),
    (0.80, 0.77, 0.72),
    (0.55, 0.53, 0.52),
    (0.84, 0.74, 0.52),
    (0.45, 0.40, 0.38),
    (0.66, 0.70, 0.74),
    (0.72, 0.55, 0.47),
    (0.50, 0.56, 0.52),
    (0.88, 0.86, 0.82),
)
PAINTS: tuple[Colour, ...] = (
    (0.86, 0.86, 0.87),
    (0.62, 0.64, 0.66),
    (0.12, 0.12, 0.13),
    (0.33, 0.34, 0.36),
    (0.60, 0.10, 0.10),
    (0.12, 0.22, 0.48),
    (0.20, 0.34, 0.24),
    (0.72, 0.58, 0.18),
    (0.45, 0.32, 0.22),
    (0.40, 0.58, 0.68),
)
LEAF: tuple[Colour, ...] = (
    (0.26, 0.40, 0.16),
    (0.20, 0.32, 0.17),
    (0.36, 0.46, 0.18),
    (0.50, 0.45, 0.18),
    (0.56, 0.36, 0.16),
    (0.30, 0.36, 0.26),
)


@dataclass
class Kit:
    """Polygons under construction, as flat lists; ``freeze`` makes arrays of them."""

    s: list[float] = field(default_factory=list)
    d: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    order: list[float] = field(default_factory=list)
    lamp: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    material: list[int] = field(default_factory=list)
    colour: list[Colour] = field(default_factory=list)
    params: list[tuple[float, float, float, float]] = field(default_factory=list)
    frame: list[tuple[Point, Point, Point, Point]] = field(default_factory=list)  # origin, normal, U, V

    def place(self, s: float, d: float, *, speed: float = 0.0, order: float = 0.0, lamp: float = 0.0) -> None:
        """A new object; the polygons that follow are its own.  ``order``: metres added to s when sorting.

        ``lamp`` is the height of a street lamp's light over the ground, 0 for none.
        """
        self.s.append(s)
        self.d.append(d)
        self.speed.append(speed)
        self.order.append(order)
        self.lamp.append(lamp)

    def face(
        self,
        points: list[Point],
        label: int,
        material: int,
        colour: Colour,
        params: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        """A planar polygon: bottom left, bottom right, ..., top left as seen from outside."""
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = points[0], points[1], points[-1]
        ux, uy, uz = bx - ax, by - ay, bz - az
        length = math.sqrt(ux * ux + uy * uy + uz * uz) or 1.0
        ux, uy, uz = ux / length, uy / length, uz / length
        vx, vy, vz = cx - ax, cy - ay, cz - az
        along = vx * ux + vy * uy + vz * uz
        vx, vy, vz = vx - along * ux, vy - along * uy, vz - along * uz
        length = math.sqrt(vx * vx + vy * vy + vz * vz) or 1.0
        vx, vy, vz = vx / length, vy / length, vz / length
        normal = (vy * uz - vz * uy, vz * ux - vx * uz, vx * uy - vy * ux)
        self.start.append(len(self.points))
        self.points.extend(points)
        self.owner.extend([len(self.s) - 1] * len(points))
        self.label.append(label)
        self.material.append(material)
        self.colour.append(colour)
        self.params.append(params)
        self.frame.append((points[0], normal, (ux, uy, uz), (vx, vy, vz)))

    def board(
        self,
        outline: list[tuple[float, float]],
        label: int,
        material: int,
        colour: Colour,
        params: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        z: float = 0.0,
    ) -> None:
        """A flat cut-out across the road, facing the traffic that comes: leaves, poles, people."""
        points: list[Point] = [(x, y, z) for x, y in outline]
        left = min(x for x, _ in outline)
        low = min(y for _, y in outline)
        self.start.append(len(self.points))
        self.points.extend(points)
        self.owner.extend([len(self.s) - 1] * len(points))
        self.label.append(label)
        self.material.append(material)
        self.colour.append(colour)
        self.params.append(params)
        self.frame.append(((left, low, z), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))

    def freeze(self) -> Shapes:
        counts = np.diff(np.array([*self.start, len(self.points)], np.int64))
        owner = np.array(self.owner, np.int64)
        start = np.array(self.start, np.int64)
        frame = np.array(self.frame, np.float32).reshape(-1, 4, 3)
        return Shapes(
            s=np.array(self.s, np.float64),
            d=np.array(self.d, np.float64),
            speed=np.array(self.speed, np.float64),
            order=np.array(self.order, np.float64),
            lamp=np.array(self.lamp, np.float32),
            points=np.array(self.points, np.float32).reshape(-1, 3),
            owner=owner,
            count=counts,
            face_owner=owner[start] if len(start) else start,
            label=np.array(self.label, np.uint8),
            material=np.array(self.material, np.uint8),
            colour=np.array(self.colour, np.float32).reshape(-1, 3),
            params=np.array(self.params, np.float32).reshape(-1, 4),
            frame=frame,
        )


@dataclass(frozen=True)
class Shapes:
    """Objects [n], their polygons [p] and the polygons' points [v], as arrays."""

    s: np.ndarray
    d: np.ndarray
    speed: np.ndarray
    order: np.ndarray
    lamp: np.ndarray
    points: np.ndarray  # float32 [v,3], local
    owner: np.ndarray  # object of each point
    count: np.ndarray  # points of each polygon
    face_owner: np.ndarray  # object of each polygon
    label: np.ndarray
    material: np.ndarray
    colour: np.ndarray
    params: np.ndarray
    frame: np.ndarray  # float32 [p,4,3]: origin, normal, U, V

    @staticmethod
    def join(parts: list[Shapes]) -> Shapes:
        shift = np.cumsum([0] + [len(p.s) for p in parts])
        names = (
            "s",
            "d",
            "speed",
            "order",
            "lamp",
            "points",
            "count",
            "label",
            "material",
            "colour",
            "params",
            "frame",
        )
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
        for name in ("owner", "face_owner"):
            joined[name] = np.concatenate([getattr(p, name) + k for p, k in zip(parts, shift, strict=False)])
        return Shapes(**joined)


@dataclass(frozen=True)
class Side:
    """What one side of a cell of street is made of."""

    pavement: float  # metres; 0: the verge begins at the kerb
    ground: int  # class of the ground behind the pavement
    soil: Colour


class World:
    """One street.  ``shapes(s, t)``: what can be seen from s at time t; ``centre``: the road's course."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([0x57EE7, seed])
        self.urban = float(rng.uniform(0.15, 0.95))
        self.lane = float(rng.uniform(3.0, 3.7))
        self.lanes = int(rng.choice([1, 1, 1, 2]))  # each way
        self.bay = float(rng.choice([0.0, 2.2])) if self.lanes == 1 else 0.0  # parking bays beside the lanes
        self.half = self.lanes * self.lane + self.bay  # half the carriageway
        self.ego = (self.lanes - 0.5) * self.lane  # centre of the vehicle's lane
        self.yellow = bool(rng.random() < 0.25)
        self.solid = bool(rng.random() < 0.3)
        self.edge = bool(rng.random() < 0.55)
        grey = float(rng.uniform(0.28, 0.60))
        tint = rng.normal(0, 0.012, 3)
        self.asphalt: Colour = (grey + tint[0], grey + tint[1], grey + tint[2])
        slab = float(rng.uniform(0.36, 0.70))
        warm = float(rng.uniform(-0.02, 0.10))
        self.slab: Colour = (slab + warm, slab + warm * 0.3, slab - warm * 0.5)
        self.bend = rng.normal(0, 1, 3) * np.array([0.0045, 0.0040, 0.0025])
        self.wave = 2 * math.pi / rng.uniform([120, 70, 320], [220, 120, 600])
        self.phase = rng.uniform(0, 2 * math.pi, 3)
        self.flora = [LEAF[i] for i in rng.permutation(len(LEAF))[:3]]
        self.oncoming = float(rng.uniform(22, 60))
        self.lead = float(rng.uniform(26, 70))
        self.tall = float(rng.uniform(0.7, 1.6))
        self._cells: dict[int, tuple[Shapes, dict[int, Side], list[tuple[float, float]]]] = {}
        self._window: tuple[int, Shapes] | None = None

    # ------------------------------------------------------------------ the road's course

    def heading(self, s: np.ndarray | float) -> np.ndarray:
        """Direction of the road at s, radians to the right of the start's."""
        s = np.asarray(s, np.float64)[..., None]
        turns: np.ndarray = self.bend / self.wave * (np.sin(s * self.wave + self.phase) - np.sin(self.phase))
        return np.asarray(turns.sum(-1))

    def course(self, s0: float, length: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """s, x, z and heading of the centre line each metre, relative to the place and direction at s0."""
        s = s0 + np.arange(-12.0, length)
        angle = self.heading(s) - self.heading(s0)
        x = np.concatenate([[0.0], np.cumsum(np.sin((angle[1:] + angle[:-1]) / 2))])
        z = np.concatenate([[0.0], np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2))])
        return s, x - x[12], z - z[12], angle

    # ------------------------------------------------------------------ what stands beside it

    def side(self, cell: int, side: int) -> Side:
        return self._cell(cell)[1][side]

    def crossings(self, cell: int) -> list[tuple[float, float]]:
        """(from, to) of the zebra crossings in a cell, metres along the road."""
        return self._cell(cell)[2]

    def shapes(self, s: float, t: float) -> Shapes:
        first = math.floor(s / CELL) - 1
        if self._window is None or self._window[0] != first:
            cells = [self._cell(k)[0] for k in range(first, first + AHEAD + 2)]
            self._window = (first, Shapes.join(cells))
            for old in [k for k in self._cells if k < first]:
                del self._cells[old]
        return Shapes.join([self._window[1], self._traffic(s, t)])

    def _cell(self, k: int) -> tuple[Shapes, dict[int, Side], list[tuple[float, float]]]:
        if k not in self._cells:
            rng = np.random.default_rng([0xCE11, self.seed, k + 1000])
            kit = Kit()
            zebra = [(k * CELL + 8.0, k * CELL + 11.2)] if rng.random() < 0.16 * (0.4 + self.urban) else []
            sides = {side: _furnish(self, kit, rng, k, side, bool(zebra)) for side in (-1, 1)}
            self._cells[k] = (kit.freeze(), sides, zebra)
        return self._cells[k]

    def _traffic(self, s: float, t: float) -> Shapes:
        kit = Kit()
        kit.place(-1e6, 0.0)  # never seen; keeps the arrays from being empty
        kit.face([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], CAR, PLAIN, (0, 0, 0))
        speed = 0.8 * SPEED
        first = math.ceil((s + speed * t - 10) / self.oncoming)
        for j in range(first, first + int(140 / self.oncoming) + 2):
            rng = np.random.default_rng([0xCA7, self.seed, j + 10_000])
            if rng.random() < 0.6:
                kit.place(
                    j * self.oncoming + rng.uniform(0, 14) - speed * t,
                    -self.lane * (0.5 if self.lanes == 1 else rng.choice([0.5, 1.5])),
                )
                car(kit, rng, toward=True)
        for j in range(4):
            rng = np.random.default_rng([0xCA8, self.seed, j])
            sway = 3.0 * math.sin(t / 4.0 + rng.uniform(0, 6))
            lane = self.ego if self.lanes == 1 or rng.random() < 0.5 else self.ego - self.lane
            gap = 9 + rng.uniform(0, 22) + j * self.lead
            if rng.random() < 0.55:
                kit.place(START + SPEED * t + gap + sway, lane)
                car(kit, rng, toward=False)
        return kit.freeze()


def _furnish(world: World, kit: Kit, rng: np.random.Generator, k: int, side: int, zebra: bool) -> Side:
    """Fill one side of cell k: ground, row of buildings or green, street furniture, parked cars, people."""
    s0 = k * CELL
    urban = world.urban
    walk = float(rng.uniform(1.6, 4.2)) if rng.random() < 0.5 + 0.5 * urban else 0.0
    edge = world.half + walk
    soil = LEAF[int(rng.integers(len(LEAF)))]
    soil = tuple(0.5 * c + 0.5 * o for c, o in zip(soil, (0.44, 0.38, 0.28), strict=True))  # type: ignore[assignment]
    lot = rng.random()
    built = lot < 0.25 + 0.65 * urban
    if built:
        gap = 0.0 if rng.random() < urban else float(rng.uniform(1.0, 5.0))
        setback = float(rng.choice([0.2, 0.5, 3.0, 6.0]))
        n = int(rng.integers(1, 3))
        width = (CELL - gap) / n
        for i in range(n):
            building(kit, rng, world, s0 + (i + 0.5) * width, side, edge + setback, width - 0.05)
    elif rng.random() < 0.6:
        far = float(rng.uniform(16, 34))
        building(kit, rng, world, s0 + CELL / 2, side, edge + far, float(rng.uniform(9, 16)))
    paved = built and rng.random() < 0.35 + 0.4 * urban and walk > 0
    ground = PAVEMENT if paved else TERRAIN
    if not paved and rng.random() < 0.55:
        fence(
            kit,
            rng,
            s0 + CELL / 2,
            side,
            edge + 0.15 + rng.uniform(0, 0.8),
            CELL * float(rng.uniform(0.55, 1.0)),
        )
    trees = rng.poisson(1.0 if built else 2.8)
    for _ in range(trees):
        depth = float(rng.uniform(0.6, 1.6)) if built else float(rng.uniform(0.8, 16.0))
        near = edge - 0.8 if built and walk > 2.4 else edge + depth
        tree(kit, rng, world, s0 + rng.uniform(0, CELL), side * near, small=built)
    if not built and rng.random() < 0.5:
        hedge(
            kit,
            rng,
            world,
            s0 + CELL / 2,
            side,
            edge + 1.0 + rng.uniform(0, 6),
            CELL * float(rng.uniform(0.4, 1.0)),
        )
    kerb = world.half + 0.45
    if rng.random() < 0.55 + 0.25 * urban:
        lamp_post(kit, rng, s0 + rng.uniform(2, 18), side, kerb)
    for _ in range(rng.poisson(0.55 + 0.5 * urban)):
        sign_post(kit, rng, s0 + rng.uniform(1, 19), side * (kerb + rng.uniform(0, 0.6)))
    for _ in range(rng.poisson(0.25)):
        bollard(kit, rng, s0 + rng.uniform(1, 19), side * kerb)
    if zebra and side > 0:
        traffic_light(kit, rng, s0 + 7.5, side * kerb)
    if world.bay and not zebra:
        for i in range(3):
            if rng.random() < 0.25 + 0.45 * urban:
                kit.place(s0 + 3.4 + 6.2 * i + rng.uniform(-0.3, 0.3), side * (world.half - world.bay / 2))
                car(kit, rng, toward=side < 0)
    elif rng.random() < 0.25 and not zebra:
        kit.place(s0 + rng.uniform(4, 16), side * (world.half + (0.4 if walk else 1.2)))
        car(kit, rng, toward=bool(rng.random() < 0.5))
    crowd = rng.poisson(0.5 + 1.6 * urban if walk else 0.35)
    for _ in range(crowd):
        d = world.half + (rng.uniform(0.5, walk - 0.2) if walk else rng.uniform(0.5, 2.5))
        pace = float(rng.choice([-1.2, 0.0, 1.3]))
        # The clock starts when the vehicle is near the cell, so that people are still about when it arrives.
        kit.place(s0 + rng.uniform(0, CELL) - pace * max(0.0, s0 - 60.0) / SPEED, side * d, speed=pace)
        person(kit, rng)
    if zebra and rng.random() < 0.7:
        kit.place(s0 + 9.5, rng.uniform(-world.half, world.half))
        person(kit, rng)
    return Side(walk, ground, soil)


# ---------------------------------------------------------------------- furniture


def _shade(rng: np.random.Generator, colour: Colour, sigma: float = 0.05) -> Colour:
    k = float(np.exp(rng.normal(0, 2 * sigma)))
    r, g, b = (
        min(0.97, max(0.02, c * k + e)) for c, e in zip(colour, rng.normal(0, sigma / 2, 3), strict=True)
    )
    return (r, g, b)


def _pick(
    rng: np.random.Generator, colours: tuple[Colour, ...] | list[Colour], sigma: float = 0.05
) -> Colour:
    return _shade(rng, colours[int(rng.integers(len(colours)))], sigma)


def building(
    kit: Kit, rng: np.random.Generator, world: World, s: float, side: int, d: float, width: float
) -> None:
    """A block with windows, flat or gabled; ``d``: distance of its front from the centre line."""
    storey = float(rng.uniform(2.8, 3.6))
    floors = max(1, round(rng.gamma(4.0, 0.8 * world.tall * (0.5 + world.urban))))
    height = storey * min(floors, 9) + float(rng.uniform(0.2, 1.2))
    depth = float(rng.uniform(8, 14))
    wall = _pick(rng, BRICKS, 0.06)
    pitch = float(rng.uniform(1.6, 3.4))
    style = float(rng.integers(0, 10_000))
    params = (pitch, storey, style, float(rng.uniform(0.35, 0.75)))
    kit.place(s, side * d, order=width / 2)
    z0, z1 = -width / 2, width / 2
    x0, x1 = 0.0, side * depth
    # End wall towards the traffic, then the front along the road.
    left, right = (x0, x1) if side > 0 else (x1, x0)
    kit.face(
        [(left, 0, z0), (right, 0, z0), (right, height, z0), (left, height, z0)],
        BUILDING,
        FACADE,
        _shade(rng, wall, 0.02),
        params,
    )
    if side > 0:
        front: list[Point] = [(0, 0, z1), (0, 0, z0), (0, height, z0), (0, height, z1)]
    else:
        front = [(0, 0, z0), (0, 0, z1), (0, height, z1), (0, height, z0)]
    kit.face(front, BUILDING, FACADE, wall, params)
    if rng.random() < 0.5:
        ridge = height + float(rng.uniform(1.5, 4.0))
        tiles = _pick(rng, ((0.45, 0.24, 0.18), (0.28, 0.28, 0.30), (0.40, 0.34, 0.28)), 0.06)
        mid = side * depth / 2
        kit.face([(left, height, z0), (right, height, z0), (mid, ridge, z0)], BUILDING, PLAIN, wall)
        eave = -0.4 * side
        if side > 0:
            slope: list[Point] = [(eave, height, z1), (eave, height, z0), (mid, ridge, z0), (mid, ridge, z1)]
        else:
            slope = [(eave, height, z0), (eave, height, z1), (mid, ridge, z1), (mid, ridge, z0)]
        kit.face(slope, BUILDING, ROOF, tiles)


def fence(kit: Kit, rng: np.random.Generator, s: float, side: int, d: float, length: float) -> None:
    height = float(rng.uniform(0.8, 1.9))
    colour = _pick(
        rng,
        ((0.62, 0.54, 0.44), (0.40, 0.32, 0.25), (0.72, 0.72, 0.70), (0.30, 0.36, 0.32), (0.55, 0.40, 0.34)),
        0.07,
    )
    kit.place(s, side * d, order=length / 2)
    z0, z1 = -length / 2, length / 2
    points: list[Point] = (
        [(0, 0, z1), (0, 0, z0), (0, height, z0), (0, height, z1)]
        if side > 0
        else [(0, 0, z0), (0, 0, z1), (0, height, z1), (0, height, z0)]
    )
    kit.face(
        points,
        FENCE,
        BOARDS,
        colour,
        (float(rng.uniform(0.12, 0.5)), float(rng.integers(0, 3)), height, float(rng.integers(0, 10_000))),
    )


def _blob(
    rng: np.random.Generator, x: float, y: float, rx: float, ry: float, n: int = 13
) -> list[tuple[float, float]]:
    radius = 1 + rng.normal(0, 0.13, n)
    angle = np.arange(n) * (2 * math.pi / n)
    return list(
        zip(
            (x + rx * radius * np.cos(angle)).tolist(),
            (y + ry * radius * np.sin(angle)).tolist(),
            strict=True,
        )
    )


def _leaves(rng: np.random.Generator) -> tuple[float, float, float, float]:
    return (float(rng.uniform(2.0, 5.0)), float(rng.uniform(0.25, 0.6)), float(rng.integers(0, 10_000)), 0.0)


def tree(kit: Kit, rng: np.random.Generator, world: World, s: float, d: float, *, small: bool) -> None:
    size = float(rng.uniform(0.6, 1.0) if small else rng.uniform(0.8, 1.7))
    colour = _pick(rng, world.flora, 0.07)
    bark = _pick(rng, ((0.34, 0.26, 0.20), (0.46, 0.42, 0.38), (0.24, 0.20, 0.18)), 0.05)
    kit.place(float(s), float(d))
    w = 0.16 * size
    trunk = float(rng.uniform(1.6, 2.8)) * size
    kit.board(
        [(-w, 0), (w, 0), (w * 0.7, trunk + 0.8), (-w * 0.7, trunk + 0.8)],
        VEGETATION,
        BOARDS,
        bark,
        (0.09, 2.0, 3.0, 0.0),
    )
    if rng.random() < 0.22:  # conifer
        top = trunk * 0.4
        for i in range(3):
            r = 1.5 * size * (1 - 0.25 * i)
            y = top + i * 1.5 * size
            kit.board(
                [(-r, y), (r, y), (0.15, y + 2.6 * size), (-0.15, y + 2.6 * size)],
                VEGETATION,
                LEAVES,
                colour,
                _leaves(rng),
            )
        return
    for i in range(int(rng.integers(3, 6))):
        x, y = float(rng.normal(0, 0.7)) * size, trunk + float(rng.uniform(0.7, 2.6)) * size
        r = float(rng.uniform(0.9, 1.5)) * size
        kit.board(
            _blob(rng, x, y, r, r * 0.85),
            VEGETATION,
            LEAVES,
            _shade(rng, colour, 0.03),
            _leaves(rng),
            z=-0.05 * i,
        )


def hedge(
    kit: Kit, rng: np.random.Generator, world: World, s: float, side: int, d: float, length: float
) -> None:
    height = float(rng.uniform(0.7, 2.6))
    colour = _pick(rng, world.flora, 0.06)
    kit.place(s, side * d, order=length / 2)
    z0, z1 = -length / 2, length / 2
    n = 7
    z = np.linspace(z1, z0, n) if side > 0 else np.linspace(z0, z1, n)
    top = height * (1 + rng.normal(0, 0.10, n))
    points: list[Point] = [(0, 0, float(z[0])), (0, 0, float(z[-1]))]
    points += [(0, float(h), float(q)) for h, q in zip(top[::-1], z[::-1], strict=True)]
    kit.face(points, VEGETATION, LEAVES, colour, _leaves(rng))
    end = [(0.0, 0.0), (side * 1.2, 0.0), (side * 1.2, float(top[0])), (0.0, float(top[0]))]
    kit.board(
        end if side > 0 else [end[1], end[0], end[3], end[2]],
        VEGETATION,
        LEAVES,
        _shade(rng, colour, 0.03),
        _leaves(rng),
        z=z0,
    )


def lamp_post(kit: Kit, rng: np.random.Generator, s: float, side: int, d: float) -> None:
    height = float(rng.uniform(5.0, 8.0))
    colour = _pick(
        rng, ((0.46, 0.47, 0.48), (0.22, 0.23, 0.24), (0.36, 0.42, 0.38), (0.62, 0.62, 0.60)), 0.05
    )
    reach = -side * float(rng.uniform(0.8, 2.2))
    w = float(rng.uniform(0.07, 0.12))
    kit.place(float(s), side * d, lamp=height)
    kit.board([(-w, 0), (w, 0), (w * 0.7, height), (-w * 0.7, height)], POLE, PLAIN, colour)
    arm = [
        (min(0, reach), height - 0.05),
        (max(0, reach), height - 0.05),
        (max(0, reach), height + 0.09),
        (min(0, reach), height + 0.09),
    ]
    kit.board(arm, POLE, PLAIN, colour)
    kit.board(
        [
            (reach - 0.28, height - 0.12),
            (reach + 0.28, height - 0.12),
            (reach + 0.24, height + 0.10),
            (reach - 0.24, height + 0.10),
        ],
        POLE,
        LAMP,
        colour,
    )


def bollard(kit: Kit, rng: np.random.Generator, s: float, d: float) -> None:
    height = float(rng.uniform(0.8, 1.1))
    colour = _pick(rng, ((0.25, 0.25, 0.26), (0.72, 0.70, 0.68), (0.60, 0.20, 0.16)), 0.06)
    kit.place(float(s), float(d))
    kit.board([(-0.09, 0), (0.09, 0), (0.09, height), (-0.09, height)], POLE, PLAIN, colour)


def sign_post(kit: Kit, rng: np.random.Generator, s: float, d: float) -> None:
    height = float(rng.uniform(1.9, 2.9))
    grey = _pick(rng, ((0.52, 0.53, 0.54), (0.38, 0.38, 0.40)), 0.04)
    kit.place(float(s), float(d))
    kit.board([(-0.05, 0), (0.05, 0), (0.05, height), (-0.05, height)], POLE, PLAIN, grey)
    r = float(rng.uniform(0.32, 0.55))
    kind = int(rng.integers(0, 4))
    ink: Colour = ((0.70, 0.08, 0.08), (0.08, 0.22, 0.60), (0.85, 0.72, 0.10), (0.10, 0.42, 0.22))[
        int(rng.integers(0, 4))
    ]
    if kind == 0:
        shape = [(r * math.cos(a), height + r * math.sin(a)) for a in np.arange(12) * (math.pi / 6)]
    elif kind == 1:
        shape = [(-r * 1.1, height - 0.6 * r), (r * 1.1, height - 0.6 * r), (0.0, height + 1.2 * r)]
    elif kind == 2:
        shape = [(-r, height - r), (r, height - r), (r, height + r), (-r, height + r)]
    else:
        w = r * float(rng.uniform(1.6, 3.2))
        shape = [(-w, height - r * 0.8), (w, height - r * 0.8), (w, height + r * 0.8), (-w, height + r * 0.8)]
    xs, ys = [x for x, _ in shape], [y for _, y in shape]
    size = (max(xs) - min(xs), max(ys) - min(ys))
    kit.board(shape, SIGN, PLATE, ink, (size[0], size[1], float(rng.integers(0, 4)), float(kind)), z=-0.05)


def traffic_light(kit: Kit, rng: np.random.Generator, s: float, d: float) -> None:
    height = 3.0
    kit.place(float(s), float(d))
    kit.board([(-0.07, 0), (0.07, 0), (0.07, height), (-0.07, height)], POLE, PLAIN, (0.20, 0.21, 0.21))
    kit.board(
        [(-0.2, height - 0.9), (0.2, height - 0.9), (0.2, height + 0.1), (-0.2, height + 0.1)],
        SIGN,
        PLATE,
        (0.06, 0.07, 0.06),
        (0.4, 1.0, float(rng.integers(0, 3)), 9.0),
        z=-0.05,
    )


def person(kit: Kit, rng: np.random.Generator) -> None:
    """The object must have been placed."""
    h = float(rng.uniform(1.45, 1.95))
    wide = float(rng.uniform(0.20, 0.29))
    coat = _pick(rng, PAINTS, 0.10)
    legs = _pick(rng, ((0.14, 0.15, 0.20), (0.24, 0.28, 0.40), (0.42, 0.36, 0.28), (0.12, 0.12, 0.12)), 0.06)
    skin = _pick(rng, ((0.78, 0.58, 0.48), (0.50, 0.34, 0.26), (0.32, 0.21, 0.16)), 0.05)
    stride = float(rng.uniform(0.02, 0.24))
    kit.board(
        [(-wide * 0.8 - stride, 0), (-0.02 - stride, 0), (0.02, h * 0.5), (-wide * 0.8, h * 0.5)],
        PERSON,
        PLAIN,
        legs,
    )
    kit.board(
        [(0.02 + stride, 0), (wide * 0.8 + stride, 0), (wide * 0.8, h * 0.5), (-0.02, h * 0.5)],
        PERSON,
        PLAIN,
        legs,
    )
    kit.board(
        [
            (-wide, h * 0.46),
            (wide, h * 0.46),
            (wide * 1.15, h * 0.82),
            (0.1, h * 0.87),
            (-0.1, h * 0.87),
            (-wide * 1.15, h * 0.82),
        ],
        PERSON,
        PLAIN,
        coat,
    )
    r = h * 0.075
    kit.board(
        [(r * math.cos(a), h * 0.925 + r * math.sin(a)) for a in np.arange(8) * (math.pi / 4)],
        PERSON,
        PLAIN,
        skin,
    )


def car(kit: Kit, rng: np.random.Generator, *, toward: bool) -> None:
    """A car, van or lorry of boxes; ``toward``: its front faces us.  The object must have been placed."""
    kind = rng.choice(4, p=[0.42, 0.36, 0.14, 0.08])
    paint = _pick(rng, PAINTS, 0.07)
    width = (1.74, 1.80, 1.95, 2.45)[kind] * float(rng.uniform(0.96, 1.04))
    length = (3.9, 4.6, 5.2, 8.5)[kind] * float(rng.uniform(0.95, 1.05))
    waist = (0.88, 0.86, 1.05, 1.10)[kind]
    top = (1.48, 1.42, 2.05, 3.20)[kind] * float(rng.uniform(0.96, 1.04))
    w, a, b = width / 2, -length / 2, length / 2
    low = 0.22
    end = (width, waist - low, 1.0 if toward else 0.0, float(rng.integers(0, 10_000)))
    flank = (length, waist - low, 0.0, 0.0)
    if kind == 3:
        # A lorry: a closed box over a dark chassis.
        kit.face(
            [(-w, low, a), (w, low, a), (w, top, a), (-w, top, a)],
            CAR,
            CAR_END,
            paint,
            (width, top - low, end[2], end[3]),
        )
        kit.face(
            [(-w, low, b), (-w, low, a), (-w, top, a), (-w, top, b)],
            CAR,
            CAR_SIDE,
            paint,
            (length, top - low, 1.0, 0.0),
        )
        kit.face(
            [(w, low, a), (w, low, b), (w, top, b), (w, top, a)],
            CAR,
            CAR_SIDE,
            paint,
            (length, top - low, 1.0, 0.0),
        )
        return
    kit.face([(-w, low, b), (-w, low, a), (-w, waist, a), (-w, waist, b)], CAR, CAR_SIDE, paint, flank)
    kit.face([(w, low, a), (w, low, b), (w, waist, b), (w, waist, a)], CAR, CAR_SIDE, paint, flank)
    kit.face([(-w, waist, a), (w, waist, a), (w, waist, b), (-w, waist, b)], CAR, PLAIN, paint)
    kit.face([(-w, low, a), (w, low, a), (w, waist, a), (-w, waist, a)], CAR, CAR_END, paint, end)
    # The cabin leans in; which end is long depends on the way the car points.
    bonnet, boot = ((0.24, 0.05), (0.24, 0.16), (0.16, 0.01))[kind]
    near, far = (bonnet, boot) if toward else (boot, bonnet)
    c, e = a + near * length, b - far * length
    slope_c, slope_e = (0.13 if toward else 0.07) * length, (0.07 if toward else 0.13) * length
    n = w * 0.80
    kit.face(
        [(-w * 0.97, waist, e), (-w * 0.97, waist, c), (-n, top, c + slope_c), (-n, top, e - slope_e)],
        CAR,
        CABIN,
        paint,
        (e - c, top - waist, 0.0, 0.0),
    )
    kit.face(
        [(w * 0.97, waist, c), (w * 0.97, waist, e), (n, top, e - slope_e), (n, top, c + slope_c)],
        CAR,
        CABIN,
        paint,
        (e - c, top - waist, 0.0, 0.0),
    )
    kit.face(
        [(-n, top, c + slope_c), (n, top, c + slope_c), (n, top, e - slope_e), (-n, top, e - slope_e)],
        CAR,
        PLAIN,
        paint,
    )
    kit.face(
        [(-w * 0.97, waist, c), (w * 0.97, waist, c), (n, top, c + slope_c), (-n, top, c + slope_c)],
        CAR,
        CABIN,
        paint,
        (width * 0.97, top - waist, 1.0, 0.0),
    )
