"""From a built engine to a version directory in a repository."""

from __future__ import annotations

from export.publish.foreign import publish_onnx
from export.publish.publish import Published

__all__ = ["Published", "publish_onnx"]
