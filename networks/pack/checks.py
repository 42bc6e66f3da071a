"""Read the files of a model pack, and refuse those that are damaged or do not fit each other.

Each check raises `PackError`.  This module knows the files of a pack; it does not write them.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.text import one_line
from networks.images import ImageError, read_image
from networks.pack.spec import PackError

__all__ = [
    "SPLITS",
    "check_arrays",
    "check_golden",
    "check_replay",
    "check_state",
    "check_weights",
    "read_arrays",
    "read_frame",
    "read_index",
    "read_text",
    "tree_hash",
]

SPLITS = ("train", "holdout")
#: Bytes of model.toml and of replay/index.json, and of what prior.npz and reference.npz unpack to, at most.
MAX_TEXT_BYTES, MAX_ARRAY_BYTES = 16 << 20, 256 << 20


def check_state(state: Mapping[str, Tensor], network: torch.nn.Module) -> None:
    """Refuse weights that are not exactly the network's, or are not finite.  Raises PackError."""
    _compare({name: (tuple(t.shape), t.dtype) for name, t in state.items()}, network)
    for name, tensor in state.items():
        _check_finite(name, tensor)


def _compare(found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], network: torch.nn.Module) -> None:
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in network.state_dict().items()}
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise PackError(f"weights lack {_some(missing)}; is the network or one of its arguments another?")
    if extra:
        raise PackError(f"weights hold {_some(extra)} that the network lacks; is an argument another?")
    for name, (shape, dtype) in wanted.items():
        if found[name][0] != shape:
            raise PackError(
                f"weight {name!r} has shape {list(found[name][0])}, the network wants {list(shape)}; "
                "check the number of classes and the network's arguments"
            )
        if found[name][1] != dtype:
            raise PackError(f"weight {name!r} has type {found[name][1]}, the network wants {dtype}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise PackError(f"weight {name!r} holds NaN or infinite values; train again")


def check_weights(file: Path, network: torch.nn.Module) -> None:
    """Read a weights file and check its content as `check_state` does.  Raises PackError."""
    if not file.is_file():
        raise PackError("has no weights.safetensors")
    try:
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            tensors = {name: weights.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise PackError(
            f"weights.safetensors cannot be read (truncated or damaged): {one_line(error)}"
        ) from error
    check_state(tensors, network)


def check_golden(folder: Path, multiple: int) -> None:
    """Refuse golden frames of several sizes, or of sides that are no multiple.  Raises PackError."""
    shapes = set()
    for file in sorted(folder.glob("*.png")):
        shapes.add(read_frame(file).shape)
    if len(shapes) > 1:
        raise PackError(f"golden frames differ in size: {sorted(shapes)}")
    for h, w, _ in shapes:
        if h % multiple or w % multiple:
            raise PackError(f"golden frames are {h}x{w}, not a multiple of {multiple}")


def check_replay(folder: Path) -> None:
    """Refuse a replay set that lacks a file of its index.  Raises PackError."""
    for entry in read_index(folder):
        for key in ("frame", "label"):
            if not (folder / entry[key]).is_file():
                raise PackError(f"replay file {entry[key]!r} is missing")


def check_arrays(folder: Path, classes: int) -> None:
    """Refuse priors and source statistics that are not of this many classes.  Raises PackError."""
    try:
        prior = read_arrays(folder / "prior.npz").get("prior")
        reference = read_arrays(folder / "reference.npz")
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        # numpy takes what is no archive for a pickle and offers to load it unsafely: not passed on.
        reason = "it is no archive of arrays" if "pickle" in str(error) else one_line(error)
        raise PackError(f"prior.npz or reference.npz cannot be read: {reason}") from error
    if prior is not None and (prior.ndim != 3 or prior.shape[0] != classes):
        raise PackError(f"prior.npz has shape {list(prior.shape)}, wanted [{classes}, h, w]")
    for name, array in reference.items():
        if array.ndim == 0 or array.shape[0] != classes:
            raise PackError(f"reference.npz: {name!r} has shape {list(array.shape)}, wanted {classes} rows")


def read_text(file: Path) -> str:
    """Read a text of the pack.  Raises PackError if it is not a plain file or too large."""
    if not file.is_file():
        raise PackError(f"{file.name} is no plain file")
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise PackError(f"{file.name} has more than {MAX_TEXT_BYTES >> 20} MiB; write it again")
    return file.read_text(encoding="utf-8")


def read_index(folder: Path) -> list[dict[str, str]]:
    """Read the index of a replay set; empty if there is none.  Raises PackError."""
    file = folder / "index.json"
    if not file.exists():
        return []
    try:
        entries = json.loads(read_text(file))
    except PackError:
        raise
    except (ValueError, RecursionError) as error:
        raise PackError(f"replay/index.json is not JSON: {one_line(error)}") from error
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(k), str) for k in ("frame", "label", "split")
        ):
            raise PackError("replay/index.json must be a list of {frame, label, split}")
        if entry["split"] not in SPLITS:
            raise PackError(
                f"replay/index.json: split {entry['split']!r} is unknown; known: {', '.join(SPLITS)}"
            )
        for key in ("frame", "label"):
            # A pack comes from somewhere else: it may not name files outside itself.
            if Path(entry[key]).is_absolute() or ".." in Path(entry[key]).parts:
                raise PackError(f"replay/index.json names {entry[key]!r}, outside the pack")
    return list(entries)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read an .npz of a pack.

    Returns:
        The arrays by name; empty if there is no such file.
    Raises:
        PackError: the arrays unpack to more than `MAX_ARRAY_BYTES`.
    """
    if not file.exists():
        return {}
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_ARRAY_BYTES:
            raise PackError(f"{file.name} unpacks to more than {MAX_ARRAY_BYTES >> 20} MiB; write it again")
    with np.load(file, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def read_frame(file: Path) -> np.ndarray:
    """Read a picture: uint8 [H,W,3] RGB.  Raises PackError."""
    try:
        return read_image(file)
    except ImageError as error:
        raise PackError(str(error)) from error


def tree_hash(folder: Path) -> str:
    """Return the SHA-256 over the sorted list of (relative path, SHA-256 of the file)."""
    total = hashlib.sha256()
    for file in sorted(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.relative_to(folder).as_posix()
    ):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
