"""The gate: may this candidate leave the adapter?  Decided without a single target label.

Known without labels: mIoU on the source hold-out (as it is, and in the colours of the target), the class
shares of the target hold-out, flip and temporal consistency, agreement with the mean of the weights along the
training, confidence, and the distance of the weights from the parent's.  A labelled hold-out is used if there
is one.  Every limit stands in `adapt.gate.limits.Limits` with its reason; every check gives its reason in
words, which the report shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapt.gate.checks import Check, at_least, at_most, drop_check, rise_check
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Limits
from adapt.gate.measures import Measures, pixel_agreement, share_distance
from networks.pack import PackSpec

__all__ = ["cumulative", "decide"]


def decide(
    candidate: Measures,
    reference: Measures,
    parent: Measures,
    weight_distance: float,
    spec: PackSpec,
    limits: Limits,
    *,
    source_share: np.ndarray | None = None,
    layout: Layout | None = None,
) -> list[Check]:
    """All checks of a candidate.

    Args:
        candidate, parent: measured on the same hold-outs.
        reference: the stage before any weight moved (AdaBN's, or the parent if AdaBN was refused).
        weight_distance: to the parent (`adapt.gate.measures.weight_distance`).
        source_share: float64 [C], class shares of source labels; a class that the source hardly has need not
            be there.
        layout: of the source, if `layouts` were measured with it.
    """
    finite = all(np.isfinite([candidate.confidence, candidate.flip, candidate.information, weight_distance]))
    reason = "every measure is a number" if finite else "the answers hold NaN"
    checks = [Check("finite", float(finite), 1.0, bool(finite), reason)]
    if np.isfinite(parent.source):
        drop = ("source-holdout", parent.source, candidate.source, limits.source_drop)
        checks.append(drop_check(*drop, "source hold-out mIoU", percent=True))
    checks += _share_checks(candidate, reference, spec.classes, limits, source_share)
    checks += _consistency_checks(candidate, reference, parent, weight_distance, limits)
    if np.isfinite(candidate.teacher):
        reason = f"{100 * candidate.teacher:.0f}% of pixels answered as by the mean of the training's weights"
        checks.append(at_least("teacher", candidate.teacher, limits.teacher, reason))
    translated = "mIoU on source hold-out frames in the target's colours"
    for name, key, base, limit, reason in (
        ("temporal", "temporal", reference, limits.temporal_drop, "agreement with the next frame"),
        ("source-translated", "translated", reference, limits.translated_drop, translated),
        (
            "parent-translated",
            "translated",
            parent,
            limits.translated_drop,
            "the same against the parent, batch statistics included:",
        ),
        ("labelled-holdout", "labelled", reference, limits.labelled_drop, "mIoU on the labelled hold-out"),
    ):
        before = getattr(base, key)
        if np.isfinite(before):
            checks.append(drop_check(name, before, getattr(candidate, key), limit, reason))
    if layout is not None and candidate.layouts is not None and parent.layouts is not None:
        odd = parent.layouts < layout.mean - limits.foreign_parent * layout.spread
        odd &= candidate.layouts < layout.mean - limits.foreign_candidate * layout.spread
        foreign = float(odd.mean())
        reason = f"{100 * foreign:.0f}% of the hold-out frames are laid out like no street of the source"
        checks.append(at_most("layout", foreign, limits.foreign, reason))
    if np.isfinite(parent.calibration):
        rise = ("calibration", parent.calibration, candidate.calibration, limits.calibration_rise)
        checks.append(rise_check(*rise, "calibration error on source frames"))
    return checks


def _share_checks(
    candidate: Measures,
    reference: Measures,
    classes: Sequence[str],
    limits: Limits,
    source_share: np.ndarray | None,
) -> list[Check]:
    """Does the candidate still divide the frames among the classes?"""
    gone, worst = [], 1.0
    for c, name in enumerate(classes):
        shown = reference.share[c] >= limits.shown
        if source_share is not None:
            shown = shown and source_share[c] >= limits.shown
        if shown:
            ratio = candidate.share[c] / reference.share[c]
            worst = min(worst, ratio)
            if ratio < limits.kept:
                gone.append(f"{name} {100 * reference.share[c]:.1f}% -> {100 * candidate.share[c]:.2f}%")
    reason = "vanished: " + ", ".join(gone) if gone else "every class that was shown still is"
    checks = [Check("class-vanished", round(float(worst), 5), limits.kept, not gone, reason)]
    if source_share is not None:
        near, far = (share_distance(m.share, source_share) for m in (reference, candidate))
        reason = "distance of the class shares to the source's"
        checks.append(rise_check("source-shares", near, far, limits.shares_rise, reason))
    kept = candidate.variety / max(reference.variety, 1e-9)
    reason = f"classes in effective use {reference.variety:.1f} -> {candidate.variety:.1f}"
    checks.append(at_least("variety", kept, limits.variety, reason))
    top = int(candidate.share.argmax())
    bound = max(limits.largest, float(reference.share.max()) + 0.1)
    reason = f"the largest class, {classes[top]}, covers {100 * candidate.share[top]:.0f}%"
    return [*checks, at_most("one-class", candidate.share[top], bound, reason)]


def _consistency_checks(
    candidate: Measures, reference: Measures, parent: Measures, weight_distance: float, limits: Limits
) -> list[Check]:
    """Does the candidate contradict itself or what it was, and how sure has it become?"""
    agreement = pixel_agreement(candidate, reference)
    return [
        drop_check(
            "flip-consistency",
            reference.flip,
            candidate.flip,
            limits.flip_drop,
            "agreement with the mirrored answer",
        ),
        drop_check(
            "flip-parent",
            parent.flip,
            candidate.flip,
            limits.parent_flip_drop,
            "the same against the parent",
        ),
        at_least(
            "agreement",
            agreement,
            limits.agreement,
            f"{100 * agreement:.0f}% of hold-out pixels answered as before training",
        ),
        at_most(
            "distance",
            weight_distance,
            limits.distance,
            f"weights moved by {100 * weight_distance:.1f}% of their norm",
        ),
        rise_check(
            "confidence",
            reference.confidence,
            candidate.confidence,
            limits.confidence_jump,
            "mean confidence",
        ),
    ]


def cumulative(
    candidate: Measures, released_source: float, weight_distance: float, limits: Limits
) -> list[Check]:
    """What all rounds since the released pack add up to; for a round whose parent is not the released pack.

    Args:
        released_source: mIoU of the released pack on the same source hold-out; NaN if there is none.
        weight_distance: from the released pack's weights.
    """
    reason = f"weights are {100 * weight_distance:.1f}% of their norm from the released pack's"
    checks = [at_most("total-distance", weight_distance, limits.total_distance, reason)]
    if np.isfinite(released_source):
        drop = released_source - candidate.source
        reason = f"source mIoU {100 * released_source:.1f} as released -> {100 * candidate.source:.1f}"
        checks.append(at_most("total-source-holdout", drop, limits.total_source_drop, reason))
    return checks
