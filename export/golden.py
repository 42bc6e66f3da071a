"""Golden frames and torch's answers to them: what an engine is compared with, here and on the vehicle."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from export.errors import ExportError
from export.graph import ServingGraph
from export.progress import Callback
from networks.base import SegmentationNetwork
from networks.pack import Pack, PackSpec

#: More than this many frames would only make every load of the version slower.
LARGEST = 8
#: Labels and confidence, each uint8 [n,H,W].
Answers = tuple[np.ndarray, np.ndarray]
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def frames(pack: Pack, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """uint8 [n,H,W,3] at `size`, and where they come from: "pack", "pack, resized" or "synthetic".

    A pack without golden frames is compared on smooth seeded noise with blocks in it: it exercises the
    arithmetic, and says little about the road.
    """
    golden = pack.golden()[:LARGEST]
    if not len(golden):
        return synthetic(size), "synthetic"
    if golden.shape[1:3] == size:
        return golden, "pack"
    resized = [
        np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        for frame in golden
    ]
    return np.stack(resized), "pack, resized"


def synthetic(size: tuple[int, int], count: int = 2) -> np.ndarray:
    """uint8 [count,H,W,3]: smooth seeded noise with blocks in it, the same every time."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        frame = np.array(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        for _ in range(12):
            y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
            h, w = rng.integers(4, size[0] // 2), rng.integers(4, size[1] // 2)
            frame[y : y + h, x : x + w] = rng.integers(0, 256, 3)
        result.append(frame)
    return np.stack(result)


def answers(network: SegmentationNetwork, spec: PackSpec, frames: np.ndarray, progress: Callback) -> Answers:
    """Torch's labels and confidence, uint8 [n,H,W], in float32.

    Raises: ExportError where the network's answers are not finite.
    """
    graph = ServingGraph(network, spec)
    labels, confidence = [], []
    for index, frame in enumerate(frames):
        progress("torch", index, len(frames))
        with torch.inference_mode():
            label, sure, probabilities = graph(torch.from_numpy(frame.copy())[None])
        if not bool(torch.isfinite(probabilities).all()):
            raise ExportError(f"the network's answer to golden frame {index} is not finite; train it again")
        labels.append(label[0].numpy())
        confidence.append(sure[0].numpy())
    progress("torch", len(frames), len(frames))
    return np.stack(labels), np.stack(confidence)


def read_folder(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """uint8 [n,H,W,3]: every image of a folder, in name order, at `size`.  Raises: ExportError."""
    if not folder.is_dir():
        raise ExportError(f"{str(folder)!r} is not a folder of images")
    images = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMAGES:
            continue
        try:
            with Image.open(file) as image:
                resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
                images.append(np.asarray(resized))
        except OSError as error:
            raise ExportError(f"{str(file)!r} cannot be read as an image") from error
    if not images:
        raise ExportError(f"{str(folder)!r} holds no image ({', '.join(IMAGES)})")
    return np.stack(images)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty.  Raises: ExportError."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{str(file)!r} cannot be read: {error}") from error


def archive(frames: np.ndarray, torch_answers: Answers, engine_answers: Answers, precision: str) -> bytes:
    """golden.npz: frames, and the labels and confidence that a server expects of this engine.

    In float32 they are torch's.  An engine that may differ from torch by what its precision costs was judged
    when it was built; what a server asks is whether it still does here what it did then, so its own answers
    are expected, and torch's are kept beside them.
    """
    expected = torch_answers if precision == "fp32" else engine_answers
    arrays = {"frames": frames, "labels": expected[0], "confidence": expected[1]}
    if precision != "fp32":
        arrays |= {"torch_labels": torch_answers[0], "torch_confidence": torch_answers[1]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
