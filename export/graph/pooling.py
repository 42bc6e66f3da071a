"""Adaptive average pooling in operations that every engine has."""

from __future__ import annotations

import numpy as np

from export.graph.onnx_graph import Graph

__all__ = ["adaptive_mean", "pooling_matrix"]


def adaptive_mean(graph: Graph, x: str, shape: tuple[int, ...], size: tuple[int, ...]) -> str:
    """Write `adaptive_avg_pool2d` from [N,C,h,w] to [N,C,*size] exactly; returns the name of the answer.

    Four cases of the same linear map: the whole map is a global mean; whole windows are a mean pooling;
    three to two is four strided poolings, interleaved; anything else is a product with one small constant
    matrix per side.
    """
    (h, w), (height, width) = shape[2:], size
    if (height, width) == (1, 1):
        return graph.node("GlobalAveragePool", [x])
    if (height, width) == (h, w):
        return x
    if h % height == 0 and w % width == 0:
        kernel = [h // height, w // width]
        return graph.node("AveragePool", [x], kernel_shape=kernel, strides=kernel)
    if 2 * h == 3 * height and 2 * w == 3 * width:
        return _three_to_two(graph, x, shape)
    # Rows first: it leaves the least to do for the columns.
    y = graph.node("MatMul", [graph.constant(pooling_matrix(h, height)), x])
    return graph.node("MatMul", [y, graph.constant(pooling_matrix(w, width).T)])


def _three_to_two(graph: Graph, x: str, shape: tuple[int, ...]) -> str:
    """Windows of two, starting at 0, 1, 3, 4, 6, 7, ...: even outputs at 3k, odd ones at 3k + 1."""
    h, w = shape[2:]
    parts = []
    for dy in (0, 1):
        for dx in (0, 1):
            part = x
            if dy or dx:
                part = graph.slice(x, {2: (dy, h), 3: (dx, w)})
            parts.append(graph.node("AveragePool", [part], kernel_shape=[2, 2], strides=[3, 3]))
    together = graph.node("Concat", parts, axis=1)
    # Concatenation put the phase before the channel, which is what DepthToSpace in mode DCR expects.
    return graph.node("DepthToSpace", [together], blocksize=2, mode="DCR")


def pooling_matrix(inputs: int, outputs: int) -> np.ndarray:
    """float32 [outputs, inputs]: row i averages floor(i*inputs/outputs) to ceil((i+1)*inputs/outputs)."""
    matrix = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        start, stop = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix
