"""A round's marks: which frames they teach, which they judge, and what of them goes into its record.

A frame in the hold-out is judged by its marks and not taught by them.  Marks are part of a round's identity,
so that a round whose marks changed is another round; without marks the identity is what it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapt.evaluate.clicks import Clicks, clicked_right
from adapt.labels.weak import allowed_of, anchor_pixels, constrain
from adapt.weak.marks import Marks, WeakLabels

__all__ = ["WIDE", "RoundMarks"]

WIDE = 480  # pixels of width for which radii are given


@dataclass(frozen=True)
class RoundMarks:
    """The marks of a round's frames, at the network's size.

    Attributes:
        classes: the pack's.
        size: (height, width) the round works in.
        teach: one entry per target frame that is learnt from, None without marks.
        judge: one entry per hold-out frame, likewise.
        digest: SHA-256 of all marks; "" without any.
        counts: as `WeakLabels.counts`.
        radius: pixels of a point's disc at `WIDE` pixels of width.
        box_share: part of a box that gets its class.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    teach: tuple[Marks | None, ...]
    judge: tuple[Marks | None, ...]
    digest: str
    counts: dict[str, Any]
    radius: float = 3
    box_share: float = 0.5

    @classmethod
    def of(
        cls,
        marks: Sequence[Marks | None],
        classes: Sequence[str],
        size: tuple[int, int],
        holdout: Sequence[int],
        *,
        radius: float = 3,
        box_share: float = 0.5,
        trust: float = 0.5,
    ) -> RoundMarks:
        """From the marks of all frames, in the frames' order; `holdout`: indices of those that judge.

        Raises:
            ValueError: marks of other classes.
        """
        for mark in marks:
            allowed_of(mark, classes)
        height, width = size
        kept = [None if m is None or m.empty() else m.trusted(trust) for m in marks]
        labels = WeakLabels(tuple(classes), {str(i): m for i, m in enumerate(kept) if m is not None})
        here = [None if m is None else m.scaled((width, height)) for m in kept]
        aside = set(holdout)
        return cls(
            tuple(classes),
            size,
            tuple(m for i, m in enumerate(here) if i not in aside),
            tuple(here[i] for i in holdout),
            labels.digest() if labels.frames else "",
            labels.counts(),
            radius,
            box_share,
        )

    def __bool__(self) -> bool:
        return bool(self.digest)

    @property
    def reach(self) -> float:
        """Radius in pixels of the round's size."""
        return self.radius * self.size[1] / WIDE

    def allowed(self, i: int, tags: list[int] | None) -> list[int] | None:
        """The classes that both tags and marks leave to teaching frame i; None = all."""
        mine = allowed_of(self.teach[i], self.classes)
        if mine is None or tags is None:
            return tags if mine is None else mine
        return [c for c in tags if c in mine]

    def counted(self, i: int, valid: np.ndarray | None) -> np.ndarray | None:
        """bool [H,W]: the pixels of teaching frame i that λ_c counts; None = all.  Anchored ones are not."""
        mark = self.teach[i]
        if mark is None or not (mark.points or mark.scribbles):
            return valid
        free = ~anchor_pixels(mark, self.size, radius=self.reach)
        return free if valid is None else free & valid

    def constrained(
        self, i: int, labels: np.ndarray, p: Any, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(labels uint8 [H,W], anchored bool [H,W]) of teaching frame i after its marks.

        labels: uint8 [H,W].  p: softmax [C,H,W].  valid: False = no label there, whatever is marked.
        """
        out, anchored = constrain(labels, p, self.teach[i], radius=self.reach, box_share=self.box_share)
        if valid is not None:
            out[~valid] = 255
            anchored &= valid
        return out, anchored

    def clicked(self, answers: Sequence[np.ndarray]) -> Clicks:
        """How the clicked pixels of the hold-out are answered, uint8 [H,W] per hold-out frame."""
        return clicked_right(answers, self.judge)

    def identity(self) -> list[Any]:
        """What a round's identity adds: nothing without marks."""
        return [self.digest, self.radius, self.box_share] if self else []

    def record(self) -> dict[str, Any]:
        """For report and manifest: counts, hash and frames that teach and judge; no place and no picture."""
        if not self:
            return {}
        marked = [sum(m is not None for m in part) for part in (self.teach, self.judge)]
        return {**self.counts, "sha256": self.digest, "teach": marked[0], "judge": marked[1]}
