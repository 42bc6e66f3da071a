"""The dense CRF of CASENet-C: against mean field with the whole kernel matrix, and on labels that are off."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from adapt.labels import crf
from adapt.train import edges_main
from networks.pack import load_pack


@pytest.fixture
def library():
    return pytest.importorskip("pydensecrf.densecrf", reason="extra crf is not installed")


def scene(shift: int = 0, size: tuple[int, int] = (24, 32)) -> tuple[np.ndarray, np.ndarray]:
    """Three areas of clearly different colours; labels pushed `shift` pixels to the right."""
    truth = np.zeros(size, np.uint8)
    height, width = size
    truth[:, width * 12 // 32 : width * 22 // 32] = 1
    truth[height * 15 // 24 :] = 2
    colours = np.array([[200, 60, 40], [40, 180, 70], [60, 70, 200]], float)
    noise = np.random.default_rng(0).normal(0, 4, (*size, 3))
    frame = np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)
    return frame, np.roll(truth, shift, axis=1) if shift else truth


def png(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


def brute_force(
    frame: np.ndarray, labels: np.ndarray, classes: int, certainty: float, steps: int
) -> np.ndarray:
    """Q ← softmax(−U + Σ_m w_m K̃_m Q), K̃ the whole N×N Gaussian kernel, normalised on both sides."""
    rows, columns = np.indices(labels.shape).reshape(2, -1).astype(float)
    place = np.stack([columns, rows], 1)
    diagonal = np.hypot(*labels.shape)
    smooth = place / max(1.0, crf.SMOOTH[0] * diagonal)
    near = max(1.0, crf.ALIKE[0] * diagonal)
    alike = np.concatenate([place / near, frame.reshape(-1, 3) / crf.ALIKE[1]], 1)
    kernels = []
    for features, weight in ((smooth, crf.SMOOTH[1]), (alike, crf.ALIKE[2])):
        k = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(2))
        d = 1 / np.sqrt(k.sum(1))
        kernels.append(weight * d[:, None] * k * d[None])
    flat = labels.reshape(-1)
    sure = crf.trust(labels, certainty).reshape(-1)
    p = np.repeat(((1 - sure) / (classes - 1))[:, None], classes, 1)
    p[np.arange(labels.size), np.where(flat == 255, 0, flat)] = sure
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
    exact = brute_force(frame, labels, 3, 0.55, 5)
    assert (ours == exact).mean() > 0.98  # the library filters on a permutohedral lattice
    assert (ours[:3, :5] == 255).all()


def test_trust_grows_from_a_border_and_thin_parts_keep_theirs():
    labels = np.zeros((240, 320), np.uint8)
    labels[:, 160:] = 1
    labels[100:200, 60:63] = 2
    found = crf.trust(labels, 0.55)
    across = found[20, 100:160]  # up to the border between 159 and 160
    assert across[-1] == pytest.approx(0.55)
    assert (np.diff(across) <= 0).all()
    assert across[0] == pytest.approx(crf.FAR)
    assert (found[100:200, 60:63] == crf.KEPT).all()
    assert (crf.trust(np.full((9, 9), 3, np.uint8), 0.55) == crf.FAR).all()
    # a pole of the same share of a frame of twice the size is as thin
    large = np.repeat(np.repeat(labels, 2, 0), 2, 1)
    assert crf.thin_parts(large, round(crf.pixels(crf.THIN, large.shape)))[300, 122]
    assert not crf.thin_parts(labels, 2)[:, 100:].any()


def test_labels_that_are_off_snap_to_the_frame_and_exact_ones_stay(library):
    frame, truth = scene(size=(72, 96))
    _, off = scene(shift=2, size=(72, 96))
    before, after = (off == truth).mean(), (crf.refine(frame, off, 3) == truth).mean()
    assert after > before + 0.5 * (1 - before)
    assert (crf.refine(frame, truth, 3) == truth).all()


def test_frames_and_labels_may_be_read_only_and_of_any_layout(library):
    frame, labels = scene(2)
    wanted = crf.refine(frame, labels, 3)
    frozen = Image.open(io.BytesIO(png(frame)))
    assert not np.asarray(frozen).flags.writeable
    locked = labels.copy()
    locked.flags.writeable = False
    turned = np.asfortranarray(frame)
    backwards = np.ascontiguousarray(frame[:, ::-1])[:, ::-1]
    for given in (np.asarray(frozen), turned, backwards):
        np.testing.assert_array_equal(crf.refine(given, locked, 3), wanted)


def test_what_the_library_is_given_is_contiguous_and_writeable(monkeypatch):
    """Holds without the library: a stand-in takes what it would take."""
    seen = []

    class Model:
        def __init__(self, width, height, classes):
            self.shape = (classes, width * height)

        def setUnaryEnergy(self, energy):
            seen.append(energy)
            self.energy = energy

        def addPairwiseGaussian(self, sxy, compat):
            assert sxy >= 1

        def addPairwiseBilateral(self, sxy, srgb, rgbim, compat):
            seen.append(rgbim)

        def inference(self, steps):
            return np.exp(-self.energy)

    module = types.ModuleType("pydensecrf.densecrf")
    module.DenseCRF2D = Model
    package = types.ModuleType("pydensecrf")
    package.densecrf = module
    monkeypatch.setitem(sys.modules, "pydensecrf", package)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", module)
    frame, labels = scene()
    frame.flags.writeable = labels.flags.writeable = False
    np.testing.assert_array_equal(crf.refine(frame, labels, 3), labels)
    for array in seen:
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.real
def test_exact_labels_of_real_frames_stay_and_coarse_ones_come_nearer(library, real_data):
    from adapt.data.open import open_dataset
    from adapt.evaluate.edges import match
    from adapt.labels.edges import category_edges
    from bench.edges_damage import damaged

    dataset = open_dataset(f"camvid:{real_data}/camvid:day_val_clean")
    count = np.zeros((3, 3))
    for i in (5, 40):
        frame, labels = dataset[i]
        coarse = damaged(labels, np.random.default_rng(i), 8, (6, 2, 8, 9, 10))
        maps = (crf.refine(frame, labels, 11), coarse, crf.refine(frame, coarse, 11))
        truth = category_edges(labels, 11)
        for row, given in enumerate(maps):
            for a, b in zip(category_edges(given, 11), truth, strict=True):
                count[row] += (match(a, b, 0.0035), a.sum(), b.sum())
    exact, before, after = 2 * count[:, 0] / (count[:, 1] + count[:, 2])
    assert exact >= 0.97
    assert after > before


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
        *("--set", "width=8", "--crop", "32x48", "--preset", "casenet-c-scratch", "--steps", "1"),
        *("--batch", "1"),
        *("--round", "1", "--quiet", "--out", str(tmp_path / "pack")),
    ]
    assert edges_main.main(arguments) == 0
    assert len(asked) == 2
    assert load_pack(tmp_path / "pack").spec.training.startswith("casenet-c-scratch")
