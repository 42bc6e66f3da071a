"""Tiny networks that keep the graph contract, made with onnx.helper, and versions of them.

The classes are colours: class k wins where the frame is nearest to `COLOURS[k]`, so the
right answer is known without running anything.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

from runtime.repository.repository import Repository

COLOURS = np.array([[20, 20, 20], [230, 30, 30], [30, 230, 30], [30, 30, 230]], np.float32)
CLASSES = ("road", "car", "vegetation", "sky")
SIZE = (16, 32)


def nearest_weights(colours: np.ndarray = COLOURS, sharpness: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [C,3] and bias [C] of a linear classifier of channel values 0..1: argmax = nearest colour."""
    c = colours / 255.0
    return (2 * sharpness * c).astype(np.float32), (-sharpness * (c**2).sum(1)).astype(np.float32)


def segmentation(
    weights: np.ndarray,
    bias: np.ndarray,
    size: tuple[int, int] = SIZE,
    *,
    batch: int | str = 1,
    stride: int = 2,
    depth: int = 0,
    width: int = 32,
) -> onnx.ModelProto:
    """frame uint8 [N,H,W,3] -> labels, confidence uint8 [N,H,W], probabilities float32 [N,C,h,w].

    `depth` convolutions of `width` channels on a dead branch (added with weight 0) make it slow on purpose.
    """
    height, wide = size
    classes = len(bias)
    inits = [
        nh.from_array(weights.reshape(classes, 3, 1, 1).astype(np.float32), "head.weight"),
        nh.from_array(bias.astype(np.float32), "head.bias"),
        nh.from_array(np.float32(255.0), "scale"),
        nh.from_array(np.array([1, 1, stride, stride], np.float32), "up"),
        nh.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes = [
        h.make_node("Cast", ["frame"], ["f0"], to=T.FLOAT),
        h.make_node("Div", ["f0", "scale"], ["f1"]),
        h.make_node("Transpose", ["f1"], ["x"], perm=[0, 3, 1, 2]),
        h.make_node(
            "AveragePool", ["x"], ["pooled"], kernel_shape=[stride, stride], strides=[stride, stride]
        ),
        h.make_node("Conv", ["pooled", "head.weight", "head.bias"], ["logits" if not depth else "clean"]),
    ]
    if depth:
        rng = np.random.default_rng(1)
        last, channels = "pooled", 3
        for i in range(depth):
            w = rng.normal(0, 1 / np.sqrt(9 * channels), (width, channels, 3, 3)).astype(np.float32)
            inits.append(nh.from_array(w, f"deep.{i}"))
            nodes += [
                h.make_node("Conv", [last, f"deep.{i}"], [f"d{i}"], pads=[1, 1, 1, 1]),
                h.make_node("Relu", [f"d{i}"], [f"r{i}"]),
            ]
            last, channels = f"r{i}", width
        inits.append(nh.from_array(np.full((classes, width, 1, 1), 1e-6, np.float32), "deep.out"))
        nodes += [
            h.make_node("Conv", [last, "deep.out"], ["deep"]),
            h.make_node("Add", ["clean", "deep"], ["logits"]),
        ]
    nodes += [
        h.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        h.make_node(
            "Resize",
            ["logits", "", "up"],
            ["full"],
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        ),
        h.make_node("ArgMax", ["full"], ["best"], axis=1, keepdims=0),
        h.make_node("Cast", ["best"], ["labels"], to=T.UINT8),
        h.make_node("ReduceMax", ["full", "axis"], ["top"], keepdims=1),
        h.make_node("Sub", ["full", "top"], ["less"]),
        h.make_node("Exp", ["less"], ["e"]),
        h.make_node("ReduceSum", ["e", "axis"], ["sum"], keepdims=0),
        h.make_node("Div", ["scale", "sum"], ["bytes"]),
        h.make_node("Cast", ["bytes"], ["confidence"], to=T.UINT8),
    ]
    value = h.make_tensor_value_info
    graph = h.make_graph(
        nodes,
        "tiny",
        [value("frame", T.UINT8, [batch, height, wide, 3])],
        [
            value("labels", T.UINT8, [batch, height, wide]),
            value("confidence", T.UINT8, [batch, height, wide]),
            value("probabilities", T.FLOAT, [batch, classes, height // stride, wide // stride]),
        ],
        inits,
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


EDGE_SIZE = (48, 96)
THRESHOLDS = (0.5, 0.5, 0.5, 0.5)


def edges(
    weights: np.ndarray,
    bias: np.ndarray,
    size: tuple[int, int] = EDGE_SIZE,
    *,
    edge_bias: np.ndarray | float = -6.0,
    order: tuple[int, ...] = (0, 1, 2, 3),
    powers: tuple[int, ...] = (1, 2, 4, 8),
    joint: bool = False,
    batch: int | str = 1,
    depth: int = 0,
) -> onnx.ModelProto:
    """frame uint8 [N,H,W,3] -> edges uint8 [N,4,H,W], edge_bits int32 [N,H,W]; `joint`: labels, confidence.

    A pixel is an edge of class k where k's probability is not the same all over its 3x3 neighbourhood: known
    without running anything, see `edges_of`.  `order` permutes the edge classes, `powers` are their bits.
    """
    height, wide = size
    count = len(bias)
    limits = np.log(np.array(THRESHOLDS, np.float32) / (1 - np.array(THRESHOLDS, np.float32)))
    inits = [
        nh.from_array(weights.reshape(count, 3, 1, 1).astype(np.float32), "head.weight"),
        nh.from_array(bias.astype(np.float32), "head.bias"),
        nh.from_array(np.float32(255.0), "scale"),
        nh.from_array(np.float32(0.5), "half"),
        nh.from_array(np.float32(12.0), "gain"),
        nh.from_array(np.broadcast_to(np.float32(edge_bias), (4,)).reshape(4, 1, 1).copy(), "edge.bias"),
        nh.from_array(limits.reshape(4, 1, 1), "limits"),
        nh.from_array(np.array(powers, np.int32).reshape(4, 1, 1), "powers"),
        nh.from_array(np.array(order, np.int64), "order"),
        nh.from_array(np.array([1], np.int64), "axis"),
    ]
    pool = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        h.make_node("Cast", ["frame"], ["f0"], to=T.FLOAT),
        h.make_node("Div", ["f0", "scale"], ["f1"]),
        h.make_node("Transpose", ["f1"], ["x"], perm=[0, 3, 1, 2]),
        h.make_node("Conv", ["x", "head.weight", "head.bias"], ["logits"]),
        h.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]
    last = "p"
    for i in range(depth):  # slow on purpose: the same values again and again
        inits.append(nh.from_array(np.eye(4, dtype=np.float32)[:, :, None, None], f"deep.{i}"))
        nodes.append(h.make_node("Conv", [last, f"deep.{i}"], [f"d{i}"]))
        nodes.append(h.make_node("Sin", [f"d{i}"], [f"s{i}"]))
        nodes.append(h.make_node("Asin", [f"s{i}"], [f"a{i}"]))
        last = f"a{i}"
    nodes += [
        h.make_node("MaxPool", [last], ["most"], **pool),
        h.make_node("Neg", [last], ["minus"]),
        h.make_node("MaxPool", ["minus"], ["least"], **pool),
        h.make_node("Add", ["most", "least"], ["range"]),
        h.make_node("Gather", ["range", "order"], ["ordered"], axis=1),
        h.make_node("Mul", ["ordered", "gain"], ["scaled"]),
        h.make_node("Add", ["scaled", "edge.bias"], ["e"]),
        h.make_node("Sigmoid", ["e"], ["pe"]),
        h.make_node("Mul", ["pe", "scale"], ["pb"]),
        h.make_node("Add", ["pb", "half"], ["rounded"]),
        h.make_node("Cast", ["rounded"], ["edges"], to=T.UINT8),
        h.make_node("GreaterOrEqual", ["e", "limits"], ["on"]),
        h.make_node("Cast", ["on"], ["bit"], to=T.INT32),
        h.make_node("Mul", ["bit", "powers"], ["field"]),
        h.make_node("ReduceSum", ["field", "axis"], ["edge_bits"], keepdims=0),
    ]
    value = h.make_tensor_value_info
    outputs = [
        value("edges", T.UINT8, [batch, 4, height, wide]),
        value("edge_bits", T.INT32, [batch, height, wide]),
    ]
    if joint:
        nodes += [
            h.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
            h.make_node("Cast", ["best"], ["labels"], to=T.UINT8),
            h.make_node("ReduceMax", ["p", "axis"], ["top"], keepdims=0),
            h.make_node("Mul", ["top", "scale"], ["bytes"]),
            h.make_node("Cast", ["bytes"], ["confidence"], to=T.UINT8),
        ]
        outputs += [value(name, T.UINT8, [batch, height, wide]) for name in ("labels", "confidence")]
    graph = h.make_graph(nodes, "edges", [value("frame", T.UINT8, [batch, height, wide, 3])], outputs, inits)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def edges_of(labels: np.ndarray) -> np.ndarray:
    """edge_bits int32 [H,W] of a class map: bit k where some, not all, of the 3x3 neighbours are class k."""
    padded = np.pad(labels, 1, mode="edge")  # what is beyond the frame changes nothing
    around = np.stack(
        [padded[i : i + labels.shape[0], j : j + labels.shape[1]] for i in range(3) for j in range(3)]
    )
    bits = np.zeros(labels.shape, np.int32)
    for k in range(len(CLASSES)):
        there = around == k
        bits |= np.where(there.any(0) & ~there.all(0), np.int32(1 << k), np.int32(0))
    return bits


@functools.cache
def good_edges(joint: bool = False) -> dict[str, np.ndarray]:
    """The golden set of the good network."""
    return golden(edges(*nearest_weights(), joint=joint), size=EDGE_SIZE)


def edge_manifest(*, joint: bool = False, size: tuple[int, int] = EDGE_SIZE, **more: Any) -> dict:
    """What makes a manifest one of an edge or joint engine."""
    return {
        "task": "joint" if joint else "edges",
        "size": size,
        "edge_classes": list(CLASSES),
        "edge_thresholds": list(THRESHOLDS),
        **more,
    }


def publish_edges(
    repository: Repository,
    name: str = "edges",
    model: onnx.ModelProto | bytes | None = None,
    *,
    joint: bool = False,
    **more: Any,
) -> int:
    """Publishes a version of an edge network (or a joint one); the default is the good one."""
    if model is None:
        model = edges(*nearest_weights(), joint=joint)
        more.setdefault("answers", good_edges(joint))
    return publish(repository, name, model, **edge_manifest(joint=joint, **more))


def simple() -> onnx.ModelProto:
    """Triton's "simple": OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1, int32 [-1,16]."""
    value = h.make_tensor_value_info
    graph = h.make_graph(
        [
            h.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            h.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        "simple",
        [value(n, T.INT32, ["N", 16]) for n in ("INPUT0", "INPUT1")],
        [value(n, T.INT32, ["N", 16]) for n in ("OUTPUT0", "OUTPUT1")],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)


def blocks(
    rng: np.random.Generator, size: tuple[int, int] = SIZE, block: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(frame uint8 [H,W,3], labels uint8 [H,W]): blocks of the classes' colours with a little noise."""
    height, width = size
    coarse = rng.integers(0, len(COLOURS), (height // block, width // block))
    coarse.flat[: len(COLOURS)] = rng.permutation(len(COLOURS))  # every class is there
    labels = coarse.repeat(block, 0).repeat(block, 1).astype(np.uint8)
    frame = COLOURS[labels] + rng.normal(0, 6, (height, width, 3))
    return frame.clip(0, 255).astype(np.uint8), labels


def golden(
    model: onnx.ModelProto, n: int = 2, seed: int = 7, size: tuple[int, int] = SIZE
) -> dict[str, np.ndarray]:
    """Frames with the answers of onnx's reference evaluator, which is not the engine under test."""
    rng = np.random.default_rng(seed)
    evaluator = ReferenceEvaluator(model)
    names = [output.name for output in model.graph.output if output.name != "probabilities"]
    frames = np.stack([blocks(rng, size, 16 if "edges" in names else 8)[0] for _ in range(n)])
    with np.errstate(invalid="ignore"):  # networks that are bad on purpose
        answers = [evaluator.run(names, {"frame": frame[None]}) for frame in frames]
    return {"frames": frames} | {
        name: np.concatenate([answer[i] for answer in answers]) for i, name in enumerate(names)
    }


def manifest(
    *, size: tuple[int, int] = SIZE, batch: int | str = 1, classes: tuple[str, ...] = CLASSES, **more: Any
) -> dict:
    return {
        "task": "segmentation",
        "engine": {"kind": "onnxruntime", "precision": "fp32", "file": "model.onnx", "opset": 18},
        "input": {"height": size[0], "width": size[1], "dynamic_batch": batch != 1},
        "classes": list(classes),
        "colours": COLOURS[: len(classes)].astype(int).tolist(),
        "output_stride": 2,
        "pack": {"name": "tiny", "version": "1", "sha256": "ab" * 32, "parent": ""},
        "adaptation": {},
        "gate": {},
        "parity": {},
        "libraries": {},
        **more,
    }


def publish(
    repository: Repository,
    name: str = "road",
    model: onnx.ModelProto | bytes | None = None,
    *,
    answers: dict[str, np.ndarray] | None = None,
    size: tuple[int, int] = SIZE,
    batch: int | str = 1,
    foreign: bool = False,
    sign: Any = None,
    **more: Any,
) -> int:
    """Publishes a version; the default is the good network.  `answers`: the golden set (default: the
    model's own).
    """
    if model is None:
        model = segmentation(*nearest_weights(), size, batch=batch)
    staged = repository.stage(name)
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (staged / "model.onnx").write_bytes(content)
    if foreign:
        return repository.publish(
            name, staged, {"engine": {"kind": "onnxruntime", "file": "model.onnx"}, **more}
        )
    if answers is None:
        assert not isinstance(model, bytes)
        answers = golden(model, size=size)
    np.savez(staged / "golden.npz", **answers)
    whole = manifest(size=size, batch=batch, **more)
    return repository.publish(name, staged, whole, "name: 'x'\n", list(CLASSES), sign)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
