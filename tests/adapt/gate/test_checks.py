"""One decision of a gate: on which side of the limit it passes, and what it says."""

from __future__ import annotations

import pytest

from adapt.gate.checks import Check, as_dict, at_least, at_most, drop_check, rise_check


def test_a_limit_that_is_met_passes():
    assert at_most("a", 0.5, 0.5, "").passed
    assert not at_most("a", 0.500001, 0.5, "").passed, "what is decided is not the rounded value"
    assert at_most("a", 0.1234567, 0.5, "").value == 0.12346
    assert at_least("a", 0.5, 0.5, "").passed
    assert not at_least("a", 0.4, 0.5, "").passed


def test_what_is_not_known_never_passes():
    nan = float("nan")
    assert not at_most("a", nan, 0.5, "").passed
    assert not at_least("a", nan, 0.5, "").passed
    assert not drop_check("a", 0.5, nan, 0.5, "").passed


def test_drops_and_rises_are_signed_and_show_both_values():
    drop = drop_check("source", 0.6, 0.55, 0.03, "mIoU", percent=True)
    assert drop == Check("source", 0.05, 0.03, False, "mIoU 60.0 -> 55.0")
    assert drop_check("source", 0.5, 0.6, 0.03, "mIoU").passed
    rise = rise_check("confidence", 0.5, 0.65, 0.2, "mean confidence")
    assert rise == Check("confidence", 0.15, 0.2, True, "mean confidence 0.500 -> 0.650")


def test_a_verdict_names_what_failed():
    checks = [at_most("a", 0.0, 1.0, "fine"), at_least("b", 0.0, 1.0, "low")]
    verdict = as_dict(checks)
    assert (verdict["passed"], verdict["failed"]) == (False, ["b"])
    assert verdict["checks"][1] == {
        "name": "b",
        "value": 0.0,
        "limit": pytest.approx(1.0),
        "passed": False,
        "reason": "low",
    }
