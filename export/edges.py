"""Edge networks as ONNX, under the edge half of the graph contract.

    frame uint8 [N,H,W,3] RGB -> edges uint8 [N,K,H,W]      255 · sigmoid, rounded (an 8-bit PNG)
                                 edge_bits int32 [N,H,W]    bit k: class k at or over its threshold

The fusion is exported in its dense form (``fused()``): one 1x1 convolution of K + 3 channels.  Initialisers
bear the names of that form's state_dict.

``python -m export.edges PACK --out FILE.onnx`` writes one file and compares it with torch.  Serving it is
not part of the runtime's contract yet: ``export.build`` refuses edge packs and says so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from export import writer
from export.errors import ExportError
from export.fold import Folding
from export.graph import INPUT
from networks.pack import PackError, PackSpec, load_pack, normalise

__all__ = ["EdgeServingGraph", "compare", "main", "write"]

MAX_CLASSES = 31
OUTPUTS = ("edges", "edge_bits")


class _Head(nn.Module):
    """A network's edge logits as its only answer, its fusion dense."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        for part in ("sides", "fused"):
            if not hasattr(network, part):
                raise ExportError(
                    f"{type(network).__name__} has no {part}(): edges come from casenet or casenet_light; "
                    "a segmentation is exported by export.build"
                )
        self.network = network.fused().eval()
        self.size_multiple = int(network.size_multiple)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def _thresholds(thresholds: float | Sequence[float], classes: int) -> np.ndarray:
    values = np.asarray(thresholds, np.float64)
    if values.ndim == 0:
        values = np.broadcast_to(values, (classes,))
    if values.shape != (classes,) or not ((values > 0) & (values < 1)).all():
        raise ExportError(
            f"thresholds {thresholds!r}: one, or one for each of {classes} classes, between 0 and 1"
        )
    if classes > MAX_CLASSES:
        raise ExportError(
            f"{classes} edge classes: edge_bits is one int32, {MAX_CLASSES} fit; split the head"
        )
    # sigmoid(x) >= t  <=>  x >= log(t / (1 - t)): compared on logits, before any rounding
    return np.log(values / (1 - values)).astype(np.float32)


class EdgeServingGraph(nn.Module):
    """The contract in torch: what parity is measured against.  uint8 [N,H,W,3] -> (edges, edge_bits)."""

    def __init__(self, network: nn.Module, spec: PackSpec, thresholds: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        self.network, self.spec = network.eval(), spec
        self.limits = torch.from_numpy(_thresholds(thresholds, len(spec.classes)))

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(normalise(frame, self.spec))
        full = F.interpolate(logits, size=frame.shape[1:3], mode="bilinear", align_corners=False)
        on = (full >= self.limits[:, None, None]).to(torch.int32)
        powers = torch.tensor([1 << k for k in range(len(self.limits))], dtype=torch.int32)
        bits = (on * powers[:, None, None]).sum(1, dtype=torch.int32)
        return (full.sigmoid() * 255 + 0.5).to(torch.uint8), bits


def write(
    network: Any,
    spec: PackSpec,
    *,
    size: tuple[int, int],
    batch: int | None = 1,
    thresholds: float | Sequence[float] = 0.5,
    opset: int = writer.DEFAULT_OPSET,
) -> onnx.ModelProto:
    """An edge network as ONNX.

    Raises:
        ExportError: no edge network, a size that is no multiple of the network's, more than 31 classes,
            thresholds outside (0, 1).
    """
    limits = _thresholds(thresholds, len(spec.classes))
    head = _Head(network)
    height, width = size
    if height <= 0 or width <= 0 or height % head.size_multiple or width % head.size_multiple:
        raise ExportError(
            f"size {height}x{width} must be a multiple of {head.size_multiple} for {spec.network}"
        )
    graph = writer.Graph(opset)
    folding = Folding(head.network)
    emitter = writer._Emitter(folding, graph, folding.weights(head.network.state_dict()))
    example = torch.empty(writer._TRACED_BATCH, 3, height, width, device="meta")
    with torch.no_grad():
        logits, shape = emitter.write(writer._preprocess(graph, spec), example)
    full = graph.resize(logits, tuple(shape.shape[2:]), size, aligned=False)  # type: ignore[arg-type]
    scaled = graph.node("Mul", [graph.node("Sigmoid", [full]), graph.constant(255.0)])
    rounded = graph.node("Add", [scaled, graph.constant(0.5)])
    graph.node("Cast", [rounded], to=TensorProto.UINT8, output="edges")
    on = graph.node("GreaterOrEqual", [full, graph.constant(limits[:, None, None])])
    powers = graph.constant([[[1 << k]] for k in range(len(limits))], np.int32)
    bits = graph.node("Mul", [graph.node("Cast", [on], to=TensorProto.INT32), powers])
    graph.node("ReduceSum", [bits, graph.constant([1], np.int64)], keepdims=0, output="edge_bits")
    n: int | str = "N" if batch is None else batch
    info = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            spec.name,
            [info(INPUT, TensorProto.UINT8, [n, *size, 3])],
            [
                info("edges", TensorProto.UINT8, [n, len(spec.classes), *size]),
                info("edge_bits", TensorProto.INT32, [n, *size]),
            ],
            list(graph.initialisers.values()),
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=writer._IR_VERSION[opset],
        producer_name="roadworthy",
    )
    writer.check(model)
    return model


def compare(
    model: onnx.ModelProto, network: nn.Module, spec: PackSpec, frames: np.ndarray, **how: Any
) -> dict[str, Any]:
    """ONNX Runtime against torch on uint8 [n,H,W,3]: largest difference of a byte, share of equal bit
    fields."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    worst, same, total = 0, 0, 0
    reference = EdgeServingGraph(network, spec, **how)
    for frame in frames:
        edges, bits = session.run(list(OUTPUTS), {INPUT: frame[None]})
        with torch.inference_mode():
            wanted = [t.numpy() for t in reference(torch.from_numpy(frame[None].copy()))]
        worst = max(worst, int(np.abs(edges.astype(int) - wanted[0]).max()))
        same += int((bits == wanted[1]).sum())
        total += bits.size
    return {"frames": len(frames), "edges_max_difference": worst, "bits_equal": same / total}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m export.edges",
        description="Export the edge network of a pack to ONNX and compare it with torch, frame by frame.",
        epilog="""examples:
  python -m export.edges packs/casenet --out casenet.onnx --size 512x1024
  python -m export.edges packs/light --out light.onnx --threshold 0.4

exit codes: 0 written and equal to torch (a byte at most, 99.9 % of the bit fields), 1 refused, 2 wrong
usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("pack", metavar="PACK", help="a pack of casenet or casenet_light")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the ONNX file")
    p.add_argument("--size", metavar="HxW", help="frame size (the pack's)")
    p.add_argument(
        "--threshold", type=float, nargs="+", default=[0.5], metavar="P", help="one, or one a class (0.5)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(argv)
    try:
        pack = load_pack(a.pack)
        height, _, width = (a.size or "{}x{}".format(*pack.spec.size)).partition("x")
        if not (height.isdigit() and width.isdigit()):
            p.error(f"--size {a.size!r} is not HxW")
        size = (int(height), int(width))
        thresholds = a.threshold[0] if len(a.threshold) == 1 else a.threshold
        network = pack.network()
        model = write(network, pack.spec, size=size, thresholds=thresholds)
        frames = pack.golden()
        if not len(frames) or frames.shape[1:3] != size:
            frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
        report = compare(model, network, pack.spec, frames, thresholds=thresholds)
        if report["edges_max_difference"] > 1 or report["bits_equal"] < 0.999:
            raise ExportError(f"parity with torch is missed: {report}")
        a.out.write_bytes(model.SerializeToString())
    except (ExportError, PackError, OSError) as error:
        print(f"export.edges: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    report |= {"file": str(a.out), "bytes": a.out.stat().st_size, "size": list(size)}
    print(json.dumps(report) if a.json else "\n".join(f"{k}: {v}" for k, v in report.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
