"""From an ONNX graph to a TensorRT plan."""

from __future__ import annotations

from export.tensorrt.builder import BuildOptions, Plan, build_plan, refit_plan

__all__ = [
    "BuildOptions",
    "Plan",
    "build_plan",
    "refit_plan",
]
