"""The TensorRT backend: plans, execution contexts and CUDA graphs."""

from __future__ import annotations

from runtime.engines.tensorrt.engine import TensorRTEngine

__all__ = [
    "TensorRTEngine",
]
