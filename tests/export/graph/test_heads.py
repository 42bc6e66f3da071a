"""Both forms of a graph's last part answer the same, ties and what is not finite included."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.graph import heads
from export.graph.contract import Contract
from export.graph.lint import lint
from export.graph.onnx_graph import Graph

CLASSES = 5
EDGES = Contract("edges", (), tuple("abcde"), (0.1, 0.3, 0.5, 0.7, 0.9))


def session(kind, form, shape, size, contract=EDGES):
    graph = Graph(18)
    outputs = heads.write_head(graph, kind, heads.Logits("x", shape, size, "N"), contract, form)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "head", [x], outputs, list(graph.initialisers.values())),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    assert not lint(model).errors
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def both(kind, x, size, contract=EDGES):
    runs = [session(kind, form, x.shape[1:], size, contract) for form in heads.FORMS]
    names = [o.name for o in runs[0].get_outputs()]
    assert names == [o.name for o in runs[1].get_outputs()]
    return zip(names, *(run.run(names, {"x": x}) for run in runs), strict=True)


def logits(seed=0, n=2, shape=(CLASSES, 6, 10)):
    return (4 * np.random.default_rng(seed).standard_normal((n, *shape))).astype(np.float32)


@pytest.mark.parametrize("kind", ["segmentation", "edges"])
@pytest.mark.parametrize("scale", [1, 2, 8])
def test_both_forms_answer_the_same(kind, scale):
    x = logits()
    for name, whole, per_class in both(kind, x, (6 * scale, 10 * scale)):
        assert whole.dtype == per_class.dtype
        assert whole.shape == per_class.shape
        if name == "confidence":  # sums of floats, in an order of the library's
            assert np.abs(whole.astype(int) - per_class).max() <= 1
        else:
            assert np.array_equal(whole, per_class)


def test_the_answers_are_numpys():
    x = logits()
    for form in heads.FORMS:
        labels, confidence, _ = session("segmentation", form, x.shape[1:], (6, 10)).run(None, {"x": x})
        assert np.array_equal(labels, x.argmax(1))
        share = 255 / np.exp(x - x.max(1, keepdims=True)).sum(1)
        assert np.abs(confidence - share).max() < 1.001
        bits, edges = session("edges", form, x.shape[1:], (6, 10)).run(None, {"x": x})
        p = 1 / (1 + np.exp(-x.astype(np.float64)))
        limits = np.array(EDGES.thresholds)[:, None, None]
        assert np.array_equal(bits, ((p >= limits) * 2 ** np.arange(5)[:, None, None]).sum(1))
        assert np.array_equal(edges, np.floor(255 * p + 0.5))


def test_of_equal_classes_the_first_is_taken():
    x = np.zeros((1, CLASSES, 4, 4), np.float32)
    x[:, 2:, :2] = 1.0
    x[:, 4, 3] = 1.0
    for name, whole, per_class in both("segmentation", x, (4, 4)):
        assert np.array_equal(whole, per_class)
        if name == "labels":
            assert whole[0, :, 0].tolist() == [2, 2, 0, 4]


def test_what_is_not_finite_stays_inside_the_classes():
    x = np.full((1, CLASSES, 4, 4), np.nan, np.float32)
    found = {name: per_class for name, _, per_class in both("segmentation", x, (8, 8))}
    assert found["labels"].max() < CLASSES
    assert not np.isfinite(found["probabilities"]).any()


def test_one_class_is_everywhere():
    for name, whole, per_class in both("segmentation", logits(shape=(1, 6, 10)), (12, 20)):
        assert np.array_equal(whole, per_class)
        assert name != "confidence" or (whole == 255).all()
