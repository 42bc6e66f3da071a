"""Semantic edges from label maps: where a category, or an instance of it, begins.

``seg2edge`` is the one rule; the functions after it apply it as SBD and Cityscapes do, on the CPU (numba) or,
``seg2edge_torch``, wherever a tensor lives.  It knows nothing of files (``edge_codec``) or alignment
(``seal``).

Source: the published MATLAB label generation of CASENet and SEAL ("regular" edges: both sides are marked).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.labels.errors import EdgeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CITYSCAPES_IGNORE",
    "category_edges",
    "cityscapes_edges",
    "half_disc",
    "instance_edges",
    "seg2edge",
    "seg2edge_torch",
]

#: Instance ids of Cityscapes whose borders are no edges: rectification border and out of region of interest.
CITYSCAPES_IGNORE = (2, 3)


def half_disc(radius: float) -> NDArray[np.int64]:
    """Offsets (dy, dx), one of each opposite pair, with dy^2 + dx^2 <= radius^2: int64 [n,2]."""
    if not isinstance(radius, int | float | np.integer | np.floating) or not 0 < radius <= 64:
        raise EdgeError(
            f"seg2edge: the radius is {radius!r}, 0 < radius <= 64 is needed; 2 is the published one"
        )
    reach = int(radius)
    return np.array(
        [
            (dy, dx)
            for dy in range(reach + 1)
            for dx in range(-reach, reach + 1)
            if dy * dy + dx * dx <= radius * radius and (dy > 0 or dx > 0)
        ],
        np.int64,
    ).reshape(-1, 2)


@numba.njit(cache=True, nogil=True)
def _mark(labels, ignored, offsets, edge):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    for o in range(offsets.shape[0]):
        dy, dx = offsets[o]
        first, last = max(0, -dx), min(width, width - dx)
        for y in range(height - dy):
            for x in range(first, last):
                if (
                    labels[y, x] != labels[y + dy, x + dx]
                    and not ignored[y, x]
                    and not ignored[y + dy, x + dx]
                ):
                    edge[y, x] = True
                    edge[y + dy, x + dx] = True


def _integers(labels: NDArray[Any], what: str) -> NDArray[np.int64]:
    labels = np.asarray(labels)
    if labels.ndim != 2 or not labels.size:
        raise EdgeError(
            f"{what}: the label map is {list(labels.shape)}, [H,W] with a pixel at least is needed"
        )
    if labels.dtype != np.bool_ and not np.issubdtype(labels.dtype, np.integer):
        raise EdgeError(
            f"{what}: the label map is {labels.dtype}, whole numbers are needed; round it on purpose first"
        )
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise EdgeError(f"{what}: the label map holds {labels.max()}, more than int64 does; renumber it")
    return labels.astype(np.int64)


def _ignored(labels: NDArray[np.int64], ignore: Sequence[int], what: str) -> NDArray[np.bool_]:
    """Where the labels are of the list."""
    values = np.atleast_1d(np.asarray(ignore))
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise EdgeError(f"{what}: ignore is {ignore!r}, a list of whole numbers is needed, such as (255,)")
    return np.asarray(np.isin(labels, [v for v in values.tolist() if abs(v) < 2**63]))


def seg2edge(labels: NDArray[Any], radius: float = 2, ignore: Sequence[int] = ()) -> NDArray[np.bool_]:
    """Pixels with a differently labelled pixel within ``radius``: int (or bool) [H,W] -> bool [H,W].

    ``ignore``: a pair counts only if neither of its labels is listed.  Outside the map there are no pixels.
    Raises EdgeError for maps that are not whole numbers [H,W] and for radii outside (0, 64].
    """
    labels = _integers(labels, "seg2edge")
    edge = np.zeros(labels.shape, np.bool_)
    _mark(labels, _ignored(labels, ignore, "seg2edge"), half_disc(radius), edge)
    return edge


def _check_classes(classes: int, what: str) -> None:
    if not isinstance(classes, int | np.integer) or classes < 1:
        raise EdgeError(f"{what}: classes is {classes!r}, a whole number of at least 1 is needed")


def category_edges(
    labels: NDArray[Any], classes: int, radius: float = 2, ignore: Sequence[int] = (255,)
) -> NDArray[np.bool_]:
    """Edges of every category of one map: int [H,W] of class indices -> bool [classes,H,W].

    A pixel of class c's edge has class c on exactly one side of it.  Unlike a class-by-class ``seg2edge`` of
    ``labels == c`` with an empty ``ignore`` (the published non-instance labels: pass ``ignore=()``),
    nothing is marked where a class meets ignored pixels: nobody knows whether it ends there.
    """
    labels = _integers(labels, "category_edges")
    _check_classes(classes, "category_edges")
    ignored, left_out = _ignored(labels, ignore, "category_edges"), np.atleast_1d(ignore).tolist()
    offsets = half_disc(radius)
    out = np.zeros((classes, *labels.shape), np.bool_)
    for c in np.unique(labels).tolist():
        if 0 <= c < classes and c not in left_out:
            _mark((labels == c).astype(np.int64), ignored, offsets, out[c])
    return out


def instance_edges(
    categories: NDArray[Any], instances: NDArray[Any], classes: int, radius: float = 2, *, first: int = 1
) -> NDArray[np.bool_]:
    """Instance-sensitive edges as SBD has them: bool [classes,H,W].

    categories: int [H,W], channel k is category ``first + k`` (SBD counts from 1); instances: int [H,W].  For
    each category: ``seg2edge`` of the instance id where the category is, 0 elsewhere.  Raises EdgeError for
    maps of different sizes, and where an object's instance id is 0 (it would vanish into the background).
    """
    categories, instances = _integers(categories, "instance_edges"), _integers(instances, "instance_edges")
    _check_classes(classes, "instance_edges")
    if categories.shape != instances.shape:
        raise EdgeError(
            f"instance_edges: categories are {list(categories.shape)}, instances {list(instances.shape)}; "
            "give two maps of one image"
        )
    out = np.zeros((classes, *categories.shape), np.bool_)
    for k in range(classes):
        here = categories == first + k
        if not here.any():
            continue
        if (instances[here] == 0).any():
            raise EdgeError(
                f"instance_edges: instance id 0 inside category {first + k} is background; number "
                "instances from 1"
            )
        out[k] = seg2edge(np.where(here, instances, 0), radius)
    return out


@numba.njit(cache=True, nogil=True)
def _mark_candidates(labels, candidates, offsets, edge):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            if not candidates[y, x]:
                continue
            for o in range(offsets.shape[0]):
                for sign in (-1, 1):
                    j, i = y + sign * offsets[o, 0], x + sign * offsets[o, 1]
                    if 0 <= j < height and 0 <= i < width and labels[j, i] != labels[y, x]:
                        edge[y, x] = True


def cityscapes_edges(
    train_ids: NDArray[Any],
    instance_ids: NDArray[Any],
    classes: int = 19,
    radius: float = 2,
    ignore: Sequence[int] = CITYSCAPES_IGNORE,
) -> NDArray[np.bool_]:
    """Instance-sensitive edges of Cityscapes: bool [classes,H,W].

    train_ids: int [H,W] (255 = not trained on); instance_ids: the int [H,W] of ``*_instanceIds.png``.  Only
    pixels on an edge of the whole instance map, borders of the ignored ids left out, can be on a class's
    edge.
    """
    train_ids, instance_ids = (
        _integers(train_ids, "cityscapes_edges"),
        _integers(instance_ids, "cityscapes_edges"),
    )
    if train_ids.shape != instance_ids.shape:
        raise EdgeError(
            f"cityscapes_edges: trainIds are {list(train_ids.shape)}, instanceIds "
            f"{list(instance_ids.shape)}; "
            "give two maps of one image"
        )
    _check_classes(classes, "cityscapes_edges")
    candidates = seg2edge(instance_ids, radius, ignore)
    out = np.zeros((classes, *train_ids.shape), np.bool_)
    offsets = half_disc(radius)
    for c in np.unique(train_ids).tolist():
        if 0 <= c < classes:
            _mark_candidates(np.where(train_ids == c, instance_ids, 0), candidates, offsets, out[c])
    return out


def seg2edge_torch(labels: Tensor, radius: float = 2, ignore: Sequence[int] = ()) -> Tensor:
    """``seg2edge`` on a tensor's own device: integer [...,H,W] -> bool [...,H,W], equal to the CPU's pixel
    for pixel."""
    import torch

    if labels.ndim < 2 or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise EdgeError(
            f"seg2edge_torch: labels are {labels.dtype} {list(labels.shape)}; integers [...,H,W] are needed"
        )
    height, width = labels.shape[-2:]
    valid = torch.ones_like(labels, dtype=torch.bool)
    limits = None if labels.dtype == torch.bool else torch.iinfo(labels.dtype)
    for value in np.atleast_1d(np.asarray(ignore)).tolist():
        if limits is None or limits.min <= value <= limits.max:  # else torch would wrap it to another label
            valid &= labels != value
    edge = torch.zeros_like(valid)
    for dy, dx in half_disc(radius).tolist():
        if dy >= height or abs(dx) >= width:
            continue
        a = (..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        b = (..., slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        differs = (labels[a] != labels[b]) & valid[a] & valid[b]
        edge[a] |= differs
        edge[b] |= differs
    return edge
