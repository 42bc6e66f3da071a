"""λ_c and ŷ against an independent brute-force restatement of the published rule, and their properties."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt.labels import cbst
from adapt.labels.cbst import ClassHistograms, pseudo_labels, st_threshold

PATHS = ("numba", "numpy", "torch")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every test that asks for it runs on the three code paths; gives the function that wraps a map."""
    if request.param == "numpy":
        monkeypatch.setattr(cbst, "kernels", lambda: None)
    elif request.param == "numba":
        pytest.importorskip("numba")
    return torch.from_numpy if request.param == "torch" else (lambda p: p)


def softmax_map(seed: int, classes: int = 7, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(classes, *size)) * 4.0 + rng.normal(size=(classes, 1, 1)) * 2
    e = np.exp(x - x.max(0))
    return (e / e.sum(0)).astype(np.float32)


def brute_thresholds(maps: list[np.ndarray], portion: float) -> np.ndarray:
    """The published rule, restated: partition of all values of a class at n − floor(n·p)."""
    classes = maps[0].shape[0]
    lam = np.ones(classes)
    for c in range(classes):
        values = np.concatenate([p.max(0)[p.argmax(0) == c] for p in maps])
        n = len(values)
        k = int(np.floor(n * portion))
        if k > 0:
            lam[c] = np.partition(values, n - k)[n - k]
    return lam


def brute_labels(p: np.ndarray, lam: np.ndarray) -> np.ndarray:
    ratio = p / lam.astype(np.float32)[:, None, None]
    y = ratio.argmax(0).astype(np.uint8)
    y[~(ratio.max(0) >= 1)] = 255
    return y


@pytest.mark.parametrize("portion", [0.15, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thresholds_are_the_exact_order_statistics(path, seed, portion):
    maps = [softmax_map(10 * seed + i) for i in range(5)]
    histograms = ClassHistograms(7)
    for p in maps:
        histograms.add(path(p))
    error = brute_thresholds(maps, portion) - histograms.thresholds(portion)
    assert (error >= -1e-12).all()
    assert error.max() <= 2**-16


@pytest.mark.parametrize("portion", [0.15, 0.2, 0.5])
def test_labels_equal_brute_force_given_the_same_thresholds(path, portion):
    maps = [softmax_map(i) for i in range(4)]
    lam = brute_thresholds(maps, portion)
    for p in maps:
        np.testing.assert_array_equal(pseudo_labels(path(p), lam), brute_labels(p, lam))


def test_seeded_numbers_of_the_published_rule(path):
    """λ_c by hand: class 0 has the confidences .9 .8 .7 .6, class 1 has .95 .55; portion one half."""
    first = np.array([[0.9, 0.8, 0.7, 0.6, 0.05, 0.45]], np.float32)
    p = np.stack([first, 1 - first])
    lam = ClassHistograms(2).add(path(p)).thresholds(0.5)
    np.testing.assert_allclose(lam, [0.8, 0.95], atol=2**-16)
    # .7/.8 and .6/.8 stay under 1, and so do .4/.95 and .55/.95: no label.
    np.testing.assert_array_equal(pseudo_labels(path(p), lam), [[0, 0, 255, 255, 1, 255]])


def test_balanced_thresholds_reach_a_class_that_one_threshold_never_does(path):
    """The paper's point: an unsure rare class gets labels under CBST and none under ST."""
    p = np.zeros((2, 10, 10), np.float32)
    p[0], p[1] = 0.99, 0.01
    p[:, 0, :4] = np.array([[0.4], [0.6]], np.float32)
    histograms = ClassHistograms(2).add(path(p))
    balanced = pseudo_labels(path(p), histograms.thresholds(0.5))
    plain = pseudo_labels(path(p), st_threshold(histograms, 0.5))
    assert (balanced == 1).sum() == 4
    assert (plain == 1).sum() == 0


def test_a_class_never_predicted_is_switched_off(path):
    p = softmax_map(3)
    p[2] = 0
    histograms = ClassHistograms(7).add(path(p))
    lam = histograms.thresholds(0.3)
    assert lam[2] == 1.0
    assert 2 not in pseudo_labels(path(p), lam)


def test_equality_is_accepted_and_ties_go_to_the_lowest_class(path):
    p = np.full((4, 2, 2), 0.25, np.float32)
    np.testing.assert_array_equal(pseudo_labels(path(p), np.full(4, 0.25)), 0)
    np.testing.assert_array_equal(pseudo_labels(path(p), np.full(4, 0.25001)), 255)
    assert ClassHistograms(4).add(path(p)).pixels.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -0.1, 1.5])
def test_a_map_that_is_no_softmax_is_refused_and_counts_nothing(path, poison):
    p = softmax_map(0)
    p[1, 3, 4] = poison
    histograms = ClassHistograms(7)
    with pytest.raises(ValueError, match="NaN or values outside"):
        histograms.add(path(p))
    assert histograms.pixels.sum() == 0
    with pytest.raises(ValueError, match="NaN or values outside"):
        pseudo_labels(path(p), np.full(7, 0.5))


def test_wrong_shapes_are_named(path):
    p = softmax_map(0)
    with pytest.raises(ValueError, match="classes first"):
        ClassHistograms(5).add(path(p))
    with pytest.raises(ValueError, match="positive"):
        pseudo_labels(path(p), np.zeros(7))
    with pytest.raises(ValueError, match="prior has shape"):
        pseudo_labels(path(p), np.ones(7), prior=np.ones((7, 2, 2), np.float32))
    with pytest.raises(ValueError, match="portion"):
        ClassHistograms(7).thresholds(0.0)


def test_tags_forbid_a_class_and_nothing_else(path):
    """Class c only where tag c is allowed: as if λ_c were infinite, elsewhere the plain rule."""
    p = softmax_map(5)
    lam = brute_thresholds([p], 0.4)
    allowed = {0, 1, 3, 4, 5, 6}
    ours = pseudo_labels(path(p), lam, allowed=allowed)
    barred = lam.copy()
    barred[2] = 1e30
    np.testing.assert_array_equal(ours, brute_labels(p, barred))
    np.testing.assert_array_equal(ours, pseudo_labels(path(p), lam, allowed=np.arange(7) != 2))
    assert (pseudo_labels(path(p), lam, allowed=set()) == 255).all()
    assert ClassHistograms(7).add(path(p), allowed=allowed).pixels[2] == 0
    with pytest.raises(ValueError, match=r"outside 0\.\.6"):
        pseudo_labels(path(p), lam, allowed={7})


def test_spatial_prior_replaces_p_by_q_times_p(path):
    p = softmax_map(6)
    q = np.random.default_rng(1).uniform(0.05, 1, size=p.shape).astype(np.float32)
    weighted = p * q
    lam = ClassHistograms(7).add(path(p), prior=q).thresholds(0.3)
    assert np.abs(lam - brute_thresholds([weighted], 0.3)).max() <= 2**-16
    np.testing.assert_array_equal(pseudo_labels(path(p), lam, prior=q), brute_labels(weighted, lam))


def test_the_bonnet_is_left_out(path):
    p = softmax_map(7)
    valid = np.ones(p.shape[1:], bool)
    valid[-6:] = False
    histograms = ClassHistograms(7).add(path(p), valid=valid)
    assert histograms == ClassHistograms(7).add(np.ascontiguousarray(p[:, :-6]))
    assert (pseudo_labels(path(p), histograms.thresholds(0.5), valid=valid)[-6:] == 255).all()


def test_three_paths_one_answer(monkeypatch):
    """NumPy, Numba and torch: the same counts and the same labels, bit for bit."""
    p = softmax_map(11, classes=19, size=(40, 52))
    q = np.random.default_rng(2).uniform(0, 1, size=p.shape).astype(np.float32)
    answers = []
    for name in PATHS:
        with monkeypatch.context() as patch:
            if name == "numpy":
                patch.setattr(cbst, "kernels", lambda: None)
            wrap = torch.from_numpy if name == "torch" else (lambda a: a)
            histograms = ClassHistograms(19).add(wrap(p)).add(wrap(p), prior=wrap(q))
            lam = histograms.thresholds(0.35)
            labels = pseudo_labels(wrap(p), lam), pseudo_labels(wrap(p), lam, prior=wrap(q))
            answers.append((histograms.counts, *labels))
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_state_stays_under_ten_megabytes_for_19_classes():
    assert ClassHistograms(19).counts.nbytes <= 10_000_000


def test_saved_and_loaded_equal(tmp_path):
    histograms = ClassHistograms(7).add(softmax_map(0))
    assert ClassHistograms.load(histograms.save(tmp_path / "h.npz")) == histograms
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match="no class histogram"):
        ClassHistograms.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", counts=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="no class histogram"):
        ClassHistograms.load(tmp_path / "other.npz")


def test_merging_different_class_counts_is_refused():
    with pytest.raises(ValueError, match="cannot merge"):
        ClassHistograms(3).merge(ClassHistograms(4))


SOME = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SOME
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=5), st.floats(0.01, 1.0))
def test_merge_is_the_whole_and_order_does_not_matter(seeds, portion):
    maps = [softmax_map(s, classes=4, size=(6, 8)) for s in seeds]
    whole, left, right, backwards = (ClassHistograms(4) for _ in range(4))
    for i, p in enumerate(maps):
        whole.add(p)
        (left if i % 2 else right).add(p)
    for p in reversed(maps):
        backwards.add(np.ascontiguousarray(p[:, ::-1, ::-1]))
    assert left.merge(right) == whole == backwards
    np.testing.assert_array_equal(whole.thresholds(portion), backwards.thresholds(portion))


@SOME
@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_larger_portion_never_raises_a_threshold_nor_loses_a_label(seed, a, b):
    small, large = sorted((a, b))
    p = softmax_map(seed, classes=4, size=(8, 8))
    histograms = ClassHistograms(4).add(p)
    tight, loose = histograms.thresholds(small), histograms.thresholds(large)
    assert (loose <= tight).all()
    labelled = pseudo_labels(p, tight) != 255
    assert (pseudo_labels(p, loose)[labelled] != 255).all()


@SOME
@given(st.integers(0, 10**6), st.floats(0.02, 1.0))
def test_within_a_ten_thousandth_of_the_order_statistic(seed, portion):
    maps = [softmax_map(seed + i, classes=5, size=(5, 9)) for i in range(3)]
    histograms = ClassHistograms(5)
    for p in maps:
        histograms.add(p)
    assert np.abs(histograms.thresholds(portion) - brute_thresholds(maps, portion)).max() <= 1e-4


@SOME
@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_renaming_the_classes_renames_the_thresholds(seed, order):
    p = softmax_map(seed, classes=5, size=(6, 6))
    plain = ClassHistograms(5).add(p).thresholds(0.4)
    renamed = ClassHistograms(5).add(np.ascontiguousarray(p[list(order)])).thresholds(0.4)
    np.testing.assert_array_equal(renamed, plain[list(order)])


# ------------------------------------------------------------------------------------- hostile input
def test_a_mask_of_another_size_is_refused(path):
    """Numba would read beyond its end."""
    p, small = softmax_map(0), np.ones((2, 2), bool)
    with pytest.raises(ValueError, match="crop it alike"):
        ClassHistograms(7).add(path(p), valid=small)
    with pytest.raises(ValueError, match="crop it alike"):
        pseudo_labels(path(p), np.full(7, 0.5), valid=small)


@pytest.mark.parametrize("value", [np.nan, -1.0, 2.0])
def test_a_prior_that_is_none_is_refused(path, value):
    p = softmax_map(0)
    q = np.full_like(p, 0.5)
    q[0, 0, 0] = value
    with pytest.raises(ValueError, match="prior holds"):
        ClassHistograms(7).add(path(p), prior=path(q))
    with pytest.raises(ValueError, match="prior holds"):
        pseudo_labels(path(p), np.full(7, 0.5), prior=path(q))


def test_a_prior_stored_backwards_is_the_same_prior(path):
    p = softmax_map(0)
    q = np.random.default_rng(0).uniform(0, 1, p.shape).astype(np.float32)
    backwards = np.ascontiguousarray(q[:, ::-1])[:, ::-1]
    lam = np.full(7, 0.3)
    np.testing.assert_array_equal(
        pseudo_labels(path(p), lam, prior=q), pseudo_labels(path(p), lam, prior=backwards)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_other_floats_are_taken_as_float32(dtype):
    p = softmax_map(0).astype(dtype)
    assert ClassHistograms(7).add(p) == ClassHistograms(7).add(p.astype(np.float32))
    turned = np.ascontiguousarray(p[:, ::-1].transpose(0, 2, 1)).transpose(0, 2, 1)
    assert ClassHistograms(7).add(turned) == ClassHistograms(7).add(p)


@pytest.mark.parametrize(("classes", "size"), [(1, (3, 4)), (254, (2, 3)), (5, (1, 1)), (5, (0, 4))])
def test_the_smallest_and_the_largest(path, classes, size):
    p = softmax_map(0, classes, size)
    lam = ClassHistograms(classes).add(path(p)).thresholds(1.0)
    np.testing.assert_array_equal(pseudo_labels(path(p), lam), p.argmax(0))


def test_more_classes_than_a_byte_are_refused():
    for classes in (0, 255, 300):
        with pytest.raises(ValueError, match=r"expected 1\.\.254"):
            ClassHistograms(classes)
    with pytest.raises(ValueError, match=r"expected 1\.\.254"):
        pseudo_labels(np.full((300, 2, 2), 1 / 300, np.float32), np.full(300, 0.001))


@pytest.mark.parametrize("portion", [0, -0.1, 1.1, float("nan"), "a", None])
def test_portions_that_cannot_be(portion):
    with pytest.raises(ValueError, match="portion"):
        ClassHistograms(3).thresholds(portion)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda p: torch.from_numpy(p).to(torch.complex64), "real numbers"),
        (lambda p: torch.from_numpy(p).to_sparse(), "real numbers"),
        (lambda p: torch.from_numpy(p).to("meta"), "real numbers"),
        (lambda p: np.ma.masked_array(p, mask=p > 0.5), "masked"),
        (lambda p: p.astype(object), "real numbers"),
        (lambda p: p.tolist(), "expected"),
        (lambda p: p.astype(np.float64) * 1e300, "NaN or values outside"),
    ],
)
def test_what_is_no_map_is_refused_with_a_value_error(given, words):
    p, h = given(softmax_map(0)), ClassHistograms(7)
    with pytest.raises(ValueError, match=words):
        h.add(p)
    with pytest.raises(ValueError, match=words):
        pseudo_labels(p, np.full(7, 0.5))
    assert h.pixels.sum() == 0


def test_thresholds_tags_and_masks_may_be_tensors():
    p, lam = softmax_map(0), np.full(7, 0.3)
    valid = np.ones(p.shape[1:], bool)
    valid[3:] = False
    wanted = pseudo_labels(p, lam, prior=p, allowed={1, 2, 3}, valid=valid)
    found = pseudo_labels(
        p,
        torch.tensor(lam, requires_grad=True),
        prior=torch.from_numpy(p),
        allowed=torch.tensor([1, 2, 3]),
        valid=torch.from_numpy(valid),
    )
    np.testing.assert_array_equal(found, wanted)
    # over the largest float32 is infinity: the class is off, as it is for a tag that is not there
    np.testing.assert_array_equal(
        pseudo_labels(p, [1e300, *lam[1:]]), pseudo_labels(p, lam, allowed=range(1, 7))
    )


def test_a_schedule_rises_by_its_step_up_to_its_cap():
    assert cbst.self_paced(0.2, 0.05, 0.5, 3) == (0.2, 0.25, 0.3)
    assert cbst.self_paced(0.2, 0.15, 0.5, 4) == (0.2, 0.35, 0.5, 0.5)
    for wrong in (
        (0, 0.1, 0.5, 3),
        (0.6, 0.1, 0.5, 3),
        (0.2, -0.1, 0.5, 3),
        (0.2, float("nan"), 0.5, 3),
        (0.2, 0.1, 1.5, 3),
        (0.2, 0.1, 0.5, 0),
    ):
        with pytest.raises(ValueError, match="portion"):
            cbst.self_paced(*wrong)


def test_a_file_that_would_unpack_to_gigabytes_is_not_unpacked(tmp_path):
    header = io.BytesIO()
    shape = (254, cbst.BINS * 40)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    schema = io.BytesIO()
    np.save(schema, np.int64(1))
    with zipfile.ZipFile(tmp_path / "h.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("counts.npy", "w") as entry:
            entry.write(header.getvalue())
            for _ in range(200):
                entry.write(bytes(1 << 20))
        file.writestr("schema.npy", schema.getvalue())
    with pytest.raises(ValueError, match="would unpack to 209"):
        ClassHistograms.load(tmp_path / "h.npz")


def test_saving_where_it_cannot_be_leaves_nothing_behind(tmp_path):
    (tmp_path / "h").mkdir()
    with pytest.raises(OSError, match="directory"):
        ClassHistograms(3).save(tmp_path / "h")
    assert [p.name for p in tmp_path.iterdir()] == ["h"]


def test_odd_arguments_are_named():
    p, h = softmax_map(0), ClassHistograms(7)
    for call, words in (
        (lambda: h.quantile(-1, 0.5), "class -1"),
        (lambda: h.quantile(7, 0.5), "class 7"),
        (lambda: h.merge(5), "merge a int"),
        (lambda: pseudo_labels(p, np.ones((7, 1))), "one value a class"),
        (lambda: pseudo_labels(p, [np.nan] * 7), "no NaN"),
        (lambda: pseudo_labels(p, np.ones(7), allowed={"car"}), "class indices"),
        (lambda: pseudo_labels(p, np.ones(7), allowed={1.5}), "class indices"),
        (lambda: pseudo_labels(p, np.ones(7), allowed=3), "set of class indices"),
        (lambda: pseudo_labels(p, np.ones(7) + 0j), "λ is complex128"),
        (lambda: pseudo_labels(p, np.ones(7), prior=p.tolist()), "prior has shape"),
        (lambda: pseudo_labels(p, np.ones(7), prior=p.astype(complex)), "prior is complex128"),
        (lambda: h.add(p.astype(complex)), "real numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert h.pixels.sum() == 0
    assert not (pseudo_labels(p, [np.inf, *[0.1] * 6]) == 0).any()


@pytest.mark.parametrize(
    "content",
    [
        {"counts": np.zeros((3, cbst.BINS), np.int64), "schema": 7},
        {"counts": np.full((3, cbst.BINS), 2**40), "schema": 1},
        {"counts": np.zeros((300, 4), np.int64), "schema": 1},
        {"counts": -np.ones((3, cbst.BINS), np.int64), "schema": 1},
        {"counts": np.zeros((0, cbst.BINS), np.int64), "schema": 1},
        {"schema": 1},
    ],
)
def test_files_that_are_no_histogram_are_refused(tmp_path, content):
    np.savez(tmp_path / "h.npz", **content)
    with pytest.raises(ValueError, match="class histogram"):
        ClassHistograms.load(tmp_path / "h.npz")


def test_a_damaged_file_is_refused_and_never_half_read(tmp_path):
    path = ClassHistograms(3).add(softmax_map(0, 3)).save(tmp_path / "h.npz")
    raw = path.read_bytes()
    middle = len(raw) // 2
    for damaged in (b"", raw[:middle], raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no class histogram"):
            ClassHistograms.load(path)


def test_what_a_device_counted_is_there_whenever_somebody_looks(tmp_path):
    """Tensors are counted where they are; NumPy arrays, merges and files in between see the whole."""
    maps = [softmax_map(i) for i in range(4)]
    whole = ClassHistograms(7)
    for p in maps:
        whole.add(p)
    h = ClassHistograms(7).add(torch.from_numpy(maps[0])).add(maps[1])
    with torch.inference_mode():
        h.add(torch.from_numpy(maps[2]).clone())
    h.add(torch.from_numpy(maps[0]))
    whole.add(maps[0])
    other = ClassHistograms(7).add(torch.from_numpy(maps[3]))
    assert h.merge(other) == whole
    again = ClassHistograms(7).add(torch.from_numpy(maps[0]))
    assert ClassHistograms.load(again.save(tmp_path / "h.npz")) == ClassHistograms(7).add(maps[0])
    assert (
        again.add(torch.from_numpy(maps[1])).pixels == ClassHistograms(7).add(maps[0]).add(maps[1]).pixels
    ).all()
