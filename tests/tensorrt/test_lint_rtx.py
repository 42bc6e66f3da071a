"""The static check of export.graph.lint against the real parser and builder, on its own probe graphs."""

from __future__ import annotations

import pytest

from export.graph.lint import lint
from export.tensorrt.builder import BuildOptions, build_plan
from runtime.engines.tensorrt.library import Library, TensorRTError
from tests.export.test_lint import ILLEGAL, LEGAL

# The check is stricter here, on purpose: the parser takes what it does not document, or changes its meaning.
STRICTER = {
    "mode 'cubic'": "built, but the documented modes are nearest and linear",
    "opset 27": "the parser has no gate for opsets, but 9 to 24 are documented",
    "UINT8 quantisation becomes INT8": "built with a warning, with another range than was written",
}


def built(probe: object, library: Library) -> str:
    """Empty when TensorRT-RTX builds the graph, otherwise what it says."""
    content = probe.SerializeToString()  # type: ignore[attr-defined]
    quantised = b"QuantizeLinear" in content
    try:
        build_plan(content, BuildOptions(precision="int8" if quantised else "fp32"), library=library)
    except TensorRTError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", LEGAL)
def test_what_the_check_passes_is_built(library: Library, case: str) -> None:
    probe = LEGAL[case]()
    assert lint(probe).errors == []
    assert built(probe, library) == ""


@pytest.mark.parametrize("case", ILLEGAL)
def test_what_the_check_refuses_is_refused(library: Library, case: str) -> None:
    probe = ILLEGAL[case]()
    assert lint(probe).errors
    said = built(probe, library)
    if case in STRICTER:
        assert said == "", f"no longer accepted ({STRICTER[case]}): {said}"
    else:
        assert said
