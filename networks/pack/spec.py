"""The description of a model pack: the fields of `model.toml` and what each of them may be.

This module knows networks by name.  It knows nothing of weights or of the other files of a pack.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

import networks
from common.text import one_line
from networks.base import SegmentationNetwork
from networks.images import MOST_PIXELS

__all__ = ["SCHEMA", "TASKS", "PackError", "PackSpec"]

SCHEMA = 1
TASKS = ("segmentation", "edges", "joint")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class PackError(ValueError):
    """A pack cannot be used or written.  The message is one line: the thing, the reason and the remedy."""


@dataclass(frozen=True)
class PackSpec:
    """The content of `model.toml`.

    name, version     letters, digits, '.', '_' and '-'
    network           a name that `networks.create` accepts
    classes           names of the segmentation classes, 1 to 255
    colours           (red, green, blue) of each class, 0 to 255
    size              (height, width) in pixels that the network was trained for
    mean, std         of channel values scaled to 0..1, in the order of `channel_order`
    task              one of `TASKS`
    arguments         keyword arguments of the network
    channel_order     "rgb" or "bgr"
    parent            SHA-256 of the pack that this one was adapted from, or ""
    training          how the weights were made, for a person
    licence           of the weights
    adaptation        what an adaptation round recorded
    edge_classes      names of the edge classes, if they are not `classes`
    edge_thresholds   probability from which an edge of each class is served; empty: 0.5
    """

    name: str
    version: str
    network: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "segmentation"
    arguments: dict[str, Any] = field(default_factory=dict)
    channel_order: str = "rgb"
    parent: str = ""
    training: str = ""
    licence: str = ""
    adaptation: dict[str, Any] = field(default_factory=dict)
    edge_classes: tuple[str, ...] = ()
    edge_thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Convert sequences to tuples and check every field.  Raises PackError."""
        try:
            for key in ("classes", "size", "mean", "std", "edge_classes", "edge_thresholds"):
                object.__setattr__(self, key, tuple(getattr(self, key)))
            object.__setattr__(self, "colours", tuple(tuple(int(v) for v in c) for c in self.colours))
        except (TypeError, ValueError, OverflowError) as error:
            raise PackError(f"malformed list in the description: {error}") from error
        reason = self._problem()
        if reason:
            raise PackError(reason)

    def _problem(self) -> str:
        for key in ("name", "version"):
            if not isinstance(getattr(self, key), str) or not _NAME.match(getattr(self, key)):
                return f"{key} {getattr(self, key)!r} must be letters, digits, '.', '_' or '-'"
        for key in ("task", "network", "channel_order", "parent", "training", "licence"):
            if not isinstance(getattr(self, key), str):
                return f"{key} must be a text, not {getattr(self, key)!r}"
        for key in ("arguments", "adaptation"):
            if not isinstance(getattr(self, key), dict):
                return f"{key} must be a table, not {getattr(self, key)!r}"
        if taken := {"name", "classes"} & set(self.arguments):
            return f"arguments may not hold {min(taken)!r}: it is said elsewhere"
        if self.task not in TASKS:
            return f"task {self.task!r} is unknown; known: {', '.join(TASKS)}"
        if not 1 <= len(self.classes) <= 255 or not all(map(_is_name, self.classes)):
            return "classes must be 1 to 255 names of one line"
        if len(set(self.classes)) != len(self.classes):
            return "classes names a class twice"
        if len(self.colours) != len(self.classes):
            return f"{len(self.classes)} classes but {len(self.colours)} colours; give one colour a class"
        if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in self.colours):
            return "colours must be (red, green, blue) from 0 to 255"
        if reason := self._edge_problem():
            return reason
        if len(self.size) != 2 or not all(isinstance(v, int) and v > 0 for v in self.size):
            return f"size must be (height, width) in pixels, not {self.size!r}"
        if self.size[0] * self.size[1] > MOST_PIXELS:
            return f"size {self.size[0]}x{self.size[1]} has more than {MOST_PIXELS} pixels"
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != 3 or not all(map(_is_finite, values)):
                return f"{key} must be three finite numbers, not {values!r}"
        if min(self.std) <= 0:
            return f"std must be positive, not {self.std!r}"
        if min(self.mean) < 0 or max(self.mean) > 1 or max(self.std) > 1:
            return (
                f"mean {list(self.mean)} and std {list(self.std)} are of channels scaled to 0..1, so none is "
                "above 1 or below 0; divide what is of 0..255 by 255"
            )
        if self.channel_order not in ("rgb", "bgr"):
            return f"channel_order must be 'rgb' or 'bgr', not {self.channel_order!r}"
        if self.parent and not _SHA256.match(self.parent):
            return f"parent {self.parent!r} is not a SHA-256"
        return ""

    def _edge_problem(self) -> str:
        names, limits = self.edge_classes, self.edge_thresholds
        if not all(map(_is_name, names)) or len(set(names)) != len(names):
            return "edge_classes must be distinct names of one line"
        if not all(isinstance(t, float) and 0 < t < 1 for t in limits):
            return f"edge_thresholds must be numbers between 0 and 1, not {list(limits)}"
        wanted = len(names or self.classes)
        if limits and len(limits) != wanted:
            return f"edge_thresholds has {len(limits)} entries for {wanted} edge classes; give one each"
        return ""

    def to_toml(self) -> str:
        """Return the text of `model.toml`."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        for key in ("edge_classes", "edge_thresholds"):  # most packs have no edges of their own
            if not values[key]:
                del values[key]
        # Tables must come after plain values for a person to read the file easily.
        ordered = sorted(values.items(), key=lambda item: isinstance(item[1], dict))
        return tomli_w.dumps({"schema": SCHEMA, **dict(ordered)})

    @classmethod
    def from_toml(cls, text: str) -> PackSpec:
        """Parse `model.toml`.  Raises PackError for anything but the fields of this schema."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, and int()'s for endless numbers
            raise PackError(f"model.toml is not TOML: {one_line(error)}") from error
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise PackError(f"model.toml has schema {schema!r}; this version reads schema {SCHEMA}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise PackError(f"model.toml has unknown fields: {', '.join(unknown)}")
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        lacking = sorted(required - set(values))
        if lacking:
            raise PackError(f"model.toml lacks fields: {', '.join(lacking)}")
        return cls(**values)

    def create(self) -> SegmentationNetwork:
        """Build a freshly initialised network of this description.  Raises PackError."""
        try:
            network = networks.create(self.network, classes=len(self.classes), **self.arguments)
        except ValueError as error:
            raise PackError(one_line(error)) from error
        multiple = network.size_multiple
        if any(side % multiple for side in self.size):
            size = "x".join(map(str, self.size))
            raise PackError(f"size {size} must be a multiple of {multiple} for {self.network}")
        return network


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _plain(value: Any) -> Any:
    """Convert a value to what TOML can hold: tuples to lists, numpy scalars to Python's; None is left out."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if v is not None]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value


def _is_name(value: Any) -> bool:
    """Whether labels.txt can hold the value as one line."""
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""
