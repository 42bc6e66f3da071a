"""The model pack: the directory that a training run hands over and that adaptation refreshes.

    model.toml            name, version, task, network, classes, colours, size, normalisation, parent, ...
    weights.safetensors   the state_dict, names unchanged (never pickle)
    golden/*.png          frames that an engine is compared on
    replay/               a small labelled source set: index.json, frames/, labels/       (optional)
    prior.npz             q_c(y,x), spatial prior of the source labels: float16 [C,h,w]   (optional)
    reference.npz         source statistics: share [C], confidence histograms [C,256]     (optional)

A pack is written under a temporary name beside its destination and appears by one rename, so a reader never
finds a half-written one.  Its hash covers every file.  This module knows networks and files; it knows nothing
of engines or of training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import sync, sync_tree
from common.text import one_line
from networks.base import SegmentationNetwork
from networks.pack.checks import (
    SPLITS,
    check_arrays,
    check_golden,
    check_replay,
    check_state,
    check_weights,
    read_arrays,
    read_frame,
    read_index,
    read_text,
    tree_hash,
)
from networks.pack.spec import PackError, PackSpec

__all__ = ["Pack", "load_pack", "normalise", "write_pack"]


class Pack:
    """A pack on disk that has been checked; `load_pack` and `write_pack` make it."""

    def __init__(self, path: Path, spec: PackSpec, sha256: str) -> None:
        self.path = path
        self.spec = spec
        self.sha256 = sha256

    def __repr__(self) -> str:
        return f"Pack({self.spec.name} {self.spec.version}, {self.sha256[:12]}, {str(self.path)!r})"

    def state(self) -> dict[str, Tensor]:
        """The weights: state_dict names to tensors on the CPU."""
        with safe_open(self.path / "weights.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def network(self) -> SegmentationNetwork:
        """The network with these weights, in evaluation mode."""
        network = self.spec.create()
        network.load_state_dict(self.state(), strict=True)
        return network.eval()

    def golden(self) -> np.ndarray:
        """uint8 [n,H,W,3] RGB in file-name order; n may be 0."""
        files = sorted((self.path / "golden").glob("*.png"))
        frames = [read_frame(file) for file in files]
        if not frames:
            return np.zeros((0, *self.spec.size, 3), np.uint8)
        return np.stack(frames)

    def replay(self, split: str | None = None) -> list[tuple[Path, Path]]:
        """(frame file, label file) of the replay set; `split` is "train", "holdout" or None for both."""
        if split is not None and split not in SPLITS:
            raise PackError(f"replay split {split!r} is unknown; known: {', '.join(SPLITS)}")
        folder = self.path / "replay"
        return [
            (folder / entry["frame"], folder / entry["label"])
            for entry in read_index(folder)
            if split in (None, entry["split"])
        ]

    def prior(self) -> np.ndarray | None:
        """float16 [C,h,w] spatial prior of the source labels, or None."""
        return read_arrays(self.path / "prior.npz").get("prior")

    def reference(self) -> dict[str, np.ndarray]:
        """Source statistics by name; empty if the pack has none."""
        return read_arrays(self.path / "reference.npz")


def normalise(frames: Tensor, spec: PackSpec) -> Tensor:
    """Pre-process frames: uint8 [N,H,W,3] RGB -> float32 [N,3,H,W] in the pack's channel order.

    Training, evaluation and the exported graph all use this definition.  It is one multiplication and one
    addition per channel, because an engine folds and fuses that best.
    """
    x = frames.to(torch.float32).permute(0, 3, 1, 2)
    if spec.channel_order == "bgr":
        x = x[:, [2, 1, 0]]
    scale = torch.tensor([1.0 / (255.0 * s) for s in spec.std], dtype=torch.float32, device=frames.device)
    offset = torch.tensor(
        [-m / s for m, s in zip(spec.mean, spec.std, strict=True)], dtype=torch.float32, device=frames.device
    )
    return x * scale.view(1, 3, 1, 1) + offset.view(1, 3, 1, 1)


def load_pack(path: str | os.PathLike[str], *, sha256: str | None = None) -> Pack:
    """Open a pack and check everything that can be checked without running it.

    Args:
        path: the pack's directory.
        sha256: the hash that the pack must have, or None.
    Raises:
        PackError: absent or malformed files, weights that miss, exceed or do not fit the network, values
            that are not finite, a hash that differs.
    """
    folder = Path(path)
    try:
        return _load(folder, sha256)
    except PackError as error:
        raise PackError(f"pack {str(folder)!r}: {error}") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PackError(f"pack {str(folder)!r} cannot be read: {error.strerror or error}{where}") from error


def _load(folder: Path, expected: str | None) -> Pack:
    if not folder.is_dir():
        raise PackError("is not a directory; give the directory that holds model.toml")
    if not (folder / "model.toml").is_file():
        raise PackError("has no model.toml; give the directory that holds it")
    try:
        spec = PackSpec.from_toml(read_text(folder / "model.toml"))
    except UnicodeDecodeError as error:
        raise PackError("model.toml is not UTF-8") from error
    with torch.device("meta"):
        network = spec.create()
    check_weights(folder / "weights.safetensors", network)
    check_golden(folder / "golden", network.size_multiple)
    check_replay(folder / "replay")
    pack = Pack(folder, spec, tree_hash(folder))
    check_arrays(folder, len(spec.classes))
    if expected is not None and pack.sha256 != expected:
        raise PackError(
            f"hash is {pack.sha256[:12]}, expected {expected[:12]}: it was altered or is another pack"
        )
    return pack


def write_pack(
    path: str | os.PathLike[str],
    spec: PackSpec,
    state: Mapping[str, Tensor],
    *,
    golden: np.ndarray | None = None,
    replay: Iterable[tuple[np.ndarray, np.ndarray, str]] | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
    prior: np.ndarray | None = None,
) -> Pack:
    """Write a pack; it appears completely or not at all.

    Args:
        path: a directory that does not exist yet.
        state: the network's state_dict.
        golden: uint8 [n,H,W,3] RGB frames for the parity report.
        replay: (frame uint8 [H,W,3], label uint8 [H,W] with 255 = ignore, "train" or "holdout"); may be lazy.
        reference: source statistics by name, each with one row per class.
        prior: [C,h,w] spatial prior.
    Raises:
        PackError: the destination exists, cannot be written, or the content is not a valid pack.
    """
    target = Path(path)
    staging = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    if target.exists():
        raise PackError(
            f"pack {str(target)!r} exists already; packs are never overwritten, choose another path"
        )
    try:
        with torch.device("meta"):
            network = spec.create()
        check_state(state, network)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        staging.mkdir()
        _write_files(staging, spec, state, golden, replay, reference, prior)
        pack = _load(staging, None)
        sync_tree(staging)
        if target.exists():
            raise PackError("exists already; packs are never overwritten, choose another path")
        os.rename(staging, target)
        sync(target.parent)
    except PackError as error:
        raise PackError(f"pack {str(target)!r}: {error}") from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise PackError(f"pack {str(target)!r} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Pack(target, spec, pack.sha256)


def _sweep(target: Path) -> None:
    """Remove what killed writers of the same pack left behind an hour ago or earlier."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        with contextlib.suppress(FileNotFoundError):  # another writer may be sweeping too
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)


def _write_files(
    folder: Path,
    spec: PackSpec,
    state: Mapping[str, Tensor],
    golden: np.ndarray | None,
    replay: Iterable[tuple[np.ndarray, np.ndarray, str]] | None,
    reference: Mapping[str, np.ndarray] | None,
    prior: np.ndarray | None,
) -> None:
    (folder / "model.toml").write_text(spec.to_toml(), encoding="utf-8")
    # Clones: safetensors refuses tensors that share memory, and views would drag their base along.
    save_file(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()},
        folder / "weights.safetensors",
    )
    if golden is not None and len(golden):
        (folder / "golden").mkdir()
        for i, frame in enumerate(golden):
            _write_png(folder / "golden" / f"{i:04d}.png", frame, 3)
    if replay is not None:
        _write_replay(folder / "replay", replay, len(spec.classes))
    if reference:
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in reference.items()}
        np.savez_compressed(folder / "reference.npz", **arrays)
    if prior is not None:
        np.savez_compressed(folder / "prior.npz", prior=np.asarray(prior, np.float16))


def _write_replay(folder: Path, replay: Iterable[tuple[np.ndarray, np.ndarray, str]], classes: int) -> None:
    (folder / "frames").mkdir(parents=True)
    (folder / "labels").mkdir()
    index = []
    for i, (frame, label, split) in enumerate(replay):
        if frame.shape[:2] != label.shape:
            raise PackError(f"replay frame {i} is {frame.shape[:2]}, its label {label.shape}")
        stray = label[(label != 255) & (label >= classes)]
        if stray.size:
            raise PackError(f"replay label {i} holds class {int(stray[0])}, the pack has {classes} classes")
        entry = {"frame": f"frames/{i:04d}.png", "label": f"labels/{i:04d}.png", "split": split}
        _write_png(folder / entry["frame"], frame, 3)
        _write_png(folder / entry["label"], label, 1)
        index.append(entry)
    text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in index) + "\n]\n"
    (folder / "index.json").write_text(text, encoding="utf-8")


def _write_png(file: Path, image: np.ndarray, channels: int) -> None:
    shape_ok = image.ndim == (3 if channels == 3 else 2) and (channels == 1 or image.shape[-1] == 3)
    if image.dtype != np.uint8 or not shape_ok:
        raise PackError(
            f"{file.parent.name} image must be uint8 [H,W{',3' if channels == 3 else ''}], "
            f"not {image.dtype} {list(image.shape)}"
        )
    Image.fromarray(np.ascontiguousarray(image)).save(file)
