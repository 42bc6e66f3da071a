"""The engine repository: immutable versions, their manifests, signatures and the server's lock."""

from __future__ import annotations

from runtime.repository.manifest import MANIFEST, SCHEMA, SIGNATURE, canonical, check_name, digest
from runtime.repository.repository import HISTORY_BYTES, Repository

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
