"""Our own server, started as every peer is: a child process that is weighed from outside.

Knows how a version is published without torch (`publish`) and how the server is started; looks at
nothing inside it.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.process import Server

_READY = re.compile(r"ready grpc=(\S+)")
ROOT = Path(__file__).resolve().parents[2]


def smooth_frames(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [count,height,width,3]: patches of colour, so that several classes are seen."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, -(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width])


def publish(
    repository: Path,
    model: str,
    onnx: bytes,
    *,
    config: str = "",
    labels: Sequence[str] = (),
    golden: int = 2,
    threads: int = 1,
) -> int:
    """Publishes an ONNX file as the next version of `model`; returns its number.

    For a segmentation graph `golden` frames and its own answers to them go along; other graphs
    (task "tensor") carry neither.
    """
    import onnxruntime

    from runtime.repository.repository import Repository

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    frame = session.get_inputs()[0]
    segmentation = [frame.name] == ["frame"] and len(session.get_inputs()) == 1
    manifest: dict[str, Any] = {
        "task": "segmentation" if segmentation else "tensor",
        "engine": {"kind": "onnxruntime", "precision": "fp32", "file": "model.onnx", "opset": 18},
    }
    store = Repository(repository)
    staged = store.stage(model)
    (staged / "model.onnx").write_bytes(onnx)
    if segmentation:
        _, height, width, _ = frame.shape
        probabilities = next(one for one in session.get_outputs() if one.name == "probabilities")
        classes = list(labels) or [f"class{i}" for i in range(int(probabilities.shape[1]))]
        pictures = smooth_frames(golden, height, width)
        answers = [session.run(["labels", "confidence"], {"frame": one[None]}) for one in pictures]
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            frames=pictures,
            labels=np.concatenate([one[0] for one in answers]),
            confidence=np.concatenate([one[1] for one in answers]),
        )
        (staged / "golden.npz").write_bytes(buffer.getvalue())
        manifest |= {
            "input": {"height": height, "width": width, "dynamic_batch": not isinstance(frame.shape[0], int)},
            "classes": classes,
            "colours": [[i, i, i] for i in range(len(classes))],
            "output_stride": height // int(probabilities.shape[2]),
            "pack": {"name": model, "version": "1", "sha256": "0" * 64, "parent": ""},
            "adaptation": {},
            "gate": {},
            "parity": {},
            "libraries": {"onnxruntime": onnxruntime.__version__},
        }
        labels = classes
    return store.publish(model, staged, manifest, config, list(labels))


def start(
    repository: Path,
    *,
    work: Path,
    settings: str = "",
    arguments: Sequence[str] = (),
    name: str = "roadworthy",
) -> Server:
    """Starts `python -m runtime.serve` on a port of the system's choice.

    name      of its log, where one folder serves several
    settings  TOML text for --config, "" for the defaults
    """
    log = work / f"{name}.log"
    more = list(arguments)
    if settings:
        (work / f"{name}.toml").write_text(settings)
        more += ["--config", str(work / f"{name}.toml")]
    found: list[str] = []

    def ready() -> bool:
        match = _READY.search(log.read_text(errors="replace"))
        found[:] = [match[1]] if match else []
        return match is not None

    server = Server(
        name,
        [
            *(sys.executable, "-m", "runtime.serve", "--repository", str(repository)),
            *("--port", "0", "--metrics-port", "0"),
            *more,
        ],
        target="",
        ready=ready,
        log=log,
        directory=ROOT,
    )
    server.target = found[0]
    return server
