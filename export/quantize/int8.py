"""Static INT8 quantisation of an exported graph, calibrated on class-balanced frames.

One calibration, two encodings, because no single one is both fast on a CPU and legal in TensorRT
(`python -m bench.networks` measures both):

    target         activations            why
    onnxruntime    uint8, zero point      ONNX Runtime's x86 kernels want uint8 activations, and a ReLU
                                          before a zero point of 0 costs nothing
    tensorrt       int8, symmetric        TensorRT's parser refuses any zero point but 0 and reads uint8 as
                                          int8, with a warning and other ranges

Weights are int8, symmetric, one scale per output channel; biases stay float32; both encodings are QDQ
(QuantizeLinear, DequantizeLinear around float operators): ONNX Runtime runs either, TensorRT its own.
Only convolutions are quantised: labels and confidence are decided in float32.

A quantised version is not refitted: new weights are exported and quantised again.  Whether it may be
served is the parity report's decision (`export.parity`), not this module's.

Knows ONNX, ONNX Runtime and which frames a pack has; nothing of networks.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from PIL import Image

from common.progress import StepCallback, no_progress
from common.text import shorten
from export.errors import ExportError
from export.parity.onnxruntime import Runner
from networks.images import ImageError, read_image

if TYPE_CHECKING:
    from networks.pack import Pack

TARGETS = ("onnxruntime", "tensorrt")
METHODS = ("minmax", "percentile")
DEFAULT_COUNT = 32
#: More candidates than this only make the choice slower.
LARGEST_POOL = 256

#: Sums, pools and enlargements between convolutions stay float32: in 8 bits they cost more agreement than
#: they gain time (`python -m bench.int8`).
OPERATORS = ("Conv",)
KNOWN_OPERATORS = ("Conv", "Add", "Concat", "Resize", "MaxPool", "AveragePool", "GlobalAveragePool")
_INPUT, _LABELS = "frame", "labels"


@dataclass(frozen=True)
class Quantised:
    """The quantised graph and how it came about (`report` is JSON and belongs in the manifest)."""

    model: onnx.ModelProto
    report: dict[str, Any]


def candidates(pack: Pack, size: tuple[int, int], limit: int = LARGEST_POOL) -> np.ndarray:
    """Frames of the pack to calibrate on: uint8 [n,H,W,3] at `size`, n may be 0.

    Evenly spaced training frames of its replay; where it has none, its golden frames, which parity is then
    measured on too.  An adaptation that holds frames of the new road passes those to `quantise` instead.
    """
    paths = [frame for frame, _ in pack.replay("train")]
    if paths:
        index = np.unique(np.linspace(0, len(paths) - 1, min(limit, len(paths))).astype(int))
        try:
            return np.stack([read_image(paths[i], size) for i in index])
        except ImageError as error:
            raise ExportError(f"replay frame {error}") from error
    images = [Image.fromarray(frame) for frame in pack.golden()[:limit]]
    if not images:
        return np.zeros((0, *size, 3), np.uint8)
    wanted = (size[1], size[0])
    return np.stack(
        [np.asarray(i if i.size == wanted else i.resize(wanted, Image.Resampling.BILINEAR)) for i in images]
    )


def class_shares(labels: np.ndarray, classes: int) -> np.ndarray:
    """float64 [n,classes]: share of each class in each label map of uint8 [n,H,W]; 255 is left out."""
    counts = np.stack([np.bincount(one.ravel(), minlength=256)[:classes] for one in labels])
    shares: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def choose_frames(shares: np.ndarray, count: int) -> list[int]:
    """The `count` frames that together show every class best, most useful first.

    Greedy on sum over classes of log(mean share of the class + 1e-3): a class that is still rare gains most,
    so that the ranges of activations are also those of poles and people, not of road and sky alone.

    Args:
        shares: [n,classes] as `class_shares` returns it.
    Returns:
        min(count, n) distinct indices; ties go to the earlier frame.
    """
    shares = np.asarray(shares, np.float64)
    left = list(range(len(shares)))
    total = np.zeros(shares.shape[1])
    chosen: list[int] = []
    for step in range(1, min(count, len(shares)) + 1):
        gains = np.log((total + shares[left]) / step + 1e-3).sum(1)
        best = left.pop(int(np.argmax(gains)))
        total += shares[best]
        chosen.append(best)
    return chosen


def quantise(
    model: onnx.ModelProto,
    frames: np.ndarray,
    *,
    classes: int,
    target: str = "onnxruntime",
    count: int = DEFAULT_COUNT,
    keep: Sequence[str] = (),
    method: str = "minmax",
    operators: Sequence[str] = OPERATORS,
    reduce_range: bool = False,
    threads: int = 1,
    progress: StepCallback = no_progress,
) -> Quantised:
    """Quantise a graph that `export.graph.writer` wrote.

    Args:
        model: float32, under the graph contract; batch open or fixed.  It is not changed.
        frames: uint8 [n,H,W,3] RGB, candidates for calibration: the road the engine will see.
        classes: of the network.
        target: whose encoding, one of `TARGETS`.
        count: frames to calibrate on, chosen by the classes that `model` itself sees in them (a graph
            without labels: evenly spaced).
        keep: regular expressions; a node whose weight's or own name matches (`re.search`) stays float32.
        method: how a range follows from what was seen: "minmax", or "percentile" (99.999 %).
        operators: which of `KNOWN_OPERATORS` are quantised.
        reduce_range: 7-bit weights, for x86 processors without VNNI, whose 16-bit sums can overflow.
        threads: of the float32 model, while it looks at the candidates.
        progress: called during the stages "frames" and "calibrate".
    Returns:
        the quantised model, checked, with the original's metadata, inputs and outputs; and the report:
        target, method, reduce_range, candidates, frames (indices of the chosen), least_share (of the rarest
        class over the chosen frames, and over all; None without labels), convolutions (int8, all), kept
        (nodes that stayed float32), bytes (before, after).
    Raises:
        ExportError: an unknown target, method or operator, frames of another shape, a `keep` that matches
            nothing, no candidates, a graph without convolutions or not under the contract.
    """
    if target not in TARGETS:
        raise ExportError(f"int8 target {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    if method not in METHODS:
        raise ExportError(f"int8 calibration {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not set(operators) <= set(KNOWN_OPERATORS) or "Conv" not in operators:
        raise ExportError(f"int8 operators must be Conv and any of {', '.join(KNOWN_OPERATORS[1:])}")
    batch = _check_frames(model, frames)
    if count < 1:
        raise ExportError(f"int8 calibration needs at least one frame, not {count}")
    kept = sorted(_matching(model, keep))
    if not any(n.op_type == "Conv" and n.name not in kept for n in model.graph.node):
        raise ExportError("int8: no convolution is left to quantise; keep fewer nodes, or stay with fp32")

    least = None
    if any(o.name == _LABELS for o in model.graph.output):
        shares = class_shares(_labels(model, frames, threads, progress), classes)
        chosen = choose_frames(shares, count)
        least = [float(shares[chosen].mean(0).min()), float(shares.mean(0).min())]
    else:  # edges alone: nothing to balance by
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)).tolist()
    progress("calibrate", 0, 1)
    quantised = _quantise(model, frames[chosen], batch, kept, target, method, operators, reduce_range)
    progress("calibrate", 1, 1)
    return Quantised(
        quantised,
        {
            "target": target,
            "method": method,
            "reduce_range": reduce_range,
            "candidates": len(frames),
            "frames": chosen,
            "least_share": least,
            "convolutions": _convolutions(quantised),
            "kept": kept,
            "bytes": [model.ByteSize(), quantised.ByteSize()],
        },
    )


def _check_frames(model: onnx.ModelProto, frames: np.ndarray) -> int | None:
    """The fixed batch of the model (None: open), once the frames are known to fit it."""
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    if _INPUT not in inputs:
        raise ExportError("int8 needs a graph of this project, with the input 'frame'; export the pack first")
    n, *wanted = [d.dim_value or None for d in inputs[_INPUT].shape.dim]
    if frames.dtype != np.uint8 or list(frames.shape[1:]) != wanted:
        raise ExportError(
            f"int8: calibration frames are {frames.dtype} {list(frames.shape[1:])}, "
            f"the model wants uint8 {wanted}"
        )
    if not len(frames):
        raise ExportError(
            "int8 needs calibration frames and there are none; give the pack golden or replay frames, "
            "or frames of the road it will see"
        )
    return n


def _matching(model: onnx.ModelProto, patterns: Sequence[str]) -> set[str]:
    weights = {i.name for i in model.graph.initializer if not i.name.startswith("const.")}
    found = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ExportError(f"int8: {pattern!r} is not a regular expression: {error}") from error
        names = {
            n.name
            for n in model.graph.node
            if any(expression.search(name) for name in (n.name, *(weights & set(n.input))))
        }
        if not names:
            raise ExportError(f"int8: nothing to keep is called {pattern!r}; see export.inspect for names")
        found |= names
    return found


def _batches(frames: np.ndarray, batch: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """(frames of one call, how many of them are new): the last frame fills up a fixed batch."""
    step = batch or 1
    for start in range(0, len(frames), step):
        part = frames[start : start + step]
        filling = np.repeat(part[-1:], step - len(part), axis=0)
        yield np.concatenate([part, filling]), len(part)


def _labels(model: onnx.ModelProto, frames: np.ndarray, threads: int, progress: StepCallback) -> np.ndarray:
    """Return the labels of the float32 model: uint8 [n,H,W]."""
    runner = Runner(model, threads)
    answers = []
    for done, frame in enumerate(frames, 1):
        answers.append(runner.run(frame[None], [_LABELS])[_LABELS][0])
        progress("frames", done, len(frames))
    return np.stack(answers)


def _quantise(
    model: onnx.ModelProto,
    frames: np.ndarray,
    batch: int | None,
    kept: list[str],
    target: str,
    method: str,
    operators: Sequence[str],
    reduce_range: bool,
) -> onnx.ModelProto:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = _batches(frames, batch)

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {_INPUT: part[0]}

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # The tool's own graph optimiser would fold and rename; its mark keeps it from asking for that.
    copy.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    symmetric = target == "tensorrt"
    methods = {
        "minmax": q.CalibrationMethod.MinMax,
        "percentile": q.CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory(prefix="roadworthy-int8-") as folder:
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        try:
            onnx.save(copy, before)
            # One of the methods prints; standard output belongs to the caller.
            with contextlib.redirect_stdout(io.StringIO()):
                q.quantize_static(
                    before,
                    after,
                    Reader(),
                    quant_format=q.QuantFormat.QDQ,
                    op_types_to_quantize=list(operators),
                    nodes_to_exclude=kept,
                    per_channel=True,
                    reduce_range=reduce_range,
                    activation_type=q.QuantType.QInt8 if symmetric else q.QuantType.QUInt8,
                    weight_type=q.QuantType.QInt8,
                    calibrate_method=methods[method],
                    extra_options={
                        "ActivationSymmetric": symmetric,
                        "WeightSymmetric": True,
                        "QuantizeBias": False,
                    },
                )
            result = onnx.load(after)
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ExportError(f"int8 calibration failed: {shorten(error, 200)}") from error
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    result.producer_name = model.producer_name
    try:
        onnx.checker.check_model(result, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the int8 graph is not valid ONNX: {shorten(error, 300)}") from error
    return result


def _convolutions(model: onnx.ModelProto) -> dict[str, int]:
    """How many convolutions have 8-bit weights, of how many."""
    real = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    return {"int8": sum(n.input[1] in real for n in convolutions), "all": len(convolutions)}
