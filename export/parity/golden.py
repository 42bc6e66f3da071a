"""Golden frames and torch's answers to them: the reference of an engine, here and on the vehicle."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.progress import StepCallback
from common.text import shorten
from export.errors import ExportError
from export.graph.contract import Contract, ServingGraph
from networks.base import SegmentationNetwork
from networks.images import ImageError, read_image
from networks.pack import Pack, PackSpec

#: More than this many frames would only make every load of the version slower.
LARGEST = 8
#: The same in bytes of edge maps, of which a frame has one a class: 3 frames of 19 classes at 512x1024.
LARGEST_EDGES = 32 << 20
#: What is compared, by output name, each with a first dimension n: labels and confidence uint8 [n,H,W];
#: edges uint8 [n,K,H,W] and edge_bits int32 [n,H,W].
Answers = dict[str, np.ndarray]
#: Bytes of labels or of a config.pbtxt at most.
LARGEST_TEXT = 16 << 20
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def limit(contract: Contract, size: tuple[int, int]) -> int:
    """How many golden frames a version may have at most."""
    one = len(contract.edge_classes) * size[0] * size[1]
    return max(1, min(LARGEST, LARGEST_EDGES // one)) if one else LARGEST


def frames(pack: Pack, size: tuple[int, int], most: int = LARGEST) -> tuple[np.ndarray, str]:
    """uint8 [n,H,W,3] at `size`, and where they come from: "pack", "pack, resized" or "synthetic".

    At most `most`, evenly spaced over the pack's.
    A pack without golden frames is compared on smooth seeded noise with blocks in it: it exercises the
    arithmetic, and says little about the road.
    """
    golden = pack.golden()
    if not len(golden):
        return synthetic(size, min(2, most)), "synthetic"
    golden = golden[np.linspace(0, len(golden) - 1, min(len(golden), most)).astype(int)]
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


def answers(
    network: SegmentationNetwork,
    spec: PackSpec,
    contract: Contract,
    frames: np.ndarray,
    progress: StepCallback,
) -> Answers:
    """Torch's answers in float32.

    Raises: ExportError where the network's answers are not finite.
    """
    graph = ServingGraph(network, spec, contract)
    found: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    for index, frame in enumerate(frames):
        progress("torch", index, len(frames))
        try:
            with torch.inference_mode():
                logits = graph.logits(torch.from_numpy(frame.copy())[None])
                given = graph.answers(logits, frame.shape[:2])
        except RuntimeError as error:  # too little memory, most of all
            why = shorten(error, 200)
            raise ExportError(f"torch cannot run the network on golden frame {index}: {why}") from error
        if not all(bool(torch.isfinite(part).all()) for part in logits):
            raise ExportError(f"the network's answer to golden frame {index} is not finite; train it again")
        for name, tensor in zip(contract.outputs, given, strict=True):
            if name in found:
                found[name].append(tensor[0].numpy())
    progress("torch", len(frames), len(frames))
    return {name: np.stack(parts) for name, parts in found.items()}


def read_folder(folder: Path, size: tuple[int, int], most: int) -> np.ndarray:
    """uint8 [n,H,W,3]: images of a folder in name order, evenly spaced where there are more than `most`, at
    `size`.  Raises: ExportError.
    """
    if not folder.is_dir():
        raise ExportError(f"{str(folder)!r} is not a folder of images")
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGES]
    if not files:
        raise ExportError(f"{str(folder)!r} holds no image ({', '.join(IMAGES)})")
    index = np.linspace(0, len(files) - 1, min(len(files), most)).astype(int)
    try:
        return np.stack([read_image(files[i], size) for i in index])
    except ImageError as error:
        raise ExportError(str(error)) from error


def read_text(file: Path) -> str:
    """Read a text file.  Raises ExportError if it is not a readable text."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError("it is no plain file")
        if file.stat().st_size > LARGEST_TEXT:
            raise OSError(f"it has more than {LARGEST_TEXT >> 20} MiB")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{str(file)!r} cannot be read: {error}") from error


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty.  Raises ExportError."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def archive(frames: np.ndarray, torch_answers: Answers, engine_answers: Answers, precision: str) -> bytes:
    """golden.npz: frames, and the answers that a server expects of this engine.

    In float32 they are torch's.  An engine that may differ from torch by what its precision costs was judged
    when it was built; what a server asks is whether it still does here what it did then, so its own answers
    are expected, and torch's are kept beside them.
    """
    arrays = {"frames": frames, **(torch_answers if precision == "fp32" else engine_answers)}
    if precision != "fp32":
        arrays |= {f"torch_{name}": value for name, value in torch_answers.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
