"""Accuracy at clicked pixels, with its confidence interval: `python -m adapt.evaluate --marks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapt import inference
from adapt.data.base import DataError, Dataset
from adapt.evaluate.clicks import Clicks, clicked_right, wilson
from adapt.weak.marks import WeakLabels

__all__ = ["accuracy", "answered", "table"]


def answered(network: Any, spec: Any, dataset: Dataset, labels: WeakLabels) -> Clicks:
    """The clicks of the frames that have marks, answered by a network.

    Raises:
        DataError: no frame of the set has a clicked pixel.
        WeakError: a key of the marks is no frame, or two.
    """
    names = [dataset.name(i) for i in range(len(dataset))]
    # A set may call a frame by its path in the set; marks call it by its stem.
    keys = [tuple(dict.fromkeys((n, Path(n).name, Path(n).stem))) for n in names]
    marks = labels.of(keys, every=True)
    answers, used = [], []
    for i, mark in enumerate(marks):
        if mark is None or not mark.points:
            continue
        frame = dataset[i][0]
        labels.check_sizes(dict.fromkeys(keys[i], (frame.shape[1], frame.shape[0])))
        answers.append(inference.labels_and_confidence(network, spec, inference.as_tensor([frame]))[0][0])
        used.append(mark)
    clicks = clicked_right(answers, used)
    if not len(clicks.right):
        raise DataError("no frame of the set has a clicked pixel: mark some with python -m adapt.mark")
    return clicks


def accuracy(clicks: Clicks, classes: Sequence[str]) -> dict[str, Any]:
    """As plain numbers: clicks, right, accuracy, its 95 % interval (Wilson), and the same per class."""

    def one(right: int, total: int) -> dict[str, Any]:
        low, high = wilson(right, total)
        return {"clicks": total, "right": right, "accuracy": right / total, "interval": [low, high]}

    per = {}
    for c, name in enumerate(classes):
        mine = clicks.truth == c
        if mine.any():
            per[name] = one(int(clicks.right[mine].sum()), int(mine.sum()))
    return {**one(int(clicks.right.sum()), len(clicks.right)), "classes": per}


def table(scores: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: a row per pack, then its classes; per cent."""

    def row(name: str, s: dict[str, Any]) -> str:
        low, high = s["interval"]
        return (
            f"| {name} | {s['right']} of {s['clicks']} | {100 * s['accuracy']:.1f} "
            f"| {100 * low:.1f} to {100 * high:.1f} |"
        )

    lines = ["| | right | accuracy % | 95 % interval |", "|---|---|---|---|"]
    for name, score in scores:
        lines.append(row(f"**{name}**", score))
        lines += [row(c, s) for c, s in score["classes"].items()]
    return "\n".join(lines) + "\n"
