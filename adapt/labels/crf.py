"""CASENet-C's labels: a class map snapped to the frame's own colours by a dense CRF.

Krähenbühl & Koltun, *Efficient Inference in Fully Connected CRFs*, NIPS 2011, by their own code as
``pydensecrf`` packs it (extra "crf"; how it is installed today: docs/edges.md).  CASENet-C's constants are
not published; these are the library's example, narrower, because labels are nearly right already.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["refine"]

IGNORE = 255
#: The two kernels: nearness alone, and nearness in place and colour; (σ in pixels, σ in levels, weight).
SMOOTH = (3.0, 3.0)
ALIKE = (50.0, 10.0, 10.0)


def refine(
    frame: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: int,
    *,
    certainty: float = 0.7,
    steps: int = 5,
) -> NDArray[np.uint8]:
    """A class map after `steps` mean-field updates; pixels that are 255 stay 255 and count as unknown.

    Args:
        frame: uint8 [H,W,3].
        labels: uint8 [H,W], class index or 255.
        classes: C, at least 2.
        certainty: how far a given label is trusted, over 1/C and under 1.

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
            "dense CRF: pydensecrf is not installed; docs/edges.md has the command (extra crf)"
        ) from None
    unary = np.full((classes, labels.size), -np.log((1 - certainty) / (classes - 1)), np.float32)
    flat = labels.reshape(-1)
    at = np.flatnonzero(flat != IGNORE)
    unary[flat[at], at] = -np.log(certainty)
    unary[:, flat == IGNORE] = np.log(classes)
    model = crf.DenseCRF2D(labels.shape[1], labels.shape[0], classes)
    model.setUnaryEnergy(unary)
    model.addPairwiseGaussian(sxy=SMOOTH[0], compat=SMOOTH[1])
    model.addPairwiseBilateral(
        sxy=ALIKE[0], srgb=ALIKE[1], rgbim=np.ascontiguousarray(frame), compat=ALIKE[2]
    )
    found = np.asarray(model.inference(steps)).argmax(0).reshape(labels.shape).astype(np.uint8)
    return np.where(known, found, np.uint8(IGNORE))
