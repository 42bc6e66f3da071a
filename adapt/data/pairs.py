"""A data set that was read once and found good: every bad pair is known before any work begins.

Frames are read again when they are asked for; as many as fit in a bounded cache stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from adapt.data.base import DataError, Dataset, digest
from adapt.data.reading import Problem
from common.progress import Progress

__all__ = ["CACHE_MB", "Cached", "Pairs", "examine", "listed"]

CACHE_MB = 1024  # MiB of decoded frames and labels that stay in memory
SHOWN = 10  # names in a message; sets may have thousands
MOSTLY_VOID = 0.5  # share of void pixels that is worth a word

Pair = tuple[np.ndarray, np.ndarray | None]


class Cached(Sequence[Any]):
    """Items of a reader: what fits in `cache_mb` MiB stays, the rest is read again each time.

    Nothing is thrown out: under a random order over more than fits, that keeps as large a share of hits as
    any rule.  An item is a tuple of arrays and whatever else; the arrays' bytes are counted.

    Args:
        read: (index) -> item.
        indices: the reader's indices of the items, in order.
    """

    def __init__(
        self, read: Callable[[int], Any], indices: Iterable[int], cache_mb: float = CACHE_MB
    ) -> None:
        self._read, self.indices = read, list(indices)
        self._room = int(cache_mb * 2**20)
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.fetch(self.indices[i])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def fetch(self, index: int) -> Any:
        """The item of one of the reader's indices."""
        item = self._kept.get(index)
        if item is None:
            item = self._read(index)
            size = sum(part.nbytes for part in item if isinstance(part, np.ndarray))
            if size <= self._room:
                self._room -= size
                self._kept[index] = item
        return item

    def forget(self, index: int) -> None:
        """Give back what an item takes."""
        item = self._kept.pop(index, None)
        if item is not None:
            self._room += sum(part.nbytes for part in item if isinstance(part, np.ndarray))


class Pairs(Cached):
    """The good pairs of a data set; made by `examine`.

    Attributes:
        dataset: the set they are of.
        left_out: bad pairs, (name, reason).
        unlabelled: names of frames without label.
        digests: SHA-256 of each frame, in order; empty if they were not asked for.
        counts: int64 [256], how many pixels of all labels have each value.
        notes: what a person should know of the set, a line each.
    """

    def __init__(self, dataset: Dataset, cache_mb: float) -> None:
        super().__init__(lambda i: _whole(dataset[i]), (), cache_mb)
        self.dataset = dataset
        self.left_out: list[Problem] = []
        self.unlabelled: list[str] = []
        self.digests: list[bytes] = []
        self.counts = np.zeros(256, np.int64)
        self.notes: list[str] = []

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])

    def plain(self) -> list[dict[str, str]]:
        """What was left out, as JSON has it."""
        return [{"name": name, "reason": reason} for name, reason in self.left_out]


def _whole(pair: Pair) -> Pair:
    frame, label = pair
    return np.ascontiguousarray(frame), None if label is None else np.ascontiguousarray(label)


def examine(
    dataset: Dataset,
    *,
    what: str,
    skip_bad: bool = False,
    labelled: bool = True,
    classes: Sequence[str] = (),
    digests: bool = False,
    each: Callable[[np.ndarray], None] | None = None,
    progress: Progress | None = None,
    cache_mb: float = CACHE_MB,
    stage: str = "read",
) -> Pairs:
    """Read every pair of a set once.

    Args:
        dataset: its problems (frames without label, labels without frame) count as bad pairs.
        what: what to call it, such as "folder:data/x".
        skip_bad: leave bad pairs out and note them, in place of a DataError that lists them.
        labelled: True keeps labelled frames alone and wants at least one pixel of a class; False keeps all.
        classes: names of the classes, for the notes.
        digests: note the SHA-256 of each frame.
        each: called with each label that is kept, uint8 [H,W].

    Raises:
        DataError: bad pairs, no good one, no labelled frame, or labels that are void alone.
    """
    pairs = Pairs(dataset, cache_mb)
    source = _source(dataset)
    pairs.left_out += list(getattr(source, "problems", ()))
    remedies = [source.hint] if pairs.left_out else []
    blank: list[str] = []
    for i in range(len(dataset)):
        name = dataset.name(i)
        try:
            frame, label = pairs.fetch(i)
        except DataError as error:
            pairs.left_out.append((name, error.reason))
            if error.remedy and error.remedy not in remedies:
                remedies.append(error.remedy)
            label = None
        else:
            if label is None:
                pairs.unlabelled.append(name)
            if label is not None or not labelled:
                pairs.indices.append(i)
                if digests:
                    pairs.digests.append(digest(_One(frame), 0))
            else:
                pairs.forget(i)
        if label is not None:
            counts = np.bincount(label.reshape(-1), minlength=256)
            if not counts[:255].any():
                blank.append(name)
            pairs.counts += counts
            if each is not None:
                each(label)
        if progress is not None:
            progress(stage, i + 1, len(dataset))
    if pairs.left_out and not skip_bad:
        count = f"{len(pairs.left_out)} bad {'pair' if len(pairs.left_out) == 1 else 'pairs'}"
        remedy = "; ".join([*remedies, "mend them, or leave them out (--skip-bad)"])
        raise DataError(f"{what} has {count}: {listed(pairs.left_out)}", remedy)
    if pairs.left_out and not len(pairs):
        raise DataError(f"{what} has no good pair left: {listed(pairs.left_out)}")
    _judge(pairs, what, labelled, classes, blank, source)
    return pairs


def _judge(
    pairs: Pairs, what: str, labelled: bool, classes: Sequence[str], blank: list[str], source: Any
) -> None:
    """Refuse a set that teaches nothing; note what looks odd."""
    real = int(pairs.counts[:255].sum())
    total = int(pairs.counts.sum())
    if labelled and not len(pairs):
        raise DataError(f"{what} holds no labelled frame: give a set with labels")
    if labelled and not real:
        raise DataError(
            f"{what}: every pixel of all {len(pairs)} labels is void (255)",
            "give labels with classes: there is nothing to learn or to score",
        )
    if pairs.left_out:
        pairs.notes.append(f"{what}: {len(pairs.left_out)} bad pairs left out: {listed(pairs.left_out)}")
    if labelled and pairs.unlabelled:
        every = len(pairs.unlabelled) + len(pairs)
        pairs.notes.append(
            f"{what}: {len(pairs.unlabelled)} of {every} frames have no label and are not used: "
            f"{listed(pairs.unlabelled)}"
        )
    if not total:
        return
    doubts = source.doubts() if hasattr(source, "doubts") else []
    pairs.notes += doubts
    if real < (1 - MOSTLY_VOID) * total:
        pairs.notes.append(f"{what}: {100 * (1 - real / total):.0f} % of the pixels are void (255)")
    if blank:
        pairs.notes.append(f"{what}: {len(blank)} labels are void alone: {listed(blank)}")
    present = np.flatnonzero(pairs.counts[:255])
    if len(classes) > 1 and present.size == 1:
        only = classes[int(present[0])] if present[0] < len(classes) else str(int(present[0]))
        pairs.notes.append(f"{what}: every pixel that is not void is of one class, {only}: are these masks?")


class _One:
    """One frame as a data set."""

    def __init__(self, frame: np.ndarray) -> None:
        self._frame = frame

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Pair:
        return self._frame, None

    def name(self, i: int) -> str:
        return "0"


def _source(dataset: Any) -> Any:
    """The set under all that maps, resizes and chooses."""
    while not hasattr(dataset, "problems") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def listed(problems: Sequence[Problem] | Sequence[str]) -> str:
    """Names (and reasons) in a line, at most ten of them."""
    shown = [p if isinstance(p, str) else _words(*p) for p in problems]
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return "; ".join(shown[:SHOWN]) + more


def _words(name: str, reason: str) -> str:
    named = any(part in reason for part in (f"/{name}.", f" {name}.", f"of {name} "))
    return reason if named else f"{name}: {reason}"
