"""The model pack: the directory that a training run hands over and that adaptation refreshes.

    model.toml            name, version, task, network, classes, colours, size, normalisation, parent, ...
    weights.safetensors   the state_dict, names unchanged (never pickle)
    golden/*.png          frames an engine is compared on
    replay/               a small labelled source set: index.json, frames/, labels/       (optional)
    prior.npz             q_c(y,x), spatial prior of the source labels: float16 [C,h,w]   (optional)
    reference.npz         source statistics: share [C], confidence histograms [C,256]     (optional)

A pack is written under a temporary name beside its destination and appears by one rename, so a half-written
one is never found.  Its hash covers every file.  This module knows networks and files; it knows nothing of
engines or of training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import networks
from networks.base import SegmentationNetwork
from networks.images import MOST_PIXELS, ImageError, read_image

SCHEMA = 1
TASKS = ("segmentation", "edges", "joint")
SPLITS = ("train", "holdout")
#: Bytes of model.toml and of replay/index.json, and of what prior.npz and reference.npz unpack to, at most.
MOST_TEXT, MOST_ARRAYS = 16 << 20, 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class PackError(ValueError):
    """A pack that cannot be used or written; the message is one line: thing, reason, remedy."""


@dataclass(frozen=True)
class PackSpec:
    """What `model.toml` says.

    `mean` and `std` apply to channel values scaled to 0..1, in the order of `channel_order`.  `size` is the
    (height, width) the network was trained for.  `parent` is the SHA-256 of the pack this one was adapted
    from, or empty.  A pack with edges may name their classes where they are not `classes`, and give the
    probability from which a class's edge is served as one (`edge_thresholds`; empty: a half).
    """

    name: str
    version: str
    network: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "segmentation"
    arguments: dict[str, Any] = field(default_factory=dict)
    channel_order: str = "rgb"
    parent: str = ""
    training: str = ""
    licence: str = ""
    adaptation: dict[str, Any] = field(default_factory=dict)
    edge_classes: tuple[str, ...] = ()
    edge_thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Bring sequences to tuples, then refuse what cannot be right.  Raises: PackError."""
        try:
            for key in ("classes", "size", "mean", "std", "edge_classes", "edge_thresholds"):
                object.__setattr__(self, key, tuple(getattr(self, key)))
            object.__setattr__(self, "colours", tuple(tuple(int(v) for v in c) for c in self.colours))
        except (TypeError, ValueError, OverflowError) as error:
            raise PackError(f"malformed list in the description: {error}") from error
        reason = self._problem()
        if reason:
            raise PackError(reason)

    def _problem(self) -> str:
        for key in ("name", "version"):
            if not isinstance(getattr(self, key), str) or not _NAME.match(getattr(self, key)):
                return f"{key} {getattr(self, key)!r} must be letters, digits, '.', '_' or '-'"
        for key in ("task", "network", "channel_order", "parent", "training", "licence"):
            if not isinstance(getattr(self, key), str):
                return f"{key} must be a text, not {getattr(self, key)!r}"
        for key in ("arguments", "adaptation"):
            if not isinstance(getattr(self, key), dict):
                return f"{key} must be a table, not {getattr(self, key)!r}"
        if taken := {"name", "classes"} & set(self.arguments):
            return f"arguments may not hold {min(taken)!r}: it is said elsewhere"
        if self.task not in TASKS:
            return f"task {self.task!r} is unknown; known: {', '.join(TASKS)}"
        if not 1 <= len(self.classes) <= 255 or not all(map(_is_name, self.classes)):
            return "classes must be 1 to 255 names of one line"
        if len(set(self.classes)) != len(self.classes):
            return "classes names a class twice"
        if len(self.colours) != len(self.classes):
            return f"{len(self.classes)} classes but {len(self.colours)} colours; give one colour a class"
        if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in self.colours):
            return "colours must be (red, green, blue) from 0 to 255"
        if reason := self._edge_problem():
            return reason
        if len(self.size) != 2 or not all(isinstance(v, int) and v > 0 for v in self.size):
            return f"size must be (height, width) in pixels, not {self.size!r}"
        if self.size[0] * self.size[1] > MOST_PIXELS:
            return f"size {self.size[0]}x{self.size[1]} has more than {MOST_PIXELS} pixels"
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != 3 or not all(map(_is_finite, values)):
                return f"{key} must be three finite numbers, not {values!r}"
        if min(self.std) <= 0:
            return f"std must be positive, not {self.std!r}"
        if min(self.mean) < 0 or max(self.mean) > 1 or max(self.std) > 1:
            return (
                f"mean {list(self.mean)} and std {list(self.std)} are of channels scaled to 0..1, so none is "
                "above 1 or below 0; divide what is of 0..255 by 255"
            )
        if self.channel_order not in ("rgb", "bgr"):
            return f"channel_order must be 'rgb' or 'bgr', not {self.channel_order!r}"
        if self.parent and not _SHA256.match(self.parent):
            return f"parent {self.parent!r} is not a SHA-256"
        return ""

    def _edge_problem(self) -> str:
        names, limits = self.edge_classes, self.edge_thresholds
        if not all(map(_is_name, names)) or len(set(names)) != len(names):
            return "edge_classes must be distinct names of one line"
        if not all(isinstance(t, float) and 0 < t < 1 for t in limits):
            return f"edge_thresholds must be numbers between 0 and 1, not {list(limits)}"
        wanted = len(names or self.classes)
        if limits and len(limits) != wanted:
            return f"edge_thresholds has {len(limits)} entries for {wanted} edge classes; give one each"
        return ""

    def to_toml(self) -> str:
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        for key in ("edge_classes", "edge_thresholds"):  # of edges: nothing to say for most packs
            if not values[key]:
                del values[key]
        # Tables must come after plain values for a person to read the file easily.
        ordered = sorted(values.items(), key=lambda item: isinstance(item[1], dict))
        return tomli_w.dumps({"schema": SCHEMA, **dict(ordered)})

    @classmethod
    def from_toml(cls, text: str) -> PackSpec:
        """Raises: PackError for anything but the fields of this schema."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, and int()'s for endless numbers
            raise PackError(f"model.toml is not TOML: {one_line(error)}") from error
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise PackError(f"model.toml has schema {schema!r}; this version reads schema {SCHEMA}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise PackError(f"model.toml has unknown fields: {', '.join(unknown)}")
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        lacking = sorted(required - set(values))
        if lacking:
            raise PackError(f"model.toml lacks fields: {', '.join(lacking)}")
        return cls(**values)

    def create(self) -> SegmentationNetwork:
        """A freshly initialised network of this description.  Raises: PackError."""
        try:
            network = networks.create(self.network, classes=len(self.classes), **self.arguments)
        except ValueError as error:
            raise PackError(one_line(error)) from error
        multiple = network.size_multiple
        if any(side % multiple for side in self.size):
            size = "x".join(map(str, self.size))
            raise PackError(f"size {size} must be a multiple of {multiple} for {self.network}")
        return network


class Pack:
    """A pack on disk that has been checked; made by `load_pack` and `write_pack`."""

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
        frames = [_read_frame(file) for file in files]
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
            for entry in _read_index(folder)
            if split in (None, entry["split"])
        ]

    def prior(self) -> np.ndarray | None:
        """float16 [C,h,w] spatial prior of the source labels, or None."""
        return self._arrays("prior.npz").get("prior")

    def reference(self) -> dict[str, np.ndarray]:
        """Source statistics by name; empty where the pack has none."""
        return self._arrays("reference.npz")

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        file = self.path / name
        if not file.exists():
            return {}
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_ARRAYS:
                raise PackError(f"{name} unpacks to more than {MOST_ARRAYS >> 20} MiB; write it again")
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


def normalise(frames: Tensor, spec: PackSpec) -> Tensor:
    """THE pre-processing: uint8 [N,H,W,3] RGB -> float32 [N,3,H,W], in the pack's channel order.

    Used alike by training, evaluation and the exported graph.  Written as one multiplication and one
    addition a channel, because that is what an engine folds and fuses best.
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
        sha256: the hash it must have, where one is known.
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
        spec = PackSpec.from_toml(_read_text(folder / "model.toml"))
    except UnicodeDecodeError as error:
        raise PackError("model.toml is not UTF-8") from error
    with torch.device("meta"):
        network = spec.create()
    _check_weights(folder / "weights.safetensors", network)
    _check_golden(folder / "golden", network.size_multiple)
    _check_replay(folder / "replay")
    pack = Pack(folder, spec, tree_hash(folder))
    _check_arrays(pack)
    if expected is not None and pack.sha256 != expected:
        raise PackError(
            f"hash is {pack.sha256[:12]}, expected {expected[:12]}: it was altered or is another pack"
        )
    return pack


def check_state(state: Mapping[str, Tensor], network: torch.nn.Module) -> None:
    """Refuse weights that are not exactly the network's, or are not finite.  Raises: PackError."""
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


def _check_weights(file: Path, network: torch.nn.Module) -> None:
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


def _check_golden(folder: Path, multiple: int) -> None:
    shapes = set()
    for file in sorted(folder.glob("*.png")):
        shapes.add(_read_frame(file).shape)
    if len(shapes) > 1:
        raise PackError(f"golden frames differ in size: {sorted(shapes)}")
    for h, w, _ in shapes:
        if h % multiple or w % multiple:
            raise PackError(f"golden frames are {h}x{w}, not a multiple of {multiple}")


def _check_replay(folder: Path) -> None:
    for entry in _read_index(folder):
        for key in ("frame", "label"):
            if not (folder / entry[key]).is_file():
                raise PackError(f"replay file {entry[key]!r} is missing")


def _read_text(file: Path) -> str:
    """A text of the pack.  Raises: PackError for what is no plain file, or larger than any such text."""
    if not file.is_file():
        raise PackError(f"{file.name} is no plain file")
    if file.stat().st_size > MOST_TEXT:
        raise PackError(f"{file.name} has more than {MOST_TEXT >> 20} MiB; write it again")
    return file.read_text(encoding="utf-8")


def _read_index(folder: Path) -> list[dict[str, str]]:
    file = folder / "index.json"
    if not file.exists():
        return []
    try:
        entries = json.loads(_read_text(file))
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


def _check_arrays(pack: Pack) -> None:
    classes = len(pack.spec.classes)
    try:
        prior, reference = pack.prior(), pack.reference()
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        # numpy takes what is no archive for a pickle and offers to load it unsafely: not passed on.
        reason = "it is no archive of arrays" if "pickle" in str(error) else one_line(error)
        raise PackError(f"prior.npz or reference.npz cannot be read: {reason}") from error
    if prior is not None and (prior.ndim != 3 or prior.shape[0] != classes):
        raise PackError(f"prior.npz has shape {list(prior.shape)}, wanted [{classes}, h, w]")
    for name, array in reference.items():
        if array.ndim == 0 or array.shape[0] != classes:
            raise PackError(f"reference.npz: {name!r} has shape {list(array.shape)}, wanted {classes} rows")


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
    """Write a pack; it appears whole or not at all.

    Args:
        path: a directory that does not exist yet.
        state: the network's state_dict.
        golden: uint8 [n,H,W,3] RGB frames for the parity report.
        replay: (frame uint8 [H,W,3], label uint8 [H,W] with 255 = ignore, "train" or "holdout"); may be lazy.
        reference: source statistics by name, each with one row a class.
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
        _fsync_tree(staging)
        if target.exists():
            raise PackError("exists already; packs are never overwritten, choose another path")
        os.rename(staging, target)
        _fsync(target.parent)
    except PackError as error:
        raise PackError(f"pack {str(target)!r}: {error}") from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise PackError(f"pack {str(target)!r} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Pack(target, spec, pack.sha256)


def _sweep(target: Path) -> None:
    """Remove what writers of the same pack that were killed left behind, an hour ago or more."""
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


def _read_frame(file: Path) -> np.ndarray:
    try:
        return read_image(file)
    except ImageError as error:
        raise PackError(str(error)) from error


def tree_hash(folder: Path) -> str:
    """SHA-256 over the sorted list of (relative path, SHA-256 of the file)."""
    total = hashlib.sha256()
    for file in sorted(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.relative_to(folder).as_posix()
    ):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def _fsync_tree(folder: Path) -> None:
    for entry in [*folder.rglob("*"), folder]:
        _fsync(entry)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _plain(value: Any) -> Any:
    """What TOML can hold: tuples to lists, numpy scalars to Python's, None left out."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if v is not None]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value


def _is_name(value: Any) -> bool:
    """What labels.txt can hold as one line."""
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def one_line(error: object) -> str:
    """What an exception says, without line breaks: for messages that are one line."""
    return " ".join(str(error).split())
