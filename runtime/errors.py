"""The two ways in which this package says no.

`ServiceError` answers a call; `Refused` answers a version.  Neither knows gRPC: the
codes are gRPC's names as plain strings, and the edge translates them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """Status names, spelt as gRPC spells them."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"


class ServiceError(Exception):
    """A call that is refused or has failed.

    `reason` is one short word from a closed set; it labels the account
    (accepted = answered + rejected(reason)) and the metrics.
    """

    def __init__(self, code: Code, message: str, reason: str = "invalid") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason


class Refused(Exception):
    """A version that may not be served: the check that refused it and why."""

    def __init__(self, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        super().__init__(f"{check}: {reason}")
        self.check = check
        self.reason = reason
        self.detail = detail or {}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""
