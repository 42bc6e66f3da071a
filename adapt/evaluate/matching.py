"""One-to-one matching of boundary pixels within a distance: exact, deterministic, on the pixel grid.

The published benchmark (``correspondPixels``) solves this with a random sparse graph and a cost-scaling
solver; its answer varies from run to run and never exceeds the maximum matching.  Here the maximum itself is
computed.  The graph is never built: a pixel's partners are the cells of a disc around it.

Method: augmenting paths (the Kuhn and Hopcroft-Karp family) with two facts that make them cheap:
  * a truth pixel that is matched stays matched, so each prediction pixel scans its disc for a free partner
    once in total (a pointer that only moves forward);
  * the truth pixels a failed search has visited can never again lie on an augmenting path, so they leave the
    graph: all failed searches together cost one pass over the edges.
Both hold while prediction pixels keep arriving.  Sets of matchable prediction pixels form a transversal
matroid, so offering pixels by falling score gives, after each prefix, that prefix's maximum: one run answers
every threshold of a map that is not thinned.

It knows nothing of thresholds' values, classes or files.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.labels.errors import EdgeError

__all__ = ["Grid", "augment_levels", "check_pair", "disc", "match_min_cost", "match_pairs", "radius_of"]


def radius_of(shape: tuple[int, int], max_distance: float) -> float:
    """Matching radius in pixels of a map: ``max_distance`` times its diagonal.  Not rounded."""
    number = isinstance(max_distance, int | float | np.floating | np.integer) and not isinstance(
        max_distance, bool
    )
    if not (number and math.isfinite(max_distance) and max_distance >= 0):
        raise EdgeError(
            f"match: max_distance is {max_distance!r}, a finite fraction of the diagonal >= 0 is needed"
        )
    if max_distance > 1:
        raise EdgeError(
            f"match: max_distance is {max_distance}, more than the whole diagonal; give a fraction "
            "such as 0.0075"
        )
    return float(max_distance) * math.hypot(*shape)


@functools.lru_cache(maxsize=64)
def disc(radius: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets (dy, dx) with dy^2 + dx^2 <= radius^2, nearest first; equal distances row by row."""
    reach = math.floor(radius)
    dy, dx = (a.ravel() for a in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    distance = dy * dy + dx * dx
    inside = distance <= radius * radius
    dy, dx, distance = dy[inside], dx[inside], distance[inside]
    order = np.argsort(distance, kind="stable")
    return dy[order].astype(np.int64), dx[order].astype(np.int64)


@numba.njit(cache=True, nogil=True)
def augment_levels(owner, n_free, pixels, ends, offsets, partner, seen, search):  # type: ignore[no-untyped-def]
    """Grow one maximum matching over prefixes of ``pixels``; return its size after each prefix.

    owner: int32 flat padded map, -1 a free truth pixel (there are ``n_free``), -2 anything else (rewritten:
    >= 0 is the index of the prediction pixel it belongs to, -2 also a truth pixel that can change no more);
    pixels: int32 flat indices; ends: int64 prefix lengths; offsets: int64 flat, nearest first;
    partner: int32 out, the truth pixel of each prediction pixel or -1;
    seen: int64 scratch like owner, holding no value in search .. search + pixels.size - 1.
    """
    n_offsets = offsets.size
    counts = np.zeros(ends.size, np.int64)
    next_free = np.zeros(pixels.size, np.int32)
    # The search tree: node t is prediction pixel tree[t], reached from node above[t] because it owns the
    # truth pixel through[t].  The newest node is expanded first: trees stay half the size of breadth-first
    # ones.
    tree = np.empty(pixels.size, np.int32)
    above = np.empty(pixels.size, np.int32)
    through = np.zeros(pixels.size, np.int32)
    stack = np.empty(pixels.size, np.int32)
    matched = 0
    p = 0
    for level in range(ends.size):
        while p < ends[level]:
            partner[p] = -1
            if n_free == 0:
                p += 1
                continue
            tree[0] = p
            above[0] = -1
            n_tree = 1
            stack[0] = 0
            n_stack = 1
            free = -1
            at = 0
            for k in range(n_offsets):
                cell = pixels[p] + offsets[k]
                if owner[cell] == -1:
                    free = cell
                    next_free[p] = k + 1
                    break
            if free < 0:
                next_free[p] = n_offsets
            while free < 0 and n_stack > 0:
                n_stack -= 1
                node = stack[n_stack]
                place = pixels[tree[node]]
                for o in range(n_offsets):
                    cell = place + offsets[o]
                    other = owner[cell]
                    if other < 0 or seen[cell] == search + p:
                        continue
                    seen[cell] = search + p
                    tree[n_tree] = other
                    above[n_tree] = node
                    through[n_tree] = cell
                    stack[n_stack] = n_tree
                    n_stack += 1
                    n_tree += 1
                    k = next_free[other]
                    if k < n_offsets:
                        there = pixels[other]
                        while k < n_offsets:
                            candidate = there + offsets[k]
                            k += 1
                            if owner[candidate] == -1:
                                free = candidate
                                break
                        next_free[other] = k
                        if free >= 0:
                            at = n_tree - 1
                            break
            if free >= 0:
                matched += 1
                n_free -= 1
                while at >= 0:
                    q = tree[at]
                    owner[free] = q
                    partner[q] = free
                    free = through[at]
                    at = above[at]
            else:
                for t in range(1, n_tree):
                    owner[through[t]] = -2
            p += 1
        counts[level] = matched
    return counts


def check_pair(prediction: NDArray[np.generic], truth: NDArray[np.generic]) -> None:
    """Raise EdgeError unless both are maps [H,W] of one size with at least one pixel."""
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.ndim != 2:
            raise EdgeError(f"match: the {name} has shape {list(mask.shape)}, a map [H,W] is needed")
    if prediction.shape != truth.shape:
        raise EdgeError(
            f"match: the prediction is {list(prediction.shape)} and the truth {list(truth.shape)}; "
            "resize the prediction to the truth first"
        )
    if not truth.size:
        raise EdgeError(f"match: the maps are {list(truth.shape)}, without a pixel; leave this image out")


class Grid:
    """The padded pixel grid of one truth map: flat indices, disc offsets and the owners' map for matching."""

    def __init__(self, truth: NDArray[np.bool_], max_distance: float) -> None:
        height, width = truth.shape
        dy, dx = disc(radius_of((height, width), max_distance))
        self.width = width
        self.reach = int(dx.max())
        self.border = max(1, self.reach)  # thinning needs one pixel of margin
        self.stride = width + 2 * self.border
        self.size = (height + 2 * self.border) * self.stride
        self.offsets = dy * self.stride + dx
        self.truth = self.index(*np.nonzero(truth))

    def index(self, ys: NDArray[np.int64], xs: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.asarray((ys + self.border) * self.stride + xs + self.border, np.int32)

    def unpadded(self, cells: NDArray[np.int32]) -> NDArray[np.int64]:
        cell = cells.astype(np.int64)
        return np.asarray((cell // self.stride - self.border) * self.width + cell % self.stride - self.border)

    def owners(self) -> NDArray[np.int32]:
        owner = np.full(self.size, -2, np.int32)
        owner[self.truth] = -1
        return owner


def match_pairs(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], max_distance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One maximum matching: (flat indices of matched prediction pixels, those of their truth pixels), int64
    [k].

    Deterministic: row-major order of the prediction, nearest free partner first.  Raises EdgeError for maps
    that differ in size or are not [H,W].
    """
    prediction, truth = np.asarray(prediction, bool), np.asarray(truth, bool)
    check_pair(prediction, truth)
    grid = Grid(truth, max_distance)
    pixels = grid.index(*np.nonzero(prediction))
    partner = np.empty(pixels.size, np.int32)
    ends = np.array([pixels.size], np.int64)
    augment_levels(
        grid.owners(), grid.truth.size, pixels, ends, grid.offsets, partner, np.zeros(grid.size, np.int64), 1
    )
    matched = partner >= 0
    return grid.unpadded(pixels[matched]), grid.unpadded(partner[matched])


def match_min_cost(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], max_distance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cheapest matching in the published benchmark's cost: pairs as ``match_pairs`` returns them.

    Cost of a pair: 100 times its distance, rounded; of a pixel left alone: 10000 times the radius.  Needed
    only where several annotators are OR-ed, because there *which* pixels match counts, not only how many.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    prediction, truth = np.asarray(prediction, bool), np.asarray(truth, bool)
    check_pair(prediction, truth)
    radius = radius_of((truth.shape[0], truth.shape[1]), max_distance)
    left, right, distance = _neighbours(prediction, truth, radius)
    none = np.zeros(0, np.int64)
    if not left.size:
        return none, none
    rows, row = np.unique(left, return_inverse=True)
    columns, column = np.unique(right, return_inverse=True)
    n, m = rows.size, columns.size
    # A perfect matching of the published graph with k pairs costs sum(w) + (n1 + n2 - k) * alone, so a row
    # pays w in a pair and `alone` in its own slack column.  The slack makes every instance feasible, so
    # SciPy's own feasibility search ends at once (on the bare graph it can take exponential time:
    # scipy#26147).
    alone = math.ceil(100 * 100 * radius)
    weights = np.rint(100 * np.sqrt(distance)) + 1  # + 1: a sparse matrix drops explicit zeros
    graph = csr_array(
        (
            np.concatenate([weights, np.full(n, alone + 1.0)]),
            (np.concatenate([row, np.arange(n)]), np.concatenate([column, m + np.arange(n)])),
        ),
        shape=(n, m + n),
    )
    chosen_row, chosen_column = min_weight_full_bipartite_matching(graph)
    real = chosen_column < m
    return rows[chosen_row[real]], columns[chosen_column[real]]


def _neighbours(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Every (prediction pixel, truth pixel, squared distance) within the radius; flat row-major indices."""
    width = truth.shape[1]
    dy, dx = disc(radius)
    reach = int(dx.max())
    padded = np.pad(truth, reach)
    ys, xs = np.nonzero(prediction)
    left, right, distance = [], [], []
    for oy, ox in zip(dy.tolist(), dx.tolist(), strict=True):
        hit = padded[ys + oy + reach, xs + ox + reach]
        left.append(ys[hit] * width + xs[hit])
        right.append((ys[hit] + oy) * width + xs[hit] + ox)
        distance.append(np.full(int(hit.sum()), oy * oy + ox * ox, np.int64))
    return np.concatenate(left), np.concatenate(right), np.concatenate(distance)
