"""The engine repository: immutable versions, their manifests, signatures and the server's lock."""

from __future__ import annotations

from runtime.repository.repository import (
    HISTORY_BYTES,
    MANIFEST,
    SCHEMA,
    SIGNATURE,
    Repository,
    canonical,
    check_name,
    digest,
)

__all__ = [
    "HISTORY_BYTES",
    "MANIFEST",
    "SCHEMA",
    "SIGNATURE",
    "Repository",
    "canonical",
    "check_name",
    "digest",
]
