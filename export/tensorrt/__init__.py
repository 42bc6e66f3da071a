"""From an ONNX graph to a TensorRT plan."""

from __future__ import annotations

from export.tensorrt.builder import build_plan
from export.tensorrt.monitor import Cancelled
from export.tensorrt.plan import BACKENDS, BuildOptions, Plan, parse_batch
from export.tensorrt.refit import refit_plan

__all__ = ["BACKENDS", "BuildOptions", "Cancelled", "Plan", "build_plan", "parse_batch", "refit_plan"]
