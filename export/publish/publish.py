"""A finished engine becomes a version: its files, its manifest, its Triton configuration, all or nothing.

Knows the repository and packs; nothing of graphs or of how an engine came about.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.text import one_line
from export.errors import ExportError
from networks.pack import Pack
from runtime.errors import Refused
from runtime.repository.manifest import check_name
from runtime.repository.repository import Repository

LIBRARIES = ("roadworthy", "torch", "onnx", "onnxruntime", "numpy")
#: Source statistics that the pack may have: a version brings them, so that a server can watch for drift.
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Published:
    """A version that now exists."""

    model: str
    version: int
    path: Path
    manifest: dict[str, Any]


def model_name(name: str) -> str:
    """Return the name if a repository may have a model of it.  Raises ExportError."""
    try:
        return check_name(name)
    except ValueError as error:
        raise ExportError(str(error)) from error


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that took part, for the manifest."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    return versions


def from_pack(
    pack: Pack,
    *,
    engine: dict[str, Any],
    parity: dict[str, Any],
    adaptation: dict[str, Any] | None,
    gate: dict[str, Any] | None,
    seconds: float,
    seconds_of: dict[str, float],
) -> dict[str, Any]:
    """Return the manifest entries of an engine made from a pack; `adaptation` None: that of the pack."""
    spec = pack.spec
    return {
        "engine": engine,
        "pack": {"name": spec.name, "version": spec.version, "sha256": pack.sha256, "parent": spec.parent},
        "adaptation": adaptation if adaptation is not None else spec.adaptation,
        "gate": gate or {},
        "parity": parity,
        "libraries": libraries(),
        "build_seconds": round(seconds, 3),
        "seconds": {stage: round(spent, 3) for stage, spent in seconds_of.items()},
    }


def reference_file(pack: Pack, classes: Sequence[str]) -> dict[str, bytes]:
    """The pack's source statistics as a file of the version; empty where it has none of these classes."""
    file = pack.path / REFERENCE
    if not file.is_file() or tuple(classes) != pack.spec.classes:
        return {}
    return {REFERENCE: file.read_bytes()}


def publish(
    repository: Path | str | Repository,
    model: str,
    files: dict[str, bytes],
    manifest: dict[str, Any],
    config: str,
    labels: Sequence[str] | None,
) -> Published:
    """Write the files and publish the version.  Raises ExportError and then leaves nothing behind."""
    try:
        home = repository if isinstance(repository, Repository) else Repository(repository)
        home.sweep()  # what builds that were killed left behind
        with _staged(home, model) as staged:
            for name, content in files.items():
                (staged / name).write_bytes(content)
            version = home.publish(model, staged, manifest, config, list(labels) if labels else None)
        return Published(model, version, home.directory(model, version), home.manifest(model, version))
    except OSError as error:
        where = error.filename or getattr(repository, "path", repository)
        blocked = isinstance(error, FileExistsError)
        why = "it is no directory, or another file is in its place" if blocked else error.strerror or error
        what = f"repository {str(where)!r} cannot be written"
        raise ExportError(f"{what}: {why}; nothing was published") from error
    except (ValueError, Refused) as error:
        raise ExportError(f"model {model!r} cannot be published: {one_line(error)}") from error


@contextmanager
def _staged(home: Repository, model: str) -> Iterator[Path]:
    staged = home.stage(model)
    try:
        yield staged
    except BaseException:
        home.abandon(staged)
        raise
