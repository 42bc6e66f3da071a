"""One decision of a gate, and how gates make it.  Shared by every gate; knows no network and no frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check", "as_dict", "at_least", "at_most", "drop_check", "rise_check"]


@dataclass(frozen=True)
class Check:
    """One decision: what was measured, the limit, and the reason in words."""

    name: str
    value: float
    limit: float
    passed: bool
    reason: str


def at_most(name: str, value: float, limit: float, reason: str) -> Check:
    """A check that passes if `value` <= `limit`."""
    return Check(name, round(float(value), 5), limit, bool(value <= limit), reason)


def at_least(name: str, value: float, limit: float, reason: str) -> Check:
    """A check that passes if `value` >= `limit`."""
    return Check(name, round(float(value), 5), limit, bool(value >= limit), reason)


def drop_check(
    name: str, before: float, after: float, limit: float, reason: str, *, percent: bool = False
) -> Check:
    """A check that passes if a score fell by `limit` at most; both values follow the reason.

    Args:
        percent: the reason shows the values times 100.
    """
    return at_most(name, before - after, limit, f"{reason} {_change(before, after, percent)}")


def rise_check(name: str, before: float, after: float, limit: float, reason: str) -> Check:
    """A check that passes if a value rose by `limit` at most; both values follow the reason."""
    return at_most(name, after - before, limit, f"{reason} {_change(before, after, False)}")


def _change(before: float, after: float, percent: bool) -> str:
    return f"{100 * before:.1f} -> {100 * after:.1f}" if percent else f"{before:.3f} -> {after:.3f}"


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """For a manifest: {"passed": …, "failed": [names], "checks": [...]}."""
    return {
        "passed": all(c.passed for c in checks),
        "failed": [c.name for c in checks if not c.passed],
        "checks": [asdict(c) for c in checks],
    }
