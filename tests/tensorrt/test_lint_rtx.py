"""The static check of export.graph.lint against the real parser and builder, on its own probe graphs."""

from __future__ import annotations

import warnings

import pytest

from export.graph.lint import lint
from export.tensorrt import BuildOptions, build_plan
from runtime.engines.tensorrt.library import Library, Log, TensorRTError, logger
from tests.export.graph.test_lint import ILLEGAL, LEGAL, WARNED


def built(probe: object, library: Library) -> str:
    """Empty when TensorRT-RTX builds the graph, otherwise what it says."""
    content = probe.SerializeToString()  # type: ignore[attr-defined]
    quantised = b"QuantizeLinear" in content
    try:
        build_plan(content, BuildOptions(precision="int8" if quantised else "fp32"), library=library)
    except TensorRTError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", [*LEGAL, *WARNED])
def test_what_the_check_passes_is_built(library: Library, case: str) -> None:
    probe = {**LEGAL, **WARNED}[case]()
    assert lint(probe).errors == []
    assert built(probe, library) == ""


@pytest.mark.parametrize("case", ILLEGAL)
def test_what_the_check_refuses_is_refused(library: Library, case: str) -> None:
    probe = ILLEGAL[case]()
    assert lint(probe).errors
    assert built(probe, library)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_node_tests_of_onnx(library: Library) -> None:
    """The check refuses nothing that the parser takes, and passes little of what it refuses: what depends on
    ranks and sizes, and on plugins, which TensorRT-RTX does not have."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(action="ignore"):
        models = {case.name: case.model for case in collect_testcases(None) if case.model is not None}
    too_strict, missed = [], []
    for name, model in models.items():
        taken, refused = parsed(model.SerializeToString(), library), bool(lint(model).errors)
        if taken and refused:
            too_strict.append(name)
        if not taken and not refused:
            missed.append(name)
    assert too_strict == []
    assert len(models) > 1000
    assert len(missed) < 0.04 * len(models), missed


def parsed(content: bytes, library: Library) -> bool:
    trt, log = library.module, logger(library, Log())
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return bool(trt.OnnxParser(network, log).parse(content))
