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

What SEAL lacks and this has is a ``Gate``: a bad detector harms labels, so pieces of label whose ridges are
weak
stay where they are.  This module knows nothing of networks, files or classes: one class of one image.
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

__all__ = ["Alignment", "Gate", "align", "align_details", "tangents"]

#: Candidates a pixel grow with the square of the reach; the published ones are 6 and 12 pixels.
FARTHEST = 64
CLIP = 64.0
STEPS = 16  # geodesic reach of N(q)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)


@dataclass(frozen=True)
class Gate:
    """Which pieces of a label may move.  A piece is what a tile of ``tile`` pixels cuts out of a component.

    strength: mean over a piece's pixels of the best probability within reach; contrast: that minus the mean
    probability within reach (a ridge stands out, fog does not); gain: mean cost saved a pixel; pieces below
    any of them keep their pixels.  Kept pieces are pinned, not left out: nobody else may take their place.
    """

    strength: float = 0.5
    contrast: float = 0.15
    gain: float = 0.5
    tile: int = 32

    def __post_init__(self) -> None:
        numbers = (self.strength, self.contrast, self.gain)
        if not all(_is_number(v) for v in numbers) or not isinstance(self.tile, int) or self.tile < 1:
            raise EdgeError(f"{self}: finite limits and a tile of whole pixels, 1 at least, are needed")


@dataclass(frozen=True)
class Alignment:
    """What happened to a label.

    aligned: bool [H,W]; source, target: int64 [n,2], (y, x) of each label pixel and of where it went;
    moved: bool [n], False where the gate kept the pixel; cost_before, cost_after: the mean unary cost a
    pixel.
    """

    aligned: NDArray[np.bool_]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    moved: NDArray[np.bool_]
    cost_before: float
    cost_after: float

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
def _spread(label, skeleton, angle, reach, spread):  # type: ignore[no-untyped-def]
    """Carry the skeleton's angles to the label pixels around, each unwrapped against the running mean."""
    height, width = label.shape
    total = np.zeros((height, width))
    weight = np.zeros((height, width))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            w = math.exp(-(dx * dx + dy * dy) / spread)
            for y in range(height):
                j = y + dy
                if j < 0 or j >= height:
                    continue
                for x in range(width):
                    i = x + dx
                    if not label[y, x] or i < 0 or i >= width or not skeleton[j, i]:
                        continue
                    theta = angle[j, i]
                    if weight[y, x] > 0:
                        mean = total[y, x] / weight[y, x]
                        if theta - mean > math.pi / 2:
                            theta -= math.pi
                        elif theta - mean < -math.pi / 2:
                            theta += math.pi
                    total[y, x] += w * theta
                    weight[y, x] += w
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            if weight[y, x] > 0:
                theta = total[y, x] / weight[y, x]
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
    return np.asarray(_spread(label, skeleton, _thin_tangents(skeleton, 5, 8, 0.5), 5, 8.0))


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
def _neighbour_sums(index, ys, xs, move, reach):  # type: ignore[no-untyped-def]
    """For each label pixel q, over N(q): (count, Σu, Σv, Σ|m|²) of the moves, float64 [n,4].

    index: int32 [H,W], the label pixel's number or -1.
    """
    height, width = index.shape
    sums = np.zeros((ys.size, 4))
    seen = np.full(ys.size, -1, np.int32)
    queue = np.empty(ys.size, np.int32)
    for q in range(ys.size):
        seen[q] = q
        queue[0] = q
        head, tail = 0, 1
        for _ in range(reach):
            ring = tail
            while head < ring:
                y, x = ys[queue[head]], xs[queue[head]]
                head += 1
                for j in range(max(0, y - 1), min(height, y + 2)):
                    for i in range(max(0, x - 1), min(width, x + 2)):
                        w = index[j, i]
                        if w >= 0 and seen[w] != q:
                            seen[w] = q
                            queue[tail] = w
                            tail += 1
                            u, v = move[w, 0], move[w, 1]
                            sums[q, 0] += 1
                            sums[q, 1] += u
                            sums[q, 2] += v
                            sums[q, 3] += u * u + v * v
            if tail == ring:
                break
    return sums


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
        return Alignment(label.copy(), source, source.copy(), np.zeros(0, bool), 0.0, 0.0)
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
    free = np.ones(n, bool)
    piece = np.zeros(n, np.int64)
    if gate is not None:
        piece = _pieces(label, ys, xs, gate.tile)
        free = _ridges(p, columns, counts, piece, gate)

    def solved() -> NDArray[np.int64]:
        where = columns.copy()
        price, count = costs.copy(), np.where(free, counts, 1)
        pinned = np.flatnonzero(~free)
        where[pinned, 0], price[pinned, 0] = columns[pinned, stay[pinned]], costs[pinned, stay[pinned]]
        choice = solve(where, price, count)
        choice[pinned] = stay[pinned]
        if smoothness:
            index = np.full(label.shape, -1, np.int32)
            index[ys, xs] = every
            for _ in range(iterations):
                sums = _neighbour_sums(index, ys, xs, moves[every, choice], STEPS)
                _with_pairs(costs, counts, moves, sums, smoothness, price)
                price[pinned, 0] = costs[pinned, stay[pinned]]
                choice = solve(where, price, count)
                choice[pinned] = stay[pinned]
        return np.asarray(choice)

    choice = solved()
    if gate is not None and free.any():
        saved = np.bincount(piece, costs[every, stay] - costs[every, choice]) / np.bincount(piece)
        poor = (saved < gate.gain)[piece] & free
        if poor.any():
            free &= ~poor
            choice = solved()
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
        gate: None moves everything, as published; a ``Gate`` keeps pieces with weak ridges where they are.
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


def _ridges(
    p: NDArray[np.float64],
    columns: NDArray[np.int32],
    counts: NDArray[np.int64],
    piece: NDArray[np.int64],
    gate: Gate,
) -> NDArray[np.bool_]:
    """Which label pixels lie in pieces with a ridge within reach."""
    valid = np.arange(columns.shape[1]) < counts[:, None]
    near = np.where(valid, p.reshape(-1)[columns], 0.0)
    best, mean = near.max(1), near.sum(1) / counts
    size = np.bincount(piece)
    strength = np.bincount(piece, best) / size
    contrast = strength - np.bincount(piece, mean) / size
    return np.asarray(((strength >= gate.strength) & (contrast >= gate.contrast))[piece])
