"""Class-balanced self-training's two formulas: the thresholds λ_c and the pseudo-labels ŷ.

After Zou, Yu, Kumar, Wang, *Unsupervised Domain Adaptation for Semantic Segmentation via
Class-Balanced Self-Training*, ECCV 2018; its symbols are kept:

* ``p``      softmax, C×H×W; with a spatial prior, q_n(c)·p_n(c) takes its place everywhere (CBST-SP)
* ``λ_c``    exp(−k_c): the probability ranked at portion p among **all** target pixels *predicted as c*
* ``ŷ``      argmax_c p(c)/λ_c where that ratio is >= 1, otherwise no label (255)

The published procedure writes every softmax map to disk (159 MB a frame) and sorts one value in four.
Here a histogram of 2^16 bins a class is kept instead: it adds up over frames, processes and machines,
never grows, and λ_c is the lower edge of the bin that holds the exact order statistic, so it is within
2^-16 (1.6e-5) of it.  The bin edges are multiples of 2^-16, exact in float32, so NumPy, Numba and torch
(CPU or CUDA) give the same integers and the same labels, bit for bit.

This module knows arrays.  It may not know networks, frames on disk or training.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.files import replace_file

__all__ = ["BINS", "IGNORE", "ClassHistograms", "pseudo_labels", "self_paced", "st_threshold"]

BINS = 1 << 16
IGNORE = 255
_SLACK = np.float32(1.0 + 1e-4)  # softmax in float32 may round a hair over one


def _is_torch(array: Any) -> bool:
    return hasattr(array, "detach") and hasattr(array, "is_sparse")


def _host(array: Any) -> Any:
    """A tensor of any device as a NumPy array; anything else as it is."""
    return array.detach().cpu().numpy() if _is_torch(array) else array


# --------------------------------------------------------------------------------------- the kernels
# Each kernel exists twice with the same arithmetic: plain NumPy (also the torch path, the operations
# have the same names) and a fused Numba loop that reads the map once.  Ties go to the lowest class.

_NUMBA: Any = None


def kernels() -> Any:
    """The Numba kernels, compiled on first use (cached on disk), or None where Numba is missing."""
    global _NUMBA
    if _NUMBA is None:
        try:
            from adapt.labels import _kernels as module

            _NUMBA = module
        except ImportError:
            _NUMBA = False
    return _NUMBA or None


def _check_classes(classes: int) -> None:
    if not 1 <= classes < IGNORE:
        raise ValueError(f"{classes} classes: expected 1..254 (an index is one byte, 255 is ignore)")


def _check_map(p: Any, classes: int) -> None:
    if getattr(p, "ndim", 0) != 3 or p.shape[0] != classes:
        shape = tuple(getattr(p, "shape", ()))
        raise ValueError(f"the softmax map has shape {shape}, expected [{classes}, H, W], classes first")
    if _is_torch(p):
        if p.is_complex() or p.is_sparse or p.is_meta:
            raise ValueError(f"the softmax map is {p.dtype}, {p.layout} on {p.device}: expected real numbers")
    elif not isinstance(p, np.ndarray) or p.dtype.kind not in "fiub" or isinstance(p, np.ma.MaskedArray):
        what = "masked (use `valid`)" if isinstance(p, np.ma.MaskedArray) else getattr(p, "dtype", type(p))
        raise ValueError(f"the softmax map is {what}: expected an array or tensor of real numbers")


def check_prior(prior: Any, p: Any) -> None:
    shape = tuple(getattr(prior, "shape", ()))
    if shape != tuple(p.shape):
        raise ValueError(f"the spatial prior has shape {shape}, the map {tuple(p.shape)}: resize the prior")
    if not _is_torch(prior) and prior.dtype.kind not in "fiub":
        raise ValueError(f"the spatial prior is {prior.dtype}: expected real numbers")
    if not bool(((prior >= 0) & (prior <= float(_SLACK))).all()):
        raise ValueError("the spatial prior holds NaN or values outside 0..1: estimate it again")


def valid_mask(valid: Any, p: Any) -> np.ndarray | None:
    """bool [H,W]; a mask of another size would be read beyond its end."""
    if valid is None:
        return None
    mask = np.ascontiguousarray(_host(valid), np.bool_)
    if mask.shape != tuple(p.shape[1:]):
        raise ValueError(f"`valid` has shape {mask.shape}, the map {tuple(p.shape[1:])}: crop it alike")
    return mask


def allowed_mask(allowed: Collection[int] | np.ndarray | None, classes: int) -> np.ndarray | None:
    """bool [C] from a set of class indices or a bool [C] array; None = every class may appear."""
    if allowed is None:
        return None
    allowed = _host(allowed)
    try:
        values = np.asarray(allowed if isinstance(allowed, np.ndarray) else list(allowed))
    except TypeError as error:
        raise ValueError(f"`allowed` is {allowed!r}: give a set of class indices or a bool mask") from error
    if values.size and values.dtype.kind not in "iub":
        raise ValueError(f"`allowed` holds {values.tolist()}: give class indices or a bool mask")
    if values.dtype == np.bool_:
        if values.shape != (classes,):
            raise ValueError(f"`allowed` is a mask of {values.shape}, expected ({classes},)")
        return values.copy()
    if values.size and (values.min() < 0 or values.max() >= classes):
        raise ValueError(f"`allowed` names a class outside 0..{classes - 1}: {values.tolist()}")
    mask = np.zeros(classes, bool)
    mask[values.astype(np.int64)] = True
    return mask


def _bad() -> ValueError:
    return ValueError(
        "the softmax map holds NaN or values outside 0..1: "
        "the network is broken or the map is no softmax; refuse the frame"
    )


def _best_numpy(
    p: np.ndarray, prior: np.ndarray | None, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(class uint8 [H,W], value float32 [H,W]) of the best allowed class; value −1 where none is allowed."""
    best = np.full(p.shape[1:], -1.0, np.float32)
    index = np.full(p.shape[1:], IGNORE, np.uint8)
    for c in range(p.shape[0]):
        if mask is not None and not mask[c]:
            continue
        value = p[c] if prior is None else p[c] * prior[c]
        take = value > best
        best = np.where(take, value, best)
        index[take] = c
    return index, best


def _best_torch(p: Any, prior: Any, mask: np.ndarray | None) -> tuple[Any, Any]:
    import torch

    best = torch.full(p.shape[1:], -1.0, dtype=torch.float32, device=p.device)
    index = torch.full(p.shape[1:], IGNORE, dtype=torch.uint8, device=p.device)
    for c in range(p.shape[0]):
        if mask is not None and not mask[c]:
            continue
        value = p[c] if prior is None else p[c] * prior[c]
        take = value > best
        best = torch.where(take, value, best)
        index = torch.where(take, c, index)
    return index, best


def _numpy_map(p: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 is no softmax either
        return np.ascontiguousarray(_host(p), dtype=np.float32)


def _torch_like(array: Any, p: Any) -> Any:
    import torch

    if isinstance(array, np.ndarray):
        array = np.ascontiguousarray(array)
    return torch.as_tensor(array, dtype=torch.float32, device=p.device)


# -------------------------------------------------------------------------------------- the histogram
class ClassHistograms:
    """Mergeable confidence histograms: how sure the network is, of the pixels it calls c.

    State: ``counts`` int64 [C, 65536]; bin b counts pixels predicted as c with b/2^16 <= confidence
    < (b+1)/2^16 (the last bin includes 1).  10 MB for 19 classes whatever the number of frames.
    """

    def __init__(self, classes: int) -> None:
        _check_classes(classes)
        self.classes = classes
        self._counts = np.zeros((classes, BINS), np.int64)
        self._pending: Any = None  # a tensor on the device that counts: ten megabytes a frame need not travel

    @property
    def counts(self) -> np.ndarray:
        """int64 [C, 65536], everything counted so far."""
        if self._pending is not None:
            self._counts += self._pending.cpu().numpy().reshape(self._counts.shape)
            self._pending = None
        return self._counts

    # ------------------------------------------------------------------------------------- collecting
    def add(
        self,
        p: Any,
        *,
        prior: Any = None,
        allowed: Collection[int] | np.ndarray | None = None,
        valid: np.ndarray | None = None,
    ) -> ClassHistograms:
        """Count one frame.

        Args:
            p: softmax, float32 [C,H,W] in 0..1, NumPy array or torch tensor (any device).
            prior: q_c(y,x) float32 [C,H,W] in 0..1 (CBST-SP), or None.
            allowed: classes that may appear in this frame (set of indices or bool [C]), or None = all.
            valid: bool [H,W], False = leave the pixel out (own bonnet, border), or None.

        Raises:
            ValueError: wrong shape, NaN, or values outside 0..1; nothing has been counted then.
        """
        _check_map(p, self.classes)
        if prior is not None:
            check_prior(prior, p)
        mask = allowed_mask(allowed, self.classes)
        inside = valid_mask(valid, p)
        if _is_torch(p):
            self._add_torch(p, prior, mask, inside)
            return self
        values = _numpy_map(p)
        fused = kernels()
        if fused is not None:
            if not fused.in_range(values, _SLACK):
                raise _bad()
            fused.collect(
                values,
                fused.EMPTY if prior is None else _numpy_map(prior),
                np.ones(self.classes, np.bool_) if mask is None else mask,
                fused.EMPTY_MASK if inside is None else inside,
                self._counts,
            )
            return self
        if not bool(((values >= 0) & (values <= _SLACK)).all()):
            raise _bad()
        index, best = _best_numpy(values, None if prior is None else _numpy_map(prior), mask)
        self._add_reduced(index, best, inside)
        return self

    def _add_torch(self, p: Any, prior: Any, mask: np.ndarray | None, valid: np.ndarray | None) -> None:
        import torch

        p = p.detach().to(torch.float32)
        if not bool(((p >= 0) & (p <= float(_SLACK))).all()):
            raise _bad()
        index, best = _best_torch(p, None if prior is None else _torch_like(prior, p), mask)
        keep = index != IGNORE
        if valid is not None:
            keep &= torch.as_tensor(valid, device=p.device)
        bins = (best[keep] * BINS).to(torch.int64).clamp_(0, BINS - 1)
        flat = torch.bincount(index[keep].to(torch.int64) * BINS + bins, minlength=self.classes * BINS)
        self._pending = flat if self._pending is None else self._pending.to(flat.device) + flat

    def _add_reduced(self, index: np.ndarray, best: np.ndarray, valid: np.ndarray | None) -> None:
        keep = index != IGNORE
        if valid is not None:
            keep &= valid
        bins = np.minimum((best[keep] * np.float32(BINS)).astype(np.int64), BINS - 1)
        flat = np.bincount(index[keep].astype(np.int64) * BINS + bins, minlength=self.classes * BINS)
        self._counts += flat.reshape(self._counts.shape)

    def merge(self, other: ClassHistograms) -> ClassHistograms:
        """Add another histogram's counts: merge(h(A), h(B)) = h(A ∪ B) exactly.  Returns self."""
        if not isinstance(other, ClassHistograms):
            raise ValueError(f"cannot merge a {type(other).__name__}: expected ClassHistograms")
        if other.classes != self.classes:
            raise ValueError(f"cannot merge histograms of {other.classes} and {self.classes} classes")
        self._counts += other.counts
        return self

    # --------------------------------------------------------------------------------------- asking
    @property
    def pixels(self) -> np.ndarray:
        """int64 [C]: pixels predicted as c so far."""
        return np.asarray(self.counts.sum(axis=1))

    def shares(self) -> np.ndarray:
        """float64 [C], sums to 1 (all zero where nothing was counted): how much of the domain is called c."""
        n = self.pixels
        total = n.sum()
        return np.asarray(n / total) if total else np.zeros(self.classes)

    def mean_confidence(self) -> np.ndarray:
        """float64 [C]: mean confidence of the pixels predicted as c, to 1e-5; NaN where there are none."""
        centres = (np.arange(BINS) + 0.5) / BINS
        n = self.pixels
        with np.errstate(invalid="ignore"):
            return np.where(n > 0, (self.counts @ centres) / np.maximum(n, 1), np.nan)

    def thresholds(self, portion: float) -> np.ndarray:
        """λ_c for CBST: float64 [C], the value ranked floor(n_c·portion) from the top among class c.

        1.0 where c was never predicted, or so rarely that floor(n_c·portion) = 0: the class is switched
        off.  Within 2^-16 below the exact order statistic, so at least the portion is accepted.
        """
        check_portion(portion)
        return np.array([_ranked(self.counts[c], portion) for c in range(self.classes)])

    def threshold(self, portion: float) -> float:
        """λ for plain self-training (ST): the one value ranked at `portion` among all pixels."""
        check_portion(portion)
        return _ranked(self.counts.sum(axis=0), portion)

    def quantile(self, c: int, portion: float) -> float:
        """λ_c of one class."""
        check_portion(portion)
        if not 0 <= c < self.classes:
            raise ValueError(f"class {c}: expected 0..{self.classes - 1}")
        return _ranked(self.counts[c], portion)

    # --------------------------------------------------------------------------------------- keeping
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` (compressed .npz; replaced atomically).  Returns the path."""
        path = Path(path)
        with replace_file(path) as file:
            np.savez_compressed(file, schema=np.int64(1), counts=self.counts)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassHistograms:
        """Read what `save` wrote.  Raises ValueError (one line) for anything else."""
        try:
            with open(path, "rb") as file:
                _refuse_large(file)
                with np.load(file, allow_pickle=False) as data:
                    schema, counts = int(data["schema"]), data["counts"]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is no class histogram ({error}): collect it again") from error
        if counts.ndim != 2 or counts.shape[1] != BINS or counts.dtype != np.int64 or (counts < 0).any():
            found = f"{counts.dtype} {counts.shape}"
            raise ValueError(f"{path} is no class histogram ({found}): collect it again")
        if schema != 1:
            raise ValueError(f"{path} is a class histogram of schema {schema}: this version reads 1")
        if counts.sum(dtype=np.float64) > 2.0**53:  # ranks are exact up to here, and a thousand merge safely
            raise ValueError(f"{path} is no class histogram (counts beyond 2^53): collect it again")
        try:
            histogram = cls(counts.shape[0])
        except ValueError as error:
            raise ValueError(f"{path} is no class histogram ({error}): collect it again") from error
        histogram._counts = counts
        return histogram

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassHistograms) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ClassHistograms(classes={self.classes}, pixels={int(self.pixels.sum())})"


def _refuse_large(file: BinaryIO) -> None:
    """A histogram may come from another vehicle: what would unpack to more than 254 classes is not read."""
    largest = 8 * BINS * (IGNORE - 1) + 4096
    with zipfile.ZipFile(file) as archive:
        told = sum(entry.file_size for entry in archive.infolist())
    if told > largest:
        raise ValueError(f"it would unpack to {told} bytes, {largest} at most")
    file.seek(0)


def check_portion(portion: float) -> None:
    """Raise ValueError unless 0 < portion <= 1."""
    if not isinstance(portion, (int, float, np.integer, np.floating)) or not 0.0 < portion <= 1.0:
        raise ValueError(f"portion {portion}: expected more than 0 and at most 1")


def _ranked(counts: np.ndarray, portion: float) -> float:
    """Lower edge of the bin of the value ranked floor(n·portion) from the top; 1.0 where that rank is 0."""
    rank = int(np.floor(counts.sum() * portion))
    if rank < 1:
        return 1.0
    from_top = np.cumsum(counts[::-1])
    bin_from_top = int(np.searchsorted(from_top, rank))
    # A confidence in bin 0 would give λ = 0 and divide by zero.  No softmax has one (max >= 1/C) but a prior
    # may make one; half a bin is then as good a bound as any.
    return max((BINS - 1 - bin_from_top) / BINS, 0.5 / BINS)


def self_paced(start: float, step: float, cap: float, rounds: int) -> tuple[float, ...]:
    """The portions of a self-paced schedule: p grows by `step` each round and stops at `cap`.

    The published code: start .2 (CBST-SP on GTA5 .15), step .05, cap .5; CRST trains three rounds.

    Raises:
        ValueError: start or cap no portion, cap under start, a step that is negative or no number.
    """
    check_portion(start)
    check_portion(cap)
    if not (0 <= step <= 1 and start <= cap and rounds >= 1):
        raise ValueError(
            f"portions from {start} by {step} to {cap} in {rounds} rounds: they rise from start to cap"
        )
    return tuple(round(min(start + step * i, cap), 10) for i in range(rounds))


def st_threshold(histograms: ClassHistograms, portion: float) -> np.ndarray:
    """ST as a vector: the one λ for every class, float64 [C], to be given to `pseudo_labels`."""
    return np.full(histograms.classes, histograms.threshold(portion))


# ----------------------------------------------------------------------------------- the pseudo-labels
def pseudo_labels(
    p: Any,
    lam: Any,
    prior: Any = None,
    allowed: Collection[int] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """ŷ = argmax_c p(c)/λ_c where the ratio reaches 1, otherwise 255.

    Args:
        p: softmax, float32 [C,H,W], NumPy array or torch tensor (any device).
        lam: λ_c [C], positive; used in float32.  ∞ switches a class off.
        prior: q_c(y,x) float32 [C,H,W] in 0..1 (CBST-SP), or None.
        allowed: classes that may appear in this frame (set of indices or bool [C]); others have λ = ∞.
        valid: bool [H,W], False = no label there.

    Returns:
        uint8 [H,W], 255 = no label.  The same for NumPy and torch input, bit for bit.

    Raises:
        ValueError: wrong shapes, λ not positive, NaN or values outside 0..1 in the map.
    """
    with np.errstate(over="ignore"):  # over float32's largest it is ∞, which switches the class off
        lam = np.asarray(_host(lam))
        if lam.dtype.kind not in "fiub":
            raise ValueError(f"λ is {lam.dtype}: expected real numbers, one a class")
        lam = lam.astype(np.float32)
    classes = lam.shape[0] if lam.ndim == 1 else -1
    if lam.ndim != 1:
        raise ValueError(f"λ has shape {lam.shape}: expected [C], one value a class")
    _check_classes(classes)
    _check_map(p, classes)
    if not bool((lam > 0).all()):
        raise ValueError(f"λ must be positive and no NaN, got {lam.tolist()}: was the histogram empty?")
    if prior is not None:
        check_prior(prior, p)
    mask, inside = allowed_mask(allowed, classes), valid_mask(valid, p)
    if _is_torch(p):
        labels: np.ndarray = _labels_torch(p, lam, prior, mask)
    else:
        labels = _labels_numpy(_numpy_map(p), lam, prior, mask)
    if inside is not None:
        labels[~inside] = IGNORE
    return labels


def _labels_numpy(p: np.ndarray, lam: np.ndarray, prior: Any, mask: np.ndarray | None) -> np.ndarray:
    fused = kernels()
    q = None if prior is None else _numpy_map(prior)
    if fused is not None:
        if not fused.in_range(p, _SLACK):
            raise _bad()
        out = np.empty(p.shape[1:], np.uint8)
        allowed = np.ones(p.shape[0], np.bool_) if mask is None else mask
        fused.label(p, lam, fused.EMPTY if q is None else q, allowed, out)
        return out
    if not bool(((p >= 0) & (p <= _SLACK)).all()):
        raise _bad()
    best = np.zeros(p.shape[1:], np.float32)
    out = np.full(p.shape[1:], IGNORE, np.uint8)
    for c in range(p.shape[0]):
        if mask is not None and not mask[c]:
            continue
        ratio = (p[c] if q is None else p[c] * q[c]) / lam[c]
        take = ratio > best
        best = np.where(take, ratio, best)
        out[take] = c
    out[best < 1] = IGNORE
    return out


def _labels_torch(p: Any, lam: np.ndarray, prior: Any, mask: np.ndarray | None) -> np.ndarray:
    import torch

    p = p.detach().to(torch.float32)
    if not bool(((p >= 0) & (p <= float(_SLACK))).all()):
        raise _bad()
    q = None if prior is None else _torch_like(prior, p)
    # λ as a tensor of the map's device: a division by a Python scalar may be turned into a product with the
    # reciprocal, which rounds differently.
    divisors = _torch_like(lam, p)
    best = torch.zeros(p.shape[1:], dtype=torch.float32, device=p.device)
    out = torch.full(p.shape[1:], IGNORE, dtype=torch.uint8, device=p.device)
    for c in range(p.shape[0]):
        if mask is not None and not mask[c]:
            continue
        value = p[c] if q is None else p[c] * q[c]
        ratio = value / divisors[c].expand_as(value).contiguous()
        take = ratio > best
        best = torch.where(take, ratio, best)
        out = torch.where(take, c, out)
    out[best < 1] = IGNORE
    labels: np.ndarray = out.cpu().numpy()
    return labels
