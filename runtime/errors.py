"""Exceptions: `ServiceError` (a failed request) and `Refused` (a rejected version).

Neither knows gRPC: the codes are gRPC's names as plain strings, and `runtime/rpc` translates them.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import Any

_MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EIO,
    errno.EINTR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EBUSY,
    errno.ENODEV,
}


#: Parts of messages by which libraries report that the machine has too little, or that they are too old.
_WORDS = (
    *("bad_alloc", "bad allocation", "Failed to allocate", "out of memory", "OUT_OF_MEMORY"),
    *("pthread_create", "start new thread", "Resource temporarily unavailable"),
    *("Too many open files", "No space left on device", "Unsupported model IR version"),
    "is under development and support for this is limited",
    # An operator that another release, or a build of the library with more in it, has.
    *("NOT_IMPLEMENTED", "No Op registered for", "is not a registered function/op"),
)


def of_the_machine(error: BaseException) -> bool:
    """True if an error is a fault of the machine, not of what was read or loaded: a permission, a limit,
    memory, a disk, or a library that is not installed.
    """
    if isinstance(error, OSError):
        return error.errno in _MACHINE
    if isinstance(error, MemoryError | ImportError):
        return True
    return isinstance(error, Exception) and any(words in str(error) for words in _WORDS)


def _unicode(text: str) -> str:
    """Returns text that files and messages can contain: file names may have bytes that are not Unicode."""
    return text.encode(errors="replace").decode()


class Code(StrEnum):
    """Status names, as in gRPC."""

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
        message = _unicode(message)
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason


class Refused(Exception):
    """A version that may not be served: the check that refused it and why."""

    def __init__(self, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        reason = _unicode(reason)
        super().__init__(f"{check}: {reason}")
        self.check = check
        self.reason = reason
        self.detail = detail or {}


class Unjudged(Refused):
    """A version that may not be served here and now, by no fault of its own: a library is missing, the server
    or the machine has a limit.  Its line in a history says so ({"judged": false}), and is no verdict.
    """

    def __init__(self, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        super().__init__(check, reason, {**(detail or {}), "judged": False})


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""
