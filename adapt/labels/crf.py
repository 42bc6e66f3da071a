"""CASENet-C's labels: a class map snapped to the frame's own colours by a dense CRF.

Krähenbühl & Koltun, *Efficient Inference in Fully Connected CRFs*, NIPS 2011, by their own code as
``pydensecrf`` packs it (the same module comes with ``pydensecrf2``, which installs untouched; extra "crf").

CASENet-C's constants are not published.  These were chosen on CamVid frames by day: exact labels must stay
(category-edge F at .0035 of the diagonal at least .97) and coarse ones must come nearer to the exact ones
(docs/results/edges.md).  Three things keep a label that is right: its certainty grows with the distance from
its border, thin parts (poles, signs) are not moved, and every length scales with the frame's diagonal.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_opening, distance_transform_edt

from adapt.labels.edges import seg2edge

__all__ = ["refine", "thin_parts", "trust"]

IGNORE = 255
#: The two kernels: nearness alone (σ as a fraction of the diagonal, weight), and nearness in place and colour
#: (σ as a fraction of the diagonal, σ in levels, weight).
SMOOTH = (0.005, 3.0)
ALIKE = (0.05, 8.0, 3.0)
#: From a border on, certainty grows with the square of the distance to ``FAR`` at ``NEAR`` of the diagonal.
NEAR, FAR = 0.0133, 0.99
#: Parts in which no disc of this radius (a fraction of the diagonal) fits are thin; their certainty is KEPT.
THIN, KEPT = 0.005, 0.999


def pixels(fraction: float, shape: tuple[int, ...]) -> float:
    """A fraction of the diagonal of [H,W] in pixels."""
    return fraction * math.hypot(shape[0], shape[1])


def thin_parts(labels: NDArray[np.uint8], radius: int) -> NDArray[np.bool_]:
    """Pixels of regions in which no disc of ``radius`` pixels around them fits: bool [H,W]; False at 255."""
    yy, xx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = yy * yy + xx * xx <= radius * radius
    wide = np.zeros(labels.shape, bool)
    side = radius + 1
    for value in np.unique(labels):
        mask = np.pad(labels == value, side, mode="edge")  # a region goes on beyond the frame
        wide |= binary_opening(mask, disc)[side:-side, side:-side]
    return np.asarray(~wide & (labels != IGNORE))


def trust(labels: NDArray[np.uint8], certainty: float) -> NDArray[np.float64]:
    """How far each pixel's label is trusted: float64 [H,W], ``certainty`` at a border, more inside."""
    border = seg2edge(labels, 1, ignore=(IGNORE,))
    inside = np.ones(labels.shape)
    if border.any():
        inside = np.minimum(distance_transform_edt(~border) / max(1.0, pixels(NEAR, labels.shape)), 1.0)
    far = max(FAR, certainty)
    found = certainty + (far - certainty) * inside**2
    radius = round(pixels(THIN, labels.shape))
    return np.where(thin_parts(labels, radius), max(KEPT, certainty), found) if radius else found


def refine(
    frame: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: int,
    *,
    certainty: float = 0.55,
    steps: int = 5,
) -> NDArray[np.uint8]:
    """A class map after `steps` mean-field updates; pixels that are 255 stay 255 and count as unknown.

    Args:
        frame: uint8 [H,W,3].
        labels: uint8 [H,W], class index or 255.
        classes: C, at least 2.
        certainty: how far a given label is trusted at its border, over 1/C and under 1.

    Raises:
        ValueError: pydensecrf is not installed, sizes differ, or a value cannot be.
    """
    if frame.shape != (*labels.shape, 3) or frame.dtype != np.uint8:
        raise ValueError(
            f"dense CRF: a frame uint8 {(*labels.shape, 3)} is needed for labels {labels.shape}, "
            f"got {frame.dtype} {frame.shape}"
        )
    if classes < 2 or not 1 / classes < certainty < 1:
        raise ValueError(
            f"dense CRF: {classes} classes with certainty {certainty}: give >= 2, 1/C < certainty < 1"
        )
    known = labels != IGNORE
    if not known.any():
        return labels.copy()
    if int(labels[known].max()) >= classes:
        raise ValueError(
            f"dense CRF: label {int(labels[known].max())} with {classes} classes (0..{classes - 1}, 255)"
        )
    try:
        import pydensecrf.densecrf as crf
    except ImportError:
        raise ValueError(
            "dense CRF: pydensecrf is not installed; pip install 'roadworthy[crf]' (pydensecrf2)"
        ) from None
    flat, sure = labels.reshape(-1), trust(labels, certainty).reshape(-1)
    unary = np.empty((classes, labels.size), np.float32)
    unary[:] = -np.log((1 - sure) / (classes - 1))
    at = np.flatnonzero(flat != IGNORE)
    unary[flat[at], at] = -np.log(sure[at])
    unary[:, flat == IGNORE] = np.log(classes)
    model = crf.DenseCRF2D(labels.shape[1], labels.shape[0], classes)
    model.setUnaryEnergy(unary)
    model.addPairwiseGaussian(sxy=max(1.0, pixels(SMOOTH[0], labels.shape)), compat=SMOOTH[1])
    # The library wants memory that is contiguous and its own to write: a frame of Pillow's is read-only.
    model.addPairwiseBilateral(
        sxy=max(1.0, pixels(ALIKE[0], labels.shape)),
        srgb=ALIKE[1],
        rgbim=np.array(frame, order="C"),
        compat=ALIKE[2],
    )
    found = np.array(model.inference(steps)).argmax(0).reshape(labels.shape).astype(np.uint8)
    return np.where(known, found, np.uint8(IGNORE))
