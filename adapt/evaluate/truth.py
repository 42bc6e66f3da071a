"""A labelled set in the classes that are scored, and the way from a pack's answers to them.

One place decides it for every command that scores: whose classes the labels are, which protocol counts,
which table maps answers and which labels.  It names the frame whose label is not what the set claims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapt.data.base import DataError, Dataset
from adapt.evaluate.protocols import PROTOCOLS, set_space
from adapt.evaluate.segmentation import Confusion
from networks.labels import SPACES, mapping

__all__ = ["Plan", "Truth", "mean_iou", "plan", "training_plan"]


@dataclass(frozen=True)
class Plan:
    """answers, labels: uint8 [256] tables to the scored classes, or None where they are the same already.

    classes: of the table of scores; scored, averaged: of these, in their order; truth: whose classes the
    labels are, for words; held: how many classes the labels may hold.
    """

    answers: np.ndarray | None
    labels: np.ndarray | None
    classes: tuple[str, ...]
    scored: tuple[str, ...]
    averaged: tuple[str, ...]
    truth: str
    held: int


def plan(
    classes: tuple[str, ...],
    description: str,
    *,
    truth: str | None = None,
    protocol: str | None = None,
    who: str = "the pack",
) -> Plan:
    """How a pack of these classes is scored on the set a description names.

    Args:
        classes: the pack's.
        description: as of `adapt.data.open.open_dataset`.
        truth: a label space (`networks.labels.SPACES`) if the set's is not to be guessed from its kind.
        protocol: a key of `PROTOCOLS`, or None for all classes.
        who: name of the pack in messages.

    Raises:
        ValueError: an unknown space, or no way from the pack's classes to those of the set.
    """
    if truth and truth not in SPACES:
        raise ValueError(f"label space {truth!r} is unknown; known: {', '.join(sorted(SPACES))}")
    own = next((name for name, space in SPACES.items() if space.classes == classes), None)
    theirs = truth or set_space(description) or own
    rule = PROTOCOLS[protocol] if protocol else None
    goal = rule.space if rule else theirs
    if goal is None:
        return Plan(None, None, classes, classes, classes, who, len(classes))
    if own is None or theirs is None:
        raise ValueError(
            f"{who} has classes of no known label space: its answers cannot be mapped to {goal}; score it "
            "on a folder whose labels are its own, without label space and protocol"
        )
    answers, labels = mapping(own, goal), mapping(theirs, goal)
    names = SPACES[goal].classes
    if rule is None:
        return Plan(answers, labels, names, names, names, theirs, len(SPACES[theirs].classes))
    keep = rule.table()
    return Plan(
        keep[answers], keep[labels], names, rule.scored, rule.averaged, theirs, len(SPACES[theirs].classes)
    )


def training_plan(description: str, classes: tuple[str, ...], space: str | None) -> Plan:
    """How the labels of the set a description names become those of a network that is to learn `classes`.

    Args:
        classes: the network's.
        space: their label space (`networks.labels.SPACES`), or None for classes of no known space.

    Raises:
        ValueError: the set has classes of its own and there is no way from them to the network's.
    """
    theirs = set_space(description)
    if theirs is None or theirs == space or SPACES[theirs].classes == classes:
        return Plan(None, None, classes, classes, classes, space or f"--classes {len(classes)}", len(classes))
    held = len(SPACES[theirs].classes)
    if space is None:
        if held != len(classes):
            raise ValueError(
                f"{description} has the {held} classes of {theirs}, --classes says {len(classes)}: give "
                f"--classes {theirs}"
            )
        return Plan(None, None, classes, classes, classes, theirs, held)
    try:
        labels = mapping(theirs, space)
    except ValueError as error:
        raise ValueError(
            f"{description} has labels of {theirs}, --classes is {space}: {error}; give --classes {theirs}"
        ) from error
    return Plan(None, labels, classes, classes, classes, theirs, held)


def mean_iou(confusion: Confusion, how: Plan) -> float:
    """Mean IoU in 0..1 over the classes that are averaged and that the truth holds; NaN for none."""
    iou = confusion.iou()
    counted = [i for i, c in enumerate(how.classes) if c in how.averaged and confusion.matrix[i].any()]
    return float(iou[counted].mean()) if counted else float("nan")


class Truth:
    """A labelled set with its labels mapped as a plan says; `labelled` counts the labels that were read.

    Raises DataError on reading a label that holds a class its space does not have.
    """

    def __init__(self, dataset: Dataset, how: Plan) -> None:
        self.dataset, self.how, self.labelled = dataset, how, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame, label = self.dataset[i]
        if label is None:
            return frame, None
        known = label[label != 255]
        if known.size and int(known.max()) >= self.how.held:
            raise DataError(
                f"the label of {self.dataset.name(i)} holds class {int(known.max())}, {self.how.truth} has "
                f"{self.how.held} and 255 for none",
                "name the void value (--void N; --void 0 if classes count from 1), "
                "say what the labels are (--classes, --truth), or map them",
            )
        self.labelled += 1
        return frame, label if self.how.labels is None else self.how.labels[label]

    def name(self, i: int) -> str:
        return self.dataset.name(i)
