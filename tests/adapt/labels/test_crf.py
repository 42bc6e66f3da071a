"""The dense CRF of CASENet-C: against mean field with the whole kernel matrix, and on labels that are off."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from adapt.labels import crf
from adapt.train import edges_main
from networks.pack import load_pack


@pytest.fixture
def library():
    return pytest.importorskip("pydensecrf.densecrf", reason="extra crf is not installed")


def scene(shift: int = 0, size: tuple[int, int] = (24, 32)) -> tuple[np.ndarray, np.ndarray]:
    """Three areas of clearly different colours; labels pushed `shift` pixels to the right."""
    truth = np.zeros(size, np.uint8)
    truth[:, 12:22] = 1
    truth[15:] = 2
    colours = np.array([[200, 60, 40], [40, 180, 70], [60, 70, 200]], float)
    noise = np.random.default_rng(0).normal(0, 4, (*size, 3))
    frame = np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)
    return frame, np.roll(truth, shift, axis=1) if shift else truth


def brute_force(
    frame: np.ndarray, labels: np.ndarray, classes: int, certainty: float, steps: int
) -> np.ndarray:
    """Q ← softmax(−U + Σ_m w_m K̃_m Q), K̃ the whole N×N Gaussian kernel, normalised on both sides."""
    rows, columns = np.indices(labels.shape).reshape(2, -1).astype(float)
    place = np.stack([columns, rows], 1)
    smooth = place / crf.SMOOTH[0]
    alike = np.concatenate([place / crf.ALIKE[0], frame.reshape(-1, 3) / crf.ALIKE[1]], 1)
    kernels = []
    for features, weight in ((smooth, crf.SMOOTH[1]), (alike, crf.ALIKE[2])):
        k = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(2))
        d = 1 / np.sqrt(k.sum(1))
        kernels.append(weight * d[:, None] * k * d[None])
    flat = labels.reshape(-1)
    p = np.full((labels.size, classes), (1 - certainty) / (classes - 1))
    p[np.arange(labels.size), np.where(flat == 255, 0, flat)] = certainty
    p[flat == 255] = 1 / classes
    q = p.copy()
    for _ in range(steps):
        energy = np.log(p) + sum(k @ q for k in kernels)
        q = np.exp(energy - energy.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
    return np.where(flat == 255, 255, q.argmax(1)).reshape(labels.shape)


@pytest.mark.parametrize("shift", [0, 2])
def test_it_is_the_mean_field_of_the_paper(library, shift):
    frame, labels = scene(shift)
    labels = labels.copy()
    labels[:3, :5] = 255
    ours = crf.refine(frame, labels, 3)
    exact = brute_force(frame, labels, 3, 0.7, 5)
    assert (ours == exact).mean() > 0.98  # the library filters on a permutohedral lattice
    assert (ours[:3, :5] == 255).all()


def test_labels_that_are_off_snap_to_the_frame(library):
    frame, truth = scene()
    _, off = scene(shift=2)
    before, after = (off == truth).mean(), (crf.refine(frame, off, 3) == truth).mean()
    assert before < 0.95
    assert after > 0.99


def test_what_cannot_be_is_named(monkeypatch):
    frame, labels = scene()
    with pytest.raises(ValueError, match="label 2 with 2 classes"):
        crf.refine(frame, labels, 2)
    with pytest.raises(ValueError, match="is needed"):
        crf.refine(frame[1:], labels, 3)
    with pytest.raises(ValueError, match="certainty"):
        crf.refine(frame, labels, 3, certainty=1.0)
    nothing = np.full_like(labels, 255)
    np.testing.assert_array_equal(crf.refine(frame, nothing, 3), nothing)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ValueError, match="not installed"):
        crf.refine(frame, labels, 3)


def test_the_preset_trains_a_pack_on_refined_labels(library, tmp_path, monkeypatch):
    asked = []
    refine = crf.refine
    monkeypatch.setattr(crf, "refine", lambda *a, **k: asked.append(1) or refine(*a, **k))
    arguments = [
        *("--data", "street:day:2:0", "--classes", "street", "--network", "casenet", "--set", "depth=14"),
        *("--set", "width=8", "--crop", "32x48", "--preset", "casenet-c-sbd", "--steps", "1", "--batch", "1"),
        *("--round", "1", "--quiet", "--out", str(tmp_path / "pack")),
    ]
    assert edges_main.main(arguments) == 0
    assert len(asked) == 2
    assert load_pack(tmp_path / "pack").spec.training.startswith("casenet-c-sbd")
