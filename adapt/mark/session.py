"""What a person has marked so far: one operation after the other, each saved before it is answered.

A frame has a revision.  An operation that was made for another revision is refused, so that two browsers on
one file cannot lose each other's marks.  Knows neither HTTP nor networks.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapt.weak.marks import HUMAN, Box, Marks, Point, Scribble, WeakError, WeakLabels
from adapt.weak.readers import read

__all__ = ["Session", "Stale"]

MOST_SECONDS = 600.0  # that one operation may claim


class Stale(Exception):
    """The operation was made for another revision of the frame."""


class Session:
    """The marks file, opened by one process.

    Args:
        out: the file; read if it is there, so that work goes on.
        classes: the network's.
        source: of new frames, "human" or "human:NAME".

    Raises:
        WeakError: another process has the file, or it holds marks that are wrong or of other classes.
    """

    def __init__(self, out: Path, classes: tuple[str, ...], source: str = HUMAN) -> None:
        self.out, self.classes, self.source = out, classes, source
        self._mutex = threading.Lock()
        try:
            lock = os.open(out.with_name(f".{out.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WeakError(f"marks {out}: {error.strerror}; choose a folder that can be written") from error
        self._lock = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise WeakError(
                f"marks {out}: another adapt.mark writes it; end that one or give --out"
            ) from None
        try:
            self.labels = read(out, classes, form="weak") if out.exists() else WeakLabels(classes)
        except BaseException:
            self.close()
            raise
        self._undo: dict[str, list[Marks]] = {}
        self._revision: dict[str, int] = {}

    def close(self) -> None:
        """Let others write the file."""
        if self._lock >= 0:
            self.out.with_name(f".{self.out.name}.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def view(self, key: str, size: tuple[int, int]) -> dict[str, Any]:
        """The frame's marks as JSON, its revision, and how many clicks it and all frames have.

        Raises WeakError where the file's marks are for another size.
        """
        with self._mutex:
            return self._view(key, self._of(key, size))

    def _view(self, key: str, marks: Marks) -> dict[str, Any]:
        everything = [*self.labels.frames.values()]
        return {
            "revision": self._revision.get(key, 0),
            "marks": marks.plain(),
            "clicks": _clicks(marks),
            "undo": len(self._undo.get(key, ())),
            "total": sum(_clicks(m) for m in everything),
            "frames": sum(not m.empty() for m in everything),
            "seconds": sum(m.seconds or 0 for m in everything),
        }

    def _of(self, key: str, size: tuple[int, int]) -> Marks:
        found = self.labels.frames.get(key)
        if found is None:
            return Marks(self.classes, size, source=self.source, frame=key)
        self.labels.check_sizes({key: size})
        return found

    def apply(self, key: str, size: tuple[int, int], request: Any) -> dict[str, Any]:
        """Do one operation and save; returns the view after it.

        Args:
            request: {"revision": n, "seconds": s, "op": {"kind": …}} with kind point (x, y, label), box (x0,
                y0, x1, y1, label), scribble (line, width, label), absent (label; a second time takes it
                back), all_boxes (label, likewise), undo, or none (the time alone).

        Raises:
            Stale: another revision.
            WeakError: no such operation, or a mark that is wrong or contradicts another.
            OSError: it could not be saved; nothing has changed then.
        """
        if not isinstance(request, dict) or not isinstance(request.get("op"), dict):
            raise WeakError("the request is no operation; load the page again")
        with self._mutex:
            if request.get("revision") != self._revision.get(key, 0):
                raise Stale(f"frame {key} was marked in another window; load it again")
            before = self._of(key, size)
            history = self._undo.get(key, [])
            kind = request["op"].get("kind")
            if kind == "undo":
                after, steps = (history[-1], history[:-1]) if history else (before, history)
            else:
                after = _done(before, request["op"])
                steps = [*history, before] if after != before else history
            spent = request.get("seconds", 0)
            if (
                isinstance(spent, bool)
                or not isinstance(spent, (int, float))
                or not 0 <= spent <= MOST_SECONDS
            ):
                raise WeakError(
                    f"seconds {str(spent)[:20]} are not 0 to {MOST_SECONDS:g}; load the page again"
                )
            seconds = round((before.seconds or 0) + spent, 3)
            after = replace(after, seconds=seconds)
            kept = self.labels
            if after.empty() and key not in kept.frames:
                return self._view(key, after)  # a frame that was only looked at is no frame with marks
            self.labels = replace(kept, frames={**kept.frames, key: after})
            try:
                self.labels.write(self.out)
            except BaseException:
                self.labels = kept
                raise
            self._undo[key] = steps[-1000:]
            self._revision[key] = self._revision.get(key, 0) + 1
            return self._view(key, after)


def _clicks(marks: Marks) -> int:
    return len(marks.marks()) + len(marks.absent) + len(marks.all_boxes)


def _done(marks: Marks, op: Mapping[str, Any]) -> Marks:
    kind, label = op.get("kind"), op.get("label")
    if kind == "none":
        return marks
    if not isinstance(label, str) or len(label) > 1000:
        raise WeakError("the operation has no label; choose a class")
    if kind == "point":
        return replace(marks, points=(*marks.points, Point(op.get("x"), op.get("y"), label)))  # type: ignore[arg-type]
    if kind == "box":
        x0, y0, x1, y1 = (op.get(k) for k in ("x0", "y0", "x1", "y1"))
        return replace(marks, boxes=(*marks.boxes, Box(x0, y0, x1, y1, label)))  # type: ignore[arg-type]
    if kind == "scribble":
        line = op.get("line")
        if not isinstance(line, list) or not all(isinstance(p, list) and len(p) == 2 for p in line):
            raise WeakError("the line is no list of pairs; load the page again")
        way = tuple((p[0], p[1]) for p in line)
        return replace(marks, scribbles=(*marks.scribbles, Scribble(label, way, op.get("width", 3))))
    if kind in ("absent", "all_boxes"):
        now = getattr(marks, kind)
        changed = tuple(c for c in now if c != label) if label in now else (*now, label)
        return replace(marks, absent=changed) if kind == "absent" else replace(marks, all_boxes=changed)
    raise WeakError(f"operation {str(kind)[:40]!r} is unknown; load the page again")
