"""Other sources of the same facts: a map of regions, another detector's boxes, LiDAR points with a class.

Each makes `Marks` with its own source and trust; `Marks.trusted` decides what of it is sure enough.  A map is
believed where it says that a class is absent, because a map does not know what drives by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapt.weak.marks import MOST_CORNERS, Box, Marks, Point, WeakError, WeakLabels
from adapt.weak.readers.bounded import number, read_document
from adapt.weak.readers.collect import Names

__all__ = ["Geofence", "Region", "from_boxes", "from_lidar"]

Place = tuple[float, float]  # latitude, longitude in degrees


@dataclass(frozen=True)
class Region:
    """A polygon of (latitude, longitude) in degrees, and the classes that are, and are not, in it."""

    name: str
    polygon: tuple[Place, ...]
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def holds(self, place: Place) -> bool:
        """Whether a place lies inside (even-odd rule, straight lines between corners)."""
        lat, lon = place
        inside = False
        for (a_lat, a_lon), (b_lat, b_lon) in zip(
            self.polygon, (*self.polygon[1:], self.polygon[0]), strict=True
        ):
            if (a_lat > lat) != (b_lat > lat):
                inside ^= lon < a_lon + (lat - a_lat) * (b_lon - a_lon) / (b_lat - a_lat)
        return inside


@dataclass(frozen=True)
class Geofence:
    """Regions of a map.

    {"schema": 1, "regions": [{"name", "polygon": [[lat, lon], …], "present", "absent"}]}

    A region does not cross the 180th meridian: split it there.
    """

    classes: tuple[str, ...]
    regions: tuple[Region, ...]

    @classmethod
    def read(
        cls, path: str | Path, classes: Sequence[str], *, rename: Mapping[str, str] | None = None
    ) -> Geofence:
        """Raises WeakError that names the region, the reason and the remedy."""
        found = read_document(Path(path))
        if (
            not isinstance(found, dict)
            or found.get("schema") != 1
            or not isinstance(found.get("regions"), list)
        ):
            raise WeakError(f'geofence {path}: it is no map; give {{"schema": 1, "regions": [...]}}')
        names = Names(classes, rename)
        regions = []
        for i, entry in enumerate(found["regions"]):
            if not isinstance(entry, dict) or set(entry) - {"name", "polygon", "present", "absent"}:
                raise WeakError(
                    f"geofence {path}, region {i}: it is no object of name, polygon, present, absent; "
                    "correct it"
                )
            regions.append(_region(entry, f"geofence {path}, region {entry.get('name', i)}", names))
        return cls(tuple(classes), tuple(regions))

    def marks(self, place: Place | None, size: tuple[int, int], *, frame: str = "") -> Marks | None:
        """The tags of a frame of `size` (width, height) taken at `place`; None where no region knows it.

        Raises:
            WeakError: two regions that overlap there contradict each other.
        """
        if place is None:
            return None
        here = [r for r in self.regions if r.holds(place)]
        present = tuple(dict.fromkeys(c for r in here for c in r.present))
        absent = tuple(dict.fromkeys(c for r in here for c in r.absent))
        both = [c for c in present if c in absent]
        if both:
            yes = next(r.name for r in here if both[0] in r.present)
            no = next(r.name for r in here if both[0] in r.absent)
            raise WeakError(
                f"frame {frame}: class {both[0]!r} is present by region {yes} and absent by region {no}; "
                "correct one of them"
            )
        if not (present or absent):
            return None
        return Marks(self.classes, size, present, absent, source="map", frame=frame)

    def label(self, frames: Mapping[str, tuple[Place | None, tuple[int, int]]]) -> WeakLabels:
        """The tags of many frames: key → (place, (width, height))."""
        made = {k: self.marks(place, size, frame=k) for k, (place, size) in frames.items()}
        return WeakLabels(self.classes, {k: m for k, m in made.items() if m is not None})


def _region(entry: dict[str, Any], who: str, names: Names) -> Region:
    corners = entry.get("polygon")
    if not isinstance(corners, list) or not 3 <= len(corners) <= MOST_CORNERS:
        raise WeakError(f"{who}: its polygon has not 3 to {MOST_CORNERS} corners; give [[lat, lon], ...]")
    places = []
    for corner in corners:
        if not isinstance(corner, list) or len(corner) != 2:
            raise WeakError(f"{who}: {str(corner)[:40]} is no pair lat, lon; give degrees")
        lat, lon = (number(v, who) for v in corner)
        if not (abs(lat) <= 90 and abs(lon) <= 180):
            raise WeakError(f"{who}: ({lat:g}, {lon:g}) is no place on earth; give latitude, then longitude")
        places.append((lat, lon))
    longitudes = [lon for _, lon in places]
    if max(longitudes) - min(longitudes) > 180:
        raise WeakError(f"{who}: it crosses the 180th meridian; split it there")
    tags = []
    for word in ("present", "absent"):
        listed = entry.get(word, [])
        if not isinstance(listed, list):
            raise WeakError(f"{who}: {word} is no list of classes; write a list")
        tags.append(tuple(dict.fromkeys(names(c, f"{who}, {word}") for c in listed)))
    both = [c for c in tags[0] if c in tags[1]]
    if both:
        raise WeakError(f"{who}: class {both[0]!r} is both present and absent; delete one of them")
    if len(tags[1]) == len(names.classes):
        raise WeakError(f"{who}: every class is absent; delete an absent class")
    name = entry.get("name", "")
    return Region(str(name)[:100], tuple(places), *tags)


def from_boxes(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    classes: Sequence[str],
    size: tuple[int, int],
    *,
    detector: str,
    frame: str = "",
) -> Marks:
    """Another detector's answer as marks.

    Args:
        boxes: float [N,4], half-open x0, y0, x1, y1 in pixels; they are clipped to the frame, and what is
            then empty is left out.
        scores: float [N], 0..1.
        labels: class of each box; a class that the network does not have is left out.
        size: (width, height) of the frame.
        detector: its name, for the source.

    Raises:
        WeakError: lengths that differ, NaN, or a score outside 0..1.
    """
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
    if not len(boxes) == len(scores) == len(labels):
        raise WeakError(
            f"frame {frame}: {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels; give one per box"
        )
    if not np.isfinite(boxes).all():
        raise WeakError(f"frame {frame}: a box of {detector} is no number; leave it out")
    kept = []
    for (x0, y0, x1, y1), score, label in zip(boxes.tolist(), scores.tolist(), labels, strict=True):
        at = (max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1]))
        if label in classes and at[2] > at[0] and at[3] > at[1]:
            kept.append(Box(*at, label, score=score))
    return Marks(tuple(classes), size, boxes=tuple(kept), source=f"detector:{detector}", frame=frame)


def from_lidar(
    points: np.ndarray,
    labels: Sequence[str],
    camera: np.ndarray,
    classes: Sequence[str],
    size: tuple[int, int],
    *,
    score: float = 1.0,
    most: int = 5000,
    frame: str = "",
) -> Marks:
    """LiDAR points with a class, projected into the frame.

    Args:
        points: float [N,3] in metres.
        labels: of each point: a class, "a|b" or "!c"; a point whose label names no class of the network is
            left out.
        camera: float [3,4], the projection from metres to pixels (intrinsics times pose).
        size: (width, height) of the frame.
        score: trust 0..1 of all points.
        most: points per frame at most; the nearest are kept.

    Returns:
        Marks with source "lidar".  Of several points on one pixel the nearest is kept, since it hides others.

    Raises:
        WeakError: wrong shapes or NaN.
    """
    points, camera = np.asarray(points, np.float64), np.asarray(camera, np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or camera.shape != (3, 4) or len(labels) != len(points):
        raise WeakError(
            f"frame {frame}: points {points.shape}, camera {camera.shape}, {len(labels)} labels; give [N,3], "
            "[3,4] and N"
        )
    if not (np.isfinite(points).all() and np.isfinite(camera).all()):
        raise WeakError(f"frame {frame}: a LiDAR point or the camera is no number; leave such points out")
    seen = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ camera.T
    found: dict[tuple[int, int], Point] = {}
    for i in np.argsort(seen[:, 2], kind="stable").tolist():
        depth = seen[i, 2]
        if depth <= 0 or len(found) >= most:
            continue
        u, v = seen[i, 0] / depth, seen[i, 1] / depth
        if not (0 <= u < size[0] and 0 <= v < size[1]):
            continue
        at = (int(u), int(v))
        names = labels[i].removeprefix("!").split("|")
        if at not in found and all(n in classes for n in names):
            found[at] = Point(*at, labels[i])
    return Marks(tuple(classes), size, points=tuple(found.values()), source="lidar", score=score, frame=frame)
