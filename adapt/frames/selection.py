"""Which of the frames that go by are kept for adaptation: five rules, in this order, each with its word.

    opted-out       the request said collect = false (or nothing, where the policy is opt-in)
    too-soon        fewer than `seconds` and fewer than `metres` since the last kept frame of this camera
    near-duplicate  looks like one of the last kept frames of this camera (perceptual hash)
    hopeless        class-balanced score under `low`: the answer is so bad that its labels would be, too
    nothing-new     class-balanced score over `high`: the network is sure of every class already

A frame that shows a *rare* class is kept whatever its score, as long as such frames are at most `quota` of
the store; they are evicted last.  The class-balanced score is the mean, over the classes an answer shows, of
their mean
confidence: the (undocumented) selection of CRST's authors.  Uncertain means between `low` and `high`.

When the store is full, `evict` says who goes: "oldest", or a random one so that what is left is a sample of
everything that passed the rules ("reservoir", Vitter 1985); age has its own bound in any case.

Knows neither files nor databases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["RULES", "Candidate", "Rules", "Tally", "Verdict", "confidence_summary", "metres", "select"]

RULES = ("opted-out", "too-soon", "near-duplicate", "hopeless", "nothing-new")
EARTH = 6_371_008.8  # metres, mean radius
Place = tuple[float, float]  # latitude, longitude in degrees


@dataclass(frozen=True)
class Rules:
    """The numbers of the rules; the defaults only leave out near-duplicates.

    seconds, metres: a frame is too soon if it is nearer than *both* to the last one kept (metres count where
    both frames have a place; 0 = not asked).  near: bits of 64 of the perceptual hash that may differ in a
    duplicate. low, high: of the class-balanced score, 0..1.  rare: share of kept pixels under which a class
    is rare;
    shown: share of a frame's pixels from which it shows a class.  quota: share of the store for rare classes.
    opt_in: keep only what is marked collect = true.  evict: "oldest" or "reservoir".  age: seconds, None =
    any.
    """

    seconds: float = 0.0
    metres: float = 0.0
    near: int = 4
    low: float = 0.0
    high: float = 1.0
    rare: float = 0.01
    shown: float = 0.005
    quota: float = 0.25
    opt_in: bool = False
    evict: str = "oldest"
    age: float | None = None

    def __post_init__(self) -> None:
        if self.evict not in ("oldest", "reservoir"):
            raise ValueError(f"evict {self.evict!r}: choose oldest or reservoir")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"scores {self.low:g} to {self.high:g}: 0 <= low <= high <= 1")
        if not (self.near >= -1 and self.seconds >= 0 and self.metres >= 0 and 0 <= self.quota <= 1):
            raise ValueError(f"{self}: near from -1 on, seconds and metres from 0 on, quota 0 to 1")
        if self.age is not None and not self.age > 0:
            raise ValueError(f"age {self.age}: give seconds above 0")


@dataclass(frozen=True)
class Candidate:
    """What is known of a frame before it is kept.  summary: of `confidence_summary`, or {}.  collect: what
    the request said.  bits: bool [64], its perceptual hash.
    """

    time: float
    bits: np.ndarray
    summary: Mapping[str, Any] = field(default_factory=dict)
    place: Place | None = None
    collect: bool | None = None


@dataclass
class Tally:
    """What the store holds: frames, those kept for rare classes, and the sum of their class shares."""

    frames: int = 0
    rare: int = 0
    share: np.ndarray | None = None

    def add(self, summary: Mapping[str, Any], rare: bool, sign: int = 1) -> None:
        self.frames += sign
        self.rare += sign * rare
        told = np.asarray(summary.get("share", ()), np.float64)
        if told.size:
            if self.share is None or self.share.shape != told.shape:
                self.share = np.zeros_like(told)
            self.share = np.maximum(self.share + sign * told, 0.0)

    def rare_classes(self, rules: Rules) -> set[int]:
        """Classes that hold less than `rules.rare` of the kept pixels; none while little is kept."""
        if self.share is None or self.frames < 20:
            return set()
        total = float(self.share.sum())
        return set(np.flatnonzero(self.share < rules.rare * total).tolist()) if total > 0 else set()


@dataclass(frozen=True)
class Verdict:
    """keep, the rule that decided ("" = none spoke against it), in words, and whether it counts as rare."""

    keep: bool
    rule: str
    why: str
    rare: bool = False


def select(
    frame: Candidate,
    recent: Sequence[np.ndarray],
    last: tuple[float, Place | None] | None,
    tally: Tally,
    rules: Rules,
) -> Verdict:
    """Keep it?

    Args:
        recent: hashes bool [64] of the last kept frames of its camera, oldest first.
        last: (time, place) of the last of them.
    """
    if frame.collect is False or (rules.opt_in and not frame.collect):
        return Verdict(False, "opted-out", "the request did not allow it")
    if last is not None and (rules.seconds or rules.metres):
        waited = frame.time - last[0]
        soon = 0 <= waited < rules.seconds  # a clock that jumped back does not stop collection
        far = rules.metres > 0 and frame.place is not None and last[1] is not None
        if far:
            assert frame.place is not None
            assert last[1] is not None
            travelled = metres(frame.place, last[1])
            if travelled < rules.metres and (soon or not rules.seconds):
                return Verdict(False, "too-soon", f"{travelled:.1f} m and {waited:.1f} s since the last one")
        elif soon:
            return Verdict(False, "too-soon", f"{waited:.1f} s since the last one")
    for other in reversed(recent):
        distance = int(np.count_nonzero(frame.bits != other))
        if distance <= rules.near:
            return Verdict(
                False, "near-duplicate", f"near-duplicate (hash distance {distance} <= {rules.near})"
            )
    share = frame.summary.get("share", ())
    shown = {c for c in tally.rare_classes(rules) if c < len(share) and share[c] >= rules.shown}
    if shown and tally.rare + 1 <= rules.quota * (tally.frames + 1):
        return Verdict(True, "", f"shows rare class {', '.join(map(str, sorted(shown)))}", rare=True)
    score = frame.summary.get("score")
    if score is not None and score < rules.low:
        return Verdict(False, "hopeless", f"class-balanced score {score:.2f} under {rules.low:g}")
    if score is not None and score > rules.high:
        return Verdict(False, "nothing-new", f"class-balanced score {score:.2f} over {rules.high:g}")
    return Verdict(True, "", "new view")


def metres(a: Place, b: Place) -> float:
    """Great-circle distance of two places (haversine)."""
    (la, lo), (lb, mo) = ((math.radians(x) for x in p) for p in (a, b))
    h = math.sin((lb - la) / 2) ** 2 + math.cos(la) * math.cos(lb) * math.sin((mo - lo) / 2) ** 2
    return 2 * EARTH * math.asin(min(1.0, math.sqrt(h)))


def confidence_summary(labels: np.ndarray, confidence: np.ndarray, classes: int) -> dict[str, Any]:
    """Per-class share and mean confidence of one answer, and their class-balanced score.

    labels, confidence: uint8 [H,W] as served.  Returns share [C], confidence [C] (0..1, 0 where the class
    does not appear) and score = mean over the classes that appear of their mean confidence.
    """
    flat = labels.reshape(-1)
    count = np.bincount(flat, minlength=classes)[:classes]
    total = np.bincount(flat, weights=confidence.reshape(-1).astype(np.float64), minlength=classes)[:classes]
    mean = np.where(count > 0, total / np.maximum(count, 1) / 255.0, 0.0)
    seen = count > 0
    return {
        "share": [round(float(v), 5) for v in count / max(int(count.sum()), 1)],
        "confidence": [round(float(v), 4) for v in mean],
        "score": round(float(mean[seen].mean()), 4) if seen.any() else 0.0,
    }
