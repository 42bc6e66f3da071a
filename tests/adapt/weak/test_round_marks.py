"""What a round would ask of its marks."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.gate.clicked import check_clicked
from adapt.round.weak import RoundMarks
from adapt.weak import Marks, Point

CLASSES = ("sky", "road", "car")


def test_marks_teach_or_judge_and_never_both() -> None:
    marks = [
        Marks(CLASSES, (960, 480), absent=("car",), points=(Point(100, 100, "sky"),), seconds=4.0),
        Marks(CLASSES, (960, 480), points=(Point(500, 300, "road"), Point(2, 2, "sky"))),
        None,
        Marks(CLASSES, (960, 480), points=(Point(9, 9, "car", "detector:x", 0.1),)),
        Marks(CLASSES, (960, 480)),
    ]
    found = RoundMarks.of(marks, CLASSES, (240, 480), [1])
    assert [m is None for m in found.teach] == [False, True, False, True]
    assert found.judge[0] is not None
    assert (found.judge[0].points[0].x, found.judge[0].points[0].y) == (250, 150)
    assert found.teach[2] is not None
    assert found.teach[2].points == ()  # not sure enough
    assert found.allowed(0, None) == [0, 1]
    assert found.allowed(0, [1, 2]) == [1]
    assert found.allowed(1, [1, 2]) == [1, 2]
    assert found.allowed(1, None) is None
    valid = np.ones((240, 480), bool)
    valid[:50] = False
    counted = found.counted(0, valid)
    assert counted is not None
    assert not counted[50, 50]
    assert counted[60, 60]
    assert found.counted(1, valid) is valid
    p = np.full((3, 240, 480), 1 / 3, np.float32)
    labels, anchored = found.constrained(0, np.full((240, 480), 2, np.uint8), p, valid)
    assert labels[50, 50] == 0
    assert labels[49, 50] == 255
    assert labels[60, 60] == 255  # the car is absent
    assert anchored.sum() == ((np.hypot(*np.mgrid[-3:4, -3:4]) <= 3) & (np.arange(-3, 4) >= 0)[:, None]).sum()
    answer = np.ones((240, 480), np.uint8)
    clicks = found.clicked([answer])
    assert clicks.right.tolist() == [True, False]
    assert check_clicked(clicks, clicks).passed
    told = found.record()
    assert (told["teach"], told["judge"], told["seconds"]) == (2, 1, 4.0)
    assert found.identity()[0] == found.digest != ""
    with pytest.raises(ValueError, match="read them with these classes"):
        RoundMarks.of(marks, CLASSES[::-1], (240, 480), [])


def test_without_marks_nothing_changes() -> None:
    found = RoundMarks.of([None] * 3 + [Marks(CLASSES, (4, 4))], CLASSES, (4, 4), [1])
    assert not found
    assert found.identity() == []
    assert found.record() == {}
    y = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    labels, anchored = found.constrained(0, y, np.zeros((3, 4, 4), np.float32))
    assert np.array_equal(labels, y)
    assert not anchored.any()
