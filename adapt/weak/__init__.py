"""Weak labels: tags, points, scribbles, boxes and coarse polygons of frames, in one file."""

from __future__ import annotations

from adapt.weak.marks import Box, Marks, Point, Polygon, Scribble, WeakError, WeakLabels
from adapt.weak.readers import FORMS, read
from adapt.weak.simulate import KINDS, simulate

__all__ = [
    "FORMS",
    "KINDS",
    "Box",
    "Marks",
    "Point",
    "Polygon",
    "Scribble",
    "WeakError",
    "WeakLabels",
    "read",
    "simulate",
]
