"""SEAL's label alignment: move noisy edge labels onto the ridges a network sees, one pixel to one pixel.

Source: Yu et al., "Simultaneous Edge Alignment and Learning", ECCV 2018 (the symbols are the paper's).  Every
label pixel q is assigned a pixel m(q) of its own, minimising

    Σ_q  c_m(q) + s_q(m(q))  +  λ Σ_q Σ_{w in N(q)} |m(q) − q − (m(w) − w)|²

  c_p   log((1−P)/P) clipped to ±64, + 64: cheap where the network sees an edge
  s_q   the biased Gaussian: moving along the tangent is dear (σx), across it cheap (σy); at most max_cost
  N(q)  label pixels within 16 steps along the label: neighbours should move alike

First the unary assignment, then ``iterations`` ICM steps with m(w) from the step before.  The pairwise term
costs
O(1) a candidate, from three sums over N(q).  As m(q) = q is always allowed, every label pixel is assigned
and the
label's thickness is kept.

What SEAL lacks and this has is a ``Gate``: a bad detector harms labels, so pieces of label whose pixels
would not move together stay where they are.  This module knows nothing of networks, files or classes: it
aligns one class of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.labels import assignment
from adapt.labels.errors import EdgeError
from adapt.labels.thinning import thin

__all__ = ["Alignment", "Gate", "Pieces", "align", "align_details", "tangents"]

#: Candidates a pixel grow with the square of the reach; the published ones are 6 and 12 pixels.
FARTHEST = 64
CLIP = 64.0
STEPS = 16  # geodesic reach of N(q)
MEMBERS = 1 << 24  # of all N(q) together: 64 MiB


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)


@dataclass(frozen=True)
class Gate:
    """Which pieces of a label may move.  A piece is what a tile of ``tile`` pixels cuts out of a component.

    An annotator's error moves neighbouring pixels alike, and noise does not.  So the gate looks at where the
    pixels of a piece would go: the spread of their moves is the root mean square distance of a move from the
    piece's mean move, in pixels.  A piece keeps its pixels if the spread is over ``spread``, or over ``base``
    plus ``slope`` times the mean length of its moves.  The gate pins a piece that keeps its pixels: no other
    pixel takes their places.  ``bench.edges_gate`` measures the criterion and the limits on pieces.

    Raises EdgeError if a limit is no finite number of at least 0, or if the tile is no whole number of at
    least 1.
    """

    spread: float = 0.8
    base: float = 0.5
    slope: float = 0.3
    tile: int = 32

    def __post_init__(self) -> None:
        numbers = (self.spread, self.base, self.slope)
        limits = all(_is_number(v) and v >= 0 for v in numbers)
        whole = isinstance(self.tile, int) and not isinstance(self.tile, bool)
        if not limits or not whole or self.tile < 1:
            raise EdgeError(
                f"{self}: finite limits of at least 0 and a tile of whole pixels, 1 at least, are needed"
            )

    def stops(self, move: NDArray[np.float64], spread: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which pieces keep their pixels: mean length and spread of the moves, float64 [n] -> bool [n]."""
        return np.asarray((spread > self.spread) | (spread > self.base + self.slope * move))


@dataclass(frozen=True)
class Pieces:
    """The pieces of an aligned label, as the solution without pins would move them.

    size: int64 [n], pixels; move: float64 [n], mean length of the moves in pixels; spread: float64 [n], root
    mean square distance of a move from the piece's mean move; stopped: bool [n], the gate kept the piece.
    """

    size: NDArray[np.int64]
    move: NDArray[np.float64]
    spread: NDArray[np.float64]
    stopped: NDArray[np.bool_]


@dataclass(frozen=True)
class Alignment:
    """What happened to a label.

    aligned: bool [H,W]; source, target: int64 [n,2], (y, x) of each label pixel and of where it went;
    moved: bool [n], False if the gate kept the pixel; cost_before, cost_after: the mean unary cost per
    pixel; piece: int64 [n], the piece of each label pixel; pieces: what is known of each piece.
    """

    aligned: NDArray[np.bool_]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    moved: NDArray[np.bool_]
    cost_before: float
    cost_after: float
    piece: NDArray[np.int64]
    pieces: Pieces

    @property
    def shift(self) -> NDArray[np.float64]:
        """|m(q)|: how far each label pixel went, float64 [n]."""
        return np.asarray(np.hypot(*(self.target - self.source).T))


# --------------------------------------------------------------------------------------------- tangents
@numba.njit(cache=True, nogil=True)
def _thin_tangents(skeleton, reach, least, sharp):  # type: ignore[no-untyped-def]
    """Tangent angle of every skeleton pixel, from its geodesic neighbours up to ``reach`` steps away."""
    height, width = skeleton.shape
    angle = np.zeros((height, width))
    size = 2 * reach + 1
    queue = np.empty((size * size, 2), np.int64)
    steps = np.empty((size, size), np.int64)
    for y in range(height):
        for x in range(width):
            if not skeleton[y, x]:
                continue
            steps[:] = -1
            steps[reach, reach] = 0
            queue[0, 0], queue[0, 1] = 0, 0
            head, tail = 0, 1
            xx = xy = yy = mx = my = 0.0
            while head < tail:
                dy, dx = queue[head]
                head += 1
                step = steps[dy + reach, dx + reach]
                if step > 0:
                    vy, vx = -float(dy), float(dx)  # y up
                    length = math.sqrt(vx * vx + vy * vy)
                    mx += vx / length
                    my += vy / length
                    xx += vx * vx
                    xy += vx * vy
                    yy += vy * vy
                if step == reach:
                    continue
                for j in range(-1, 2):
                    for i in range(-1, 2):
                        b, a = dy + j, dx + i
                        if (
                            -reach <= b <= reach
                            and -reach <= a <= reach
                            and 0 <= y + b < height
                            and 0 <= x + a < width
                            and skeleton[y + b, x + a]
                            and steps[b + reach, a + reach] < 0
                        ):
                            steps[b + reach, a + reach] = step + 1
                            queue[tail, 0], queue[tail, 1] = b, a
                            tail += 1
            n = tail - 1
            if n == 0:
                angle[y, x] = math.pi / 2
                continue
            mx /= n
            my /= n
            if n >= least and math.sqrt(mx * mx + my * my) > sharp:
                ty, tx = mx, -my  # a sharp turn: the neighbours' mean direction, turned by 90 degrees
            else:
                # top eigenvector of the scatter of the neighbours
                theta = 0.5 * math.atan2(2 * xy, xx - yy)
                ty, tx = math.sin(theta), math.cos(theta)
            angle[y, x] = math.pi / 2 if abs(tx) < 1e-12 else math.atan(ty / tx)
    return angle


@numba.njit(cache=True, nogil=True)
def _spread(ys, xs, skeleton, angle, reach, spread):  # type: ignore[no-untyped-def]
    """Carry the skeleton's angles to the label pixels around, each unwrapped against the running mean."""
    height, width = skeleton.shape
    weights = np.empty((2 * reach + 1, 2 * reach + 1))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weights[dy + reach, dx + reach] = math.exp(-(dx * dx + dy * dy) / spread)
    out = np.zeros((height, width))
    for q in range(ys.size):
        y, x = ys[q], xs[q]
        total = weight = 0.0
        for j in range(max(0, y - reach), min(height, y + reach + 1)):
            for i in range(max(0, x - reach), min(width, x + reach + 1)):
                if not skeleton[j, i]:
                    continue
                w = weights[j - y + reach, i - x + reach]
                theta = angle[j, i]
                if weight > 0:
                    mean = total / weight
                    if theta - mean > math.pi / 2:
                        theta -= math.pi
                    elif theta - mean < -math.pi / 2:
                        theta += math.pi
                total += w * theta
                weight += w
        if weight > 0:
            theta = total / weight
            while theta > math.pi / 2:
                theta -= math.pi
            while theta <= -math.pi / 2:
                theta += math.pi
            out[y, x] = theta
    return out


def tangents(label: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Direction of the edge at each label pixel: bool [H,W] -> float64 [H,W], radians, y up, (−π/2, π/2].

    From the thinned label: neighbours within 5 steps along it; in a sharp turn the direction across their
    mean,
    else their principal direction; an isolated pixel counts as upright.  Spread with a Gaussian to the pixels
    around; 0 where no skeleton pixel is within 5 pixels, and off the label.
    """
    label = _bool_map(label, "tangents")
    skeleton = thin(label)
    ys, xs = np.nonzero(label)
    return np.asarray(_spread(ys, xs, skeleton, _thin_tangents(skeleton, 5, 8, 0.5), 5, 8.0))


# ------------------------------------------------------------------------------------------- candidates
@numba.njit(cache=True, nogil=True)
def _candidates(  # type: ignore[no-untyped-def]
    ys, xs, tangent, unary, sigma_x, sigma_y, max_cost, reach, columns, costs, moves
):
    """Fill each label pixel's candidate list; return how many it has.  Candidate lists are row-major."""
    height, width = unary.shape
    counts = np.zeros(ys.size, np.int64)
    for q in range(ys.size):
        y, x = ys[q], xs[q]
        t = tangent[y, x]
        cos2, sin2 = math.cos(t) ** 2, math.sin(t) ** 2
        a = cos2 / (2 * sigma_x**2) + sin2 / (2 * sigma_y**2)
        c = sin2 / (2 * sigma_x**2) + cos2 / (2 * sigma_y**2)
        b = math.sin(2 * t) / 4 * (1 / sigma_x**2 - 1 / sigma_y**2)
        n = 0
        for py in range(max(0, y - reach), min(height, y + reach + 1)):
            v = float(y - py)  # y up
            for px in range(max(0, x - reach), min(width, x + reach + 1)):
                u = float(px - x)
                s = a * u * u + 2 * b * u * v + c * v * v
                if s <= max_cost:
                    columns[q, n] = py * width + px
                    costs[q, n] = unary[py, px] + s
                    moves[q, n, 0] = u
                    moves[q, n, 1] = v
                    n += 1
        counts[q] = n
    return counts


@numba.njit(cache=True, nogil=True)
def _beside(index, ys, xs):  # type: ignore[no-untyped-def]
    """The label pixels beside each one: int32 [n,8] and how many int32 [n].

    index: int32 [H,W], the label pixel's number or -1.
    """
    height, width = index.shape
    beside = np.empty((ys.size, 8), np.int32)
    degree = np.zeros(ys.size, np.int32)
    for q in range(ys.size):
        y, x = ys[q], xs[q]
        n = 0
        for j in range(max(0, y - 1), min(height, y + 2)):
            for i in range(max(0, x - 1), min(width, x + 2)):
                w = index[j, i]
                if w >= 0 and w != q:
                    beside[q, n] = w
                    n += 1
        degree[q] = n
    return beside, degree


@numba.njit(cache=True, nogil=True)
def _neighbourhoods(beside, degree, first, reach, most):  # type: ignore[no-untyped-def]
    """N(q) of the label pixels from ``first`` on, one list after the other, until ``most`` members are full.

    Returns (int64 [k+1] starts, int32 members) of the first k pixels; k is 1 at least.  N(q) depends on the
    label alone, so that each search serves all ICM steps.
    """
    n = degree.size
    seen = np.full(n, -1, np.int32)
    queue = np.empty(n, np.int32)
    starts = np.zeros(n - first + 1, np.int64)
    members = np.empty(max(most, n), np.int32)
    total = 0
    for q in range(first, n):
        seen[q] = q
        queue[0] = q
        head, tail = 0, 1
        for _ in range(reach):
            ring = tail
            while head < ring:
                at = queue[head]
                head += 1
                for k in range(degree[at]):
                    w = beside[at, k]
                    if seen[w] != q:
                        seen[w] = q
                        queue[tail] = w
                        tail += 1
            if tail == ring:
                break
        if total + tail - 1 > members.size:
            return starts[: q - first + 1], members[:total]
        members[total : total + tail - 1] = queue[1:tail]
        total += tail - 1
        starts[q - first + 1] = total
    return starts, members[:total]


@numba.njit(cache=True, nogil=True)
def _sums(starts, members, move, first, sums):  # type: ignore[no-untyped-def]
    """For each label pixel q from ``first`` on, over N(q): (count, Σu, Σv, Σ|m|²) of the moves."""
    for q in range(starts.size - 1):
        su = sv = square = 0.0
        for k in range(starts[q], starts[q + 1]):
            u, v = move[members[k], 0], move[members[k], 1]
            su += u
            sv += v
            square += u * u + v * v
        sums[first + q, 0] = starts[q + 1] - starts[q]
        sums[first + q, 1] = su
        sums[first + q, 2] = sv
        sums[first + q, 3] = square


class _Neighbourhoods:
    """N(q) of every label pixel; the lists are made once if they fit into ``MEMBERS``, else for each step."""

    def __init__(self, index: NDArray[np.int32], ys: NDArray[np.int64], xs: NDArray[np.int64]) -> None:
        self.beside, self.degree = _beside(index, ys, xs)
        starts, members = _neighbourhoods(self.beside, self.degree, 0, STEPS, self._most())
        self.kept = (starts, members) if starts.size == ys.size + 1 else None

    def _most(self) -> int:
        return int(min(MEMBERS, self.degree.size * (2 * STEPS + 1) ** 2))

    def sums(self, move: NDArray[np.float32]) -> NDArray[np.float64]:
        """(count, Σu, Σv, Σ|m|²) over N(q) of each label pixel: float [n,2] -> float64 [n,4]."""
        out = np.zeros((self.degree.size, 4))
        if self.kept is not None:
            _sums(*self.kept, move, 0, out)
            return out
        first = 0
        while first < self.degree.size:
            starts, members = _neighbourhoods(self.beside, self.degree, first, STEPS, self._most())
            _sums(starts, members, move, first, out)
            first += starts.size - 1
        return out


@numba.njit(cache=True, nogil=True)
def _with_pairs(costs, counts, moves, sums, smoothness, out):  # type: ignore[no-untyped-def]
    """Unary + λ Σ_w |m_w − m|² = unary + λ (Σ|m_w|² − 2 m·Σm_w + |N| |m|²), per candidate."""
    for q in range(counts.size):
        n, su, sv, square = sums[q]
        for k in range(counts[q]):
            u, v = moves[q, k, 0], moves[q, k, 1]
            out[q, k] = costs[q, k] + smoothness * (square - 2 * (u * su + v * sv) + n * (u * u + v * v))


def _bool_map(label: NDArray[Any], what: str) -> NDArray[np.bool_]:
    label = np.asarray(label)
    if label.ndim != 2 or label.dtype != np.bool_:
        raise EdgeError(f"{what}: the label is {label.dtype} {list(label.shape)}, bool [H,W] is needed")
    return label


def _checked(label: Any, probability: Any, tangent: Any) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    label, p = _bool_map(label, "align"), np.asarray(probability)
    if p.shape != label.shape:
        raise EdgeError(
            f"align: the label is {list(label.shape)} and the probability {list(p.shape)}; "
            f"bring both to one size"
        )
    if not np.issubdtype(p.dtype, np.floating):
        raise EdgeError(f"align: the probability is {p.dtype}, float in 0..1 is needed; divide bytes by 255")
    if not np.isfinite(p).all():
        raise EdgeError("align: the probability holds NaN or infinity; mend the network first")
    if p.size and (p.min() < 0 or p.max() > 1):
        raise EdgeError(
            f"align: probabilities run from {p.min():g} to {p.max():g}; give sigmoids in 0..1, not logits"
        )
    if tangent is not None and (
        np.shape(tangent) != label.shape
        or np.asarray(tangent).dtype.kind not in "fiu"
        or not np.isfinite(np.asarray(tangent)[label]).all()
    ):
        raise EdgeError(
            f"align: tangents are {list(np.shape(tangent))}; finite radians {list(label.shape)} are needed"
        )
    return label, p.astype(np.float64)


def align_details(
    label: NDArray[np.bool_],
    probability: NDArray[np.floating],
    *,
    sigma_x: float = 1.0,
    sigma_y: float = 3.0,
    max_cost: float = 2.0,
    smoothness: float = 0.02,
    iterations: int = 2,
    tangents: NDArray[np.floating] | None = None,
    solver: str = "exact",
    gate: Gate | None = None,
) -> Alignment:
    """``align``, with where every pixel went."""
    label, p = _checked(label, probability, tangents)
    for name, value in (("sigma_x", sigma_x), ("sigma_y", sigma_y), ("max_cost", max_cost)):
        if not (_is_number(value) and value > 0):
            raise EdgeError(f"align: {name} is {value!r}, a finite number above 0 is needed")
    if not (_is_number(smoothness) and smoothness >= 0):
        raise EdgeError(f"align: smoothness is {smoothness!r}, a finite number from 0 on is needed")
    if not isinstance(iterations, int | np.integer) or iterations < 0:
        raise EdgeError(f"align: iterations is {iterations!r}, a whole number from 0 on is needed")
    if not isinstance(solver, str) or solver not in _SOLVERS:
        raise EdgeError(f"align: no solver {solver!r}; choose exact or auction")
    if gate is not None and not isinstance(gate, Gate):
        raise EdgeError(f"align: the gate is {gate!r}; give a Gate, or None to move everything")
    solve = _SOLVERS[solver]
    reach = max(sigma_x, sigma_y) * math.sqrt(2 * max_cost)
    if reach > FARTHEST:
        raise EdgeError(
            f"align: with this sigma and max_cost a pixel may go {reach:.0f} pixels; {FARTHEST} at most"
        )
    ys, xs = (a.astype(np.int64) for a in np.nonzero(label))
    n = ys.size
    source = np.stack([ys, xs], 1)
    if n == 0:
        none = np.zeros(0, np.int64)
        pieces = _told(none, np.zeros((0, 2)), gate)
        return Alignment(label.copy(), source, source.copy(), np.zeros(0, bool), 0.0, 0.0, none, pieces)
    tangent = _tangents(label) if tangents is None else np.asarray(tangents, np.float64)
    reach = math.ceil(reach)
    with np.errstate(divide="ignore"):
        unary = np.clip(np.log((1 - p) / p), -CLIP, CLIP) + CLIP
    # the ellipse's area bounds the candidates; its border may hold a few more pixels
    most = min(
        (2 * reach + 1) ** 2, math.ceil(math.pi * (sigma_x * math.sqrt(2 * max_cost) + 1.5) * (reach + 1.5))
    )
    columns = np.zeros((n, most), np.int32)
    costs = np.zeros((n, most))
    moves = np.zeros((n, most, 2), np.float32)
    counts = _candidates(ys, xs, tangent, unary, sigma_x, sigma_y, max_cost, reach, columns, costs, moves)
    itself = (columns == (ys * label.shape[1] + xs)[:, None]) & (np.arange(most) < counts[:, None])
    stay = itself.argmax(1)
    every = np.arange(n)
    index = np.full(label.shape, -1, np.int32)
    index[ys, xs] = every
    around = _Neighbourhoods(index, ys, xs) if smoothness and iterations else None

    def solved(pinned: NDArray[np.int64]) -> NDArray[np.int64]:
        where, price, count = columns, costs, counts
        if pinned.size:
            where, price, count = columns.copy(), costs.copy(), counts.copy()
            count[pinned] = 1
            where[pinned, 0], price[pinned, 0] = columns[pinned, stay[pinned]], costs[pinned, stay[pinned]]
        choice = solve(where, price, count)
        choice[pinned] = stay[pinned]
        total = np.empty_like(costs)
        for _ in range(0 if around is None else iterations):
            before = choice
            sums = around.sums(moves[every, choice])  # type: ignore[union-attr]
            _with_pairs(costs, counts, moves, sums, smoothness, total)
            total[pinned, 0] = costs[pinned, stay[pinned]]
            choice = solve(where, total, count)
            choice[pinned] = stay[pinned]
            if (choice == before).all():  # the next step would have the same costs
                break
        return np.asarray(choice)

    free = np.ones(n, bool)
    choice = solved(np.zeros(0, np.int64))
    piece = _pieces(label, ys, xs, Gate.tile if gate is None else gate.tile)
    pieces = _told(piece, moves[every, choice].astype(np.float64), gate)
    if pieces.stopped.any():
        free = ~pieces.stopped[piece]
        choice = solved(np.flatnonzero(~free))
    target = columns[every, choice].astype(np.int64)
    aligned = np.zeros(label.shape, bool)
    aligned.reshape(-1)[target] = True
    width = label.shape[1]
    return Alignment(
        aligned,
        source,
        np.stack([target // width, target % width], 1),
        free,
        float(costs[every, stay].mean()),
        float(costs[every, choice].mean()),
        piece,
        pieces,
    )


def align(
    label: NDArray[np.bool_],
    probability: NDArray[np.floating],
    *,
    sigma_x: float = 1.0,
    sigma_y: float = 3.0,
    max_cost: float = 2.0,
    smoothness: float = 0.02,
    iterations: int = 2,
    tangents: NDArray[np.floating] | None = None,
    solver: str = "exact",
    gate: Gate | None = None,
) -> NDArray[np.bool_]:
    """A label moved onto the ridges of a probability map: bool [H,W], with as many pixels as before.

    Args:
        label: bool [H,W], one class.
        probability: float [H,W] in 0..1, the network's edge probability of that class.
        sigma_x, sigma_y: spread along and across the edge in pixels (Cityscapes 1, 3; SBD 1, 4).
        max_cost: largest spatial cost of a move (Cityscapes 2, SBD 4.5): reach = ceil(σ √(2 max_cost)).
        smoothness: λ of the pairwise term; 0 = none.
        iterations: ICM steps after the unary solve.
        tangents: float [H,W], radians with y up; None: ``tangents(label)``.
        solver: "exact" (optimal in hundredths of a cost unit) or "auction" (within 1e-4, several times
        faster).
        gate: None moves everything, as published; a ``Gate`` keeps pieces whose pixels would not move
        together.
    Raises:
        EdgeError: sizes that differ, NaN, logits, parameters out of range.  An empty label gives an empty
        one.
    """
    return align_details(
        label,
        probability,
        sigma_x=sigma_x,
        sigma_y=sigma_y,
        max_cost=max_cost,
        smoothness=smoothness,
        iterations=iterations,
        tangents=tangents,
        solver=solver,
        gate=gate,
    ).aligned


_tangents = tangents  # `align` has an argument of that name
_SOLVERS: dict[str, Any] = {"exact": assignment.exact, "auction": assignment.auction}


def _pieces(
    label: NDArray[np.bool_], ys: NDArray[np.int64], xs: NDArray[np.int64], tile: int
) -> NDArray[np.int64]:
    """The piece each label pixel belongs to, numbered from 0: components (8-neighbours) cut by tiles."""
    from scipy.ndimage import label as components

    part = components(label, np.ones((3, 3)))[0][ys, xs].astype(np.int64)
    key = (part * (label.shape[0] // tile + 1) + ys // tile) * (label.shape[1] // tile + 1) + xs // tile
    return np.asarray(np.unique(key, return_inverse=True)[1])


def _told(piece: NDArray[np.int64], move: NDArray[np.float64], gate: Gate | None) -> Pieces:
    """Size, mean move and spread of every piece, and whether the gate stops it: int64 [n], float64 [n,2]."""
    size = np.bincount(piece)
    mean = np.stack([np.bincount(piece, move[:, i]) for i in range(2)], 1) / size[:, None]
    length = np.bincount(piece, np.hypot(*move.T)) / size
    away = np.bincount(piece, ((move - mean[piece]) ** 2).sum(1)) / size
    spread = np.sqrt(away)
    stopped = np.zeros(size.size, bool) if gate is None else gate.stops(length, spread)
    return Pieces(size, length, spread, stopped)
