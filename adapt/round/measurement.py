"""What is measured of a network on the hold-outs of a round.  The network is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adapt import batchnorm, inference
from adapt.gate.measures import Measures, measure, pixel_agreement, scores, source_score, translated
from adapt.round.base import Pair, spread
from adapt.round.config import RoundConfig
from adapt.round.inputs import RoundInputs
from common.progress import Progress
from networks.pack import PackSpec, normalise

__all__ = ["HoldoutMeasurement", "normalised_batches"]


def normalised_batches(
    frames: Sequence[np.ndarray], spec: PackSpec, size: int, device: str
) -> Iterator[tuple[Tensor, int]]:
    """Yield (float32 [n,3,H,W] on `device`, frames so far) for estimates of batch statistics.

    A last batch of a single frame is left out: its variance would weigh as much as that of a full batch.
    """
    for start in range(0, len(frames), size):
        chunk = frames[start : start + size]
        if len(chunk) < 2 and start:
            break
        yield normalise(inference.as_tensor(chunk).to(device), spec), start + len(chunk)


class HoldoutMeasurement:
    """Measures networks on the hold-outs of `inputs`."""

    def __init__(self, inputs: RoundInputs, config: RoundConfig, progress: Progress) -> None:
        self.inputs, self.config, self.progress, self.spec = inputs, config, progress, inputs.spec

    def full(
        self, network: nn.Module, stage: str, comparison_weights: Mapping[str, Tensor] | None = None
    ) -> Measures:
        """Everything the gate asks for.

        Args:
            stage: name for the progress.
            comparison_weights: parameters by name that the network is compared with: the mean of its weights
                along the training (or the student, if the network is that mean).
        """
        self.progress(stage, 0, 1)
        inputs, batch = self.inputs, self.config.infer_batch
        measures = measure(
            network,
            self.spec,
            inputs.holdout,
            batch=batch,
            following=inputs.following,
            limits=self.config.limits,
        )
        if inputs.layout is not None:
            measures.layouts = inputs.layout.scores(measures.labels)
        state = {k: v.clone() for k, v in network.state_dict().items()}
        if comparison_weights is not None:
            network.load_state_dict({**state, **comparison_weights})
            other = measure(network, self.spec, inputs.holdout, batch=batch)
            measures.teacher = pixel_agreement(measures, other)
            network.load_state_dict(state)
        if inputs.labelled:
            measures.labelled = source_score(network, self.spec, inputs.labelled, batch=batch)
        if inputs.source_holdout:
            self._source(network, state, measures)
        self.progress(stage, 1, 1)
        return measures

    def quick(self, network: nn.Module, *, translated: bool) -> Measures:
        """What a choice between batch statistics asks for.

        Args:
            translated: measure on the source hold-out in the target's colours too.
        """
        batch = self.config.infer_batch
        measures = measure(network, self.spec, self.inputs.holdout, batch=batch)
        if translated:
            measures.translated = source_score(network, self.spec, self._translated(), batch=batch)
        return measures

    def _source(self, network: nn.Module, state: Mapping[str, Tensor], measures: Measures) -> None:
        """Score the source hold-out as served, in the target's colours, and with the source's statistics."""
        inputs, batch = self.inputs, self.config.infer_batch
        served, calibration = scores(network, self.spec, inputs.source_holdout, batch=batch)
        measures.source = measures.source_served = served.miou()
        measures.calibration, measures.source_iou = calibration.ece(), served.iou()
        measures.translated = source_score(network, self.spec, self._translated(), batch=batch)
        if not self.config.adabn or not batchnorm.has_statistics(network):
            return
        size = self.config.adabn_batch
        frames = [x for x, _ in spread(inputs.replay or inputs.source_holdout, 4 * size)]
        batches = normalised_batches(frames, self.spec, size, self.config.device)
        batchnorm.reestimate(network, (x for x, _ in batches))
        own, calibration = scores(network, self.spec, inputs.source_holdout, batch=batch)
        measures.source, measures.source_iou = own.miou(), own.iou()
        measures.calibration = calibration.ece()
        network.load_state_dict(state)

    def _translated(self) -> list[Pair]:
        """The source hold-out in the colours of the target hold-out; the labels stay true."""
        styles = self.inputs.holdout
        return [
            (translated(x, styles[i % len(styles)]), y) for i, (x, y) in enumerate(self.inputs.source_holdout)
        ]

    def confidence(self, state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, np.ndarray]:
        """Reference statistics of weights on all target frames, from which drift is measured later.

        Returns:
            share: float64 [C], and confidence: histograms [C,256].
        """
        network.load_state_dict(dict(state))
        network = network.to(self.config.device).eval()
        batch = self.config.infer_batch
        histogram = inference.confidence_histogram(network, self.spec, self.inputs.frames, batch=batch)
        return {"share": histogram.sum(1) / histogram.sum(), "confidence": histogram}
