"""TensorRT-RTX for the tests that send our code and graphs through NVIDIA's parser and builder, on a CPU."""

from __future__ import annotations

import platform
import sys

import pytest

from export.tensorrt.rtx import tensorrt_rtx
from runtime.engines.tensorrt.library import Library


@pytest.fixture(scope="session")
def library() -> Library:
    """Skipped only where NVIDIA has no wheel: elsewhere `make test` brings it, and absence is a failure."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("NVIDIA has no TensorRT-RTX wheel for this platform")
    return tensorrt_rtx()
