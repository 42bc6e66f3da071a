"""The multi-annotator protocol on BSDS images: people against people, and a plain gradient."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_gradient_magnitude

from adapt.evaluate.edge_sets import open_truth
from adapt.evaluate.edges import EdgeCounts

pytestmark = pytest.mark.real


def test_people_agree_more_with_each_other_than_a_gradient_does(real_data):
    root = real_data / "bsds500_subset"
    if not root.is_dir():
        pytest.skip(f"{root} is missing")
    truth = open_truth(f"bsds:{root}:test_1000")
    people, gradient = EdgeCounts.of("bsds"), EdgeCounts.of("bsds")
    for i, name in enumerate(truth.names):
        masks = truth.truth(i, "thin")
        people.add(masks[0], masks[1:])
        grey = np.asarray(Image.open(root / "images" / f"{name}.jpg").convert("L"), float)
        strength = gaussian_gradient_magnitude(grey, 2)
        coarse = np.round(strength / strength.max() * 5) / 5  # five thresholds are enough here
        gradient.add(coarse, masks)
    assert 0.65 < people.ods() < 1
    assert 0.2 < gradient.ods() < people.ods() - 0.1
