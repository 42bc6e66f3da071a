"""The graph contract, in torch: what every engine must answer, and what parity is measured against.

    frame uint8 [N,H,W,3] RGB -> labels uint8 [N,H,W]
                                 confidence uint8 [N,H,W]       255 times the largest softmax, truncated
                                 probabilities float32 [N,C,h,w]  softmax at the logits' own resolution

Confidence is 1/sum(exp(x - max x)) of the enlarged logits: the largest softmax without ever computing a
full-resolution softmax.  `export.writer` writes the same graph as ONNX.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import SegmentationNetwork
from networks.pack import PackSpec, normalise

INPUT = "frame"
OUTPUTS = ("labels", "confidence", "probabilities")


class ServingGraph(nn.Module):
    """A network with its pre- and post-processing: uint8 frames in; labels, confidence, probabilities out."""

    def __init__(self, network: SegmentationNetwork, spec: PackSpec) -> None:
        super().__init__()
        self.network = network.eval()
        self.spec = spec

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [N,H,W,3] RGB -> labels uint8 [N,H,W], confidence uint8 [N,H,W], probabilities float32."""
        logits = self.network(normalise(frame, self.spec))
        full = F.interpolate(logits, size=frame.shape[1:3], mode="bilinear", align_corners=False)
        largest = full.amax(1, keepdim=True)
        confidence = 255.0 / torch.exp(full - largest).sum(1)
        return full.argmax(1).to(torch.uint8), confidence.to(torch.uint8), torch.softmax(logits, 1)
