"""The manifest of a version: its canonical form, its digest and its checks.

Knows JSON and hashes; knows nothing of directories of versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from runtime.errors import Refused, Unjudged, of_the_machine
from runtime.repository import records

SCHEMA = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
LARGEST = 16 << 20  # bytes of a manifest
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REQUIRED: dict[str, type] = {
    "schema": int,
    "model": str,
    "version": int,
    "engine": dict,
    "files": dict,
    "digest": str,
}
#: Keys that may be absent or null, and have this type if they are present: readers rely on it.
_OPTIONAL: dict[str, type] = {
    **dict.fromkeys(("pack", "adaptation", "input"), dict),
    **dict.fromkeys(("classes", "colours", "edge_classes"), list),
}


def canonical(value: Any) -> bytes:
    """Returns the JSON text that hashes and signatures cover."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 (hex) of the manifest without its own "digest"."""
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "digest"})).hexdigest()


def check_name(model: str) -> str:
    """Returns `model` if it is a plain name that cannot leave the repository; else raises ValueError."""
    if not MODEL_NAME.fullmatch(model) or ".." in model:
        raise ValueError(
            f"model name {model[:80]!r}: use letters, digits, '.', '_', '-' (at most 128, no '..')"
        )
    return model


def checked(manifest: Any, model: str, version: int) -> dict[str, Any]:
    """Returns the manifest of a version.  Raises Refused("manifest", …) if it is not one of ours."""
    where = f"manifest.json of '{model}' version {version}"
    if not isinstance(manifest, dict):
        raise Refused("manifest", f"{where} is not an object")
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise Refused(
                "manifest", f"{where} has no '{key}' of type {kind.__name__}; it is foreign to Roadworthy"
            )
    for key, kind in _OPTIONAL.items():
        if manifest.get(key) is not None and not isinstance(manifest[key], kind):
            raise Refused("manifest", f"{where} has a '{key}' that is no {kind.__name__}; rebuild it")
    if manifest["schema"] != SCHEMA:
        raise Refused(
            "manifest", f"{where} has schema {manifest['schema']}, this server reads {SCHEMA}; rebuild it"
        )
    if manifest["model"] != model or manifest["version"] != version:
        raise Refused(
            "manifest",
            f"{where} is that of '{manifest['model']}' version {manifest['version']}; it was copied",
        )
    try:
        right = manifest["digest"] == digest(manifest)
    except ValueError:  # NaN or Infinity
        right = False
    if not right:
        raise Refused("manifest", f"{where} does not have its own digest; it was altered after publishing")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or "/" in name or name in ("", ".", ".."):
            raise Refused("manifest", f"{where} lists a file {name!r} that is not a plain name with its hash")
    file = manifest["engine"].get("file", "model.onnx")
    if not isinstance(file, str) or file not in manifest["files"]:
        raise Refused("manifest", f"{where} does not list its engine file '{file}'")
    return manifest


def read_listed(path: Path, name: str, size: Any) -> bytes:
    """Reads a file of exactly `size` bytes; refuses another size before reading.

    Raises Refused("hash", …).
    """
    try:
        opened = records.open_plain(path)
    except FileNotFoundError:
        raise Refused("hash", f"file '{name}' is missing") from None
    except OSError as error:
        kind = Unjudged if of_the_machine(error) else Refused
        raise kind("hash", f"file '{name}' cannot be read: {error.strerror}") from error
    with opened as file:
        there = os.fstat(file.fileno()).st_size
        if there != size:
            raise Refused("hash", f"file '{name}' has {there} bytes, the manifest says {size}")
        return file.read(there)
