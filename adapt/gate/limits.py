"""Every threshold of the adapter's gates and of the checks of frames, each with its reason.

The table of a reason with "measured" is in docs/results/gate.md.  Knows neither networks nor frames.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EdgeLimits", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Every threshold, with its reason.  Shares, mIoU and agreements are 0..1."""

    # ------------------------------------------------------------------------- the candidate (adapt.gate)
    # mIoU the source hold-out may lose, judged with the source's own batch statistics: that is forgetting in
    # the weights.  Repeated measurements of one recipe differ by about 0.01.
    source_drop: float = 0.03
    # A class counts as shown when it covers this share of the target hold-out: under it, a handful of
    # pixels of one frame decide.
    shown: float = 0.003
    # Of its share a shown class must keep this much.  Good rounds move shares by 2, collapses by 100.
    kept: float = 0.15
    # Nats by which training may take the class shares away from the source's (KL).  A road may have other
    # shares; training need not drive them further off.  Measured over 141 trained stages, streets and CamVid:
    # good ones rise by up to 0.08 (one by 0.15, whose batch statistics had been refused), those that
    # strengthen an error of the network, an evening sky called building, by 0.135 and more.
    shares_rise: float = 0.12
    # exp(entropy of the class shares), the number of classes in effective use, must keep this part.
    variety: float = 0.6
    # No class may cover more of the hold-out than this, unless it already did before.
    largest: float = 0.85
    # Points by which agreement with its own mirrored answer may fall.
    flip_drop: float = 0.04
    # The same against the parent, batch statistics included.  Honest changes cost up to 0.10 (fog, which
    # gains 28 points of mIoU by it), statistics of a wall of shelves 0.14 and more.
    parent_flip_drop: float = 0.12
    # Share of hold-out pixels that must still be answered as at the reference stage.
    agreement: float = 0.6
    # ‖w − w₀‖/‖w₀‖ over all weights that are trained.
    distance: float = 0.5
    # Share of hold-out pixels on which the candidate and the mean of the weights along its training (the
    # mean teacher) must agree: a training that has settled agrees with its own mean.
    teacher: float = 0.75
    # Points by which the answers may become less steady on what stays the same from one frame to the next.
    temporal_drop: float = 0.05
    # A frame's successor is compared where both frames, blurred, differ by less than this many levels …
    same_colour: float = 6.0
    # … and only if that is at least this share of the picture: less is no sample.
    same_share: float = 0.02
    # Points by which the expected calibration error on the source hold-out may rise.
    calibration_rise: float = 0.08
    # Points by which mean confidence on the target may rise: minimising one's own entropy looks like this.
    confidence_jump: float = 0.2
    # mIoU that may be lost on source hold-out frames in the colours of the target (labels are known there).
    # Measured on the development half: what is not bad loses up to 0.036, spoilt labels cost 0.047 and more.
    translated_drop: float = 0.04
    # A hold-out frame is foreign when its answer lies this many deviations of unseen source frames below
    # their mean layout score with the parent's weights, and still so many with the candidate's.  Measured:
    # a wall of shelves lies 4.6 below with the parent and 3.7 with half-adapted statistics; CamVid's dusk,
    # where the own bonnet is in view, up to 5.4 with the parent, and one frame of nine more than 3 with the
    # candidate …
    foreign_parent: float = 4.0
    foreign_candidate: float = 3.0
    # … and this share of them may be: one of four is chance (the first soak had three such rounds refused).
    foreign: float = 0.25
    # mIoU (or MF) that may be lost on a labelled target hold-out, if one is given: repeated measurements
    # of one recipe differ by about this.
    labelled_drop: float = 0.005
    # Over all rounds since the released pack: a chain of harmless steps must not add up to a bad one.
    total_source_drop: float = 0.05
    total_distance: float = 0.6
    # Agreement with the mirrored answer that other batch statistics must gain (`gate.preference`).
    statistics_gain: float = 0.0

    # ------------------------------------------------------------- the frames (adapt.gate.input_quality)
    # Frames that show nothing: a covered lens has a luma deviation of 0 to 2 levels, CamVid's dusk over 30.
    contrast: float = 4.0
    # A pixel from this level on is white; a frame with more than this share of them is dazzled.  Measured: up
    # to 0.46 in single frames against the sky (CamVid), 0.66 and more when exposure runs away …
    clipped: float = 245.0
    glare: float = 0.5
    # Mean difference of neighbouring frames in levels: sensor noise alone gives 1 to 2, a moving car 5 to 30.
    motion: float = 0.5
    # Share of frames that may fail either.
    bad_frames: float = 0.25
    # Share of frames that may be half decoded or torn: one broken cable end, not a broken camera.
    damaged: float = 0.1
    # A picture is damaged where this share of its rows is.
    damaged_rows: float = 0.1
    # Rows of one colour in the midst of a picture, and borders of rows that jump: on honest frames none of
    # the first, and two of the second in at most 2 % of a drive's frames; lost parts make both in every one.
    plain_rows: float = 0.05
    jumps: int = 2
    # A frame is another view when this share of its pixels changed: what stands is no evidence of a sticker.
    changed: float = 0.15
    # Fewer views than this are not compared with each other.
    views: int = 8
    # A pixel is steady when this share of the views has it within 8 levels of one value: a sticker in every
    # second frame is still one.
    steady: float = 0.45
    # Levels across two pixels that count as an edge between steady pixels.
    static_edge: float = 20.0
    # Share of the upper three quarters such edges may take.
    static: float = 0.005
    # Levels by which an edge must always go the same way to be drawn over the picture, by how many
    # deviations, and the share of the upper three quarters that may: measured, honest drives 0.002, a
    # watermark 0.03, drops and a display 0.02 in most drives.
    # Fewer views are one street, whose edges stay: of 38 windows of 12 frames 14 were declined, of 36 of 24
    # four.
    overlay_views: int = 36
    overlay_step: float = 10.0
    overlay_ratio: float = 2.0
    overlay: float = 0.006
    # Mean levels within which two views are one, and the share of views that may come again: on honest
    # drives an eighth do (at a light), in a loop all.
    same_view: float = 0.6
    repeated: float = 0.4
    # Median of what lives in the middle of the picture from which black that never changes is no night.
    daylight: float = 40.0
    # Levels within which a pixel must stay to count as dead, and the share of the middle that may be.
    dead_levels: float = 2.0
    dead: float = 0.2
    # Robust deviations by which one regular pattern may stand out of the mean spectrum.
    grid: float = 7.0
    # Two groups of pictures: variance explained (a Gaussian has 0.64, an even spread 0.75; measured, honest
    # drives that also switch as often as below reach 0.75) …
    apart: float = 0.82
    # … share of the smaller one, and switches in time against chance: dusk, a tunnel or another street comes
    # once and stays (0.1), cameras alternate (1 to 2); measured, one honest CamVid window came to 0.54.
    minority: float = 0.15
    mixing: float = 0.7
    # Fewer pictures than this fall into two groups by chance: of 45 windows of 12 frames three did, of 16
    # CamVid windows of 24 one, of 46 windows of 48 none.
    crowd: int = 32
    # `input_quality.order` over which these are single pictures and no drive, of which no camera can be told:
    # measured, sets of unrelated pictures 0.97 and more, drives with a second between frames, of one camera
    # or of two by turns, at most 0.88.
    order: float = 0.93
    # Part of the brighter group's brightness by which a strobe's groups differ.
    strobe: float = 0.3


@dataclass(frozen=True)
class EdgeLimits:
    """The thresholds of the gate of edges (`adapt.gate.edges`).  MF (ODS, thin) is 0..1."""

    # MF that may be lost on a labelled target hold-out, if one is given: as mIoU's.
    labelled_drop: float = 0.005
    # MF that may be lost on the source hold-out.  Measured on toy frames (tests/adapt/edges_toys.py): eight
    # honest rounds, in the dark and by day, gained up to 0.021 or lost up to 0.023 at either distance; of
    # what was made bad on purpose, a shift by 3 pixels lost the least, 0.074 within two pixels.
    source_drop: float = 0.03
    # MF against the target's confident pseudo-edges, which the training is to raise: it may not fall.  The
    # same honest rounds gained 0.001 and more, the same bad ones lost 0.071 and more within two pixels.
    agreement_drop: float = 0.0
    # Each MF is also taken within so many pixels: .0075 of the diagonal are 6 pixels at 640x480, and edges
    # that all moved by 3 would pass for the same.  Two pixels are what an annotated edge is unsure by.
    tight: float = 2.0
    # A class whose mean edge probability was this is asked for: under it, a few pixels of one frame decide …
    shown: float = 1e-4
    # … and must keep this part of it.  Probabilities are small and uncalibrated, so nothing is counted over a
    # threshold (that refused a round that had gained: docs/results/edges.md).
    kept: float = 0.25
    # No class's mean edge probability may be over this, unless it nearly was before: edges of radius 2 take a
    # tenth of a picture, all classes together.
    largest: float = 0.5
