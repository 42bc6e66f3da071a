"""SHADOWING: a candidate runs on a sample of live frames, off the answer path.

Nothing it computes is answered to anybody; what it shows is compared with what the live
version answered on the same frames.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from runtime import guard
from runtime.config import ServerConfig
from runtime.errors import Refused
from runtime.tap import Sampler
from runtime.verify import Candidate, Verifier, class_count, timed, total


class Shadow:
    """`stopping` is set when the server stops; a shadow then ends at its next frame."""

    def __init__(self, verifier: Verifier, config: ServerConfig, stopping: threading.Event) -> None:
        self.host = verifier.host
        self._verifier = verifier
        self._config = config
        self._stopping = stopping

    def configure(self, config: ServerConfig) -> None:
        self._config = config

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Runs a sample of live frames through the candidate.  Raises Refused; returns what it saw."""
        limits, spec = self._config.shadow, candidate.engine.spec
        if not spec.segmentation:
            return {"frames": 0, "note": "not shadowed: outputs are not those of the graph contract"}
        if not limits.enabled:
            return self._golden_decides(candidate, "shadowing is switched off")
        sampler = Sampler(limit=2)
        self.host.observe(sampler)
        names = [name for name in ("labels", "confidence", "probabilities") if spec.output(name)]
        classes = class_count(candidate.manifest)
        comparison = guard.Comparison(np.zeros((classes, classes), np.int64))
        seen: list[guard.Look] = []
        theirs: list[guard.Look] = []
        with_confidence = True
        costs: list[float] = []
        begun = time.monotonic()
        try:
            while len(seen) < limits.frames and (left := begun + limits.timeout - time.monotonic()) > 0:
                if self._stopping.is_set():
                    raise Refused("stopping", "the server is shutting down; submit again")
                idle = limits.idle_timeout if not seen else max(limits.idle_timeout, 1.0)
                observation = sampler.get(min(left, idle))
                if observation is None:
                    if not seen:
                        break
                    continue
                started = time.monotonic()
                answer, cost = timed(
                    candidate.engine, {"frame": np.ascontiguousarray(observation.frame[:1])}, names
                )
                costs.append(cost)
                mine = guard.look(answer["labels"], answer["confidence"], classes)
                if reason := guard.not_finite(mine, answer.get("probabilities")):
                    raise Refused("shadow-finite", f"on live frame {len(seen) + 1}: {reason}")
                sure = observation.confidence
                with_confidence = with_confidence and sure is not None
                seen.append(mine)
                theirs.append(
                    guard.look(observation.labels[:1], sure[:1] if sure is not None else None, classes)
                )
                comparison += guard.compare(observation.labels[:1], answer["labels"], classes)
                # Leave the cores to the answers: rest in proportion to the work.
                self._stopping.wait((time.monotonic() - started) * (1.0 / limits.duty - 1.0))
        finally:
            self.host.unobserve(sampler)
        if len(seen) < limits.min_frames:
            why = "no live traffic" if not seen else f"only {len(seen)} live frames in {limits.timeout:.0f} s"
            return self._golden_decides(candidate, why)
        mine, other = total(seen), total(theirs)
        cost = float(np.median(costs))
        report: dict[str, Any] = {
            "frames": len(seen),
            "seconds": round(time.monotonic() - begun, 3),
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
            "speckle": [round(other.speckle, 4), round(mine.speckle, 4)],
            "confidence": [round(other.mean_confidence, 1), round(mine.mean_confidence, 1)],
            "shares": [[round(float(x), 4) for x in other.shares], [round(float(x), 4) for x in mine.shares]],
            "cost_ms": round(cost, 3),
        }
        guards = self._config.guard
        if reason := guard.collapsed(mine, other, guards, candidate.classes, limits.max_vanished):
            raise Refused("shadow-collapse", reason, report)
        if reason := guard.disagrees(comparison, mine, other, limits, confidence=with_confidence):
            raise Refused("shadow-agreement", reason, report)
        live = self.host.live
        known = self._verifier.goldens.get(live.version) if live is not None else None
        if known is not None and known.cost_ms > 0:
            limit = limits.max_latency_ratio * known.cost_ms + guards.latency_slack_ms
            if cost > limit:
                reason = (
                    f"{cost:.1f} ms a live frame, the live version took "
                    f"{known.cost_ms:.1f} (limit {limit:.1f})"
                )
                raise Refused("shadow-latency", reason, report)
        return report

    def _golden_decides(self, candidate: Candidate, why: str) -> dict[str, Any]:
        """The same judgement on the golden frames, which are of the source domain."""
        note = f"{why}: decided by the golden frames alone"
        live = self.host.live
        if live is None or not live.engine.spec.segmentation:
            return {"frames": 0, "note": note}
        golden = self._verifier.reference_golden(live, candidate)
        classes = class_count(candidate.manifest)
        comparison = guard.Comparison(np.zeros((classes, classes), np.int64))
        for key in candidate.frames:
            comparison += guard.compare(golden.labels[key], candidate.golden.labels[key], classes)
        mine = total([candidate.golden.looks[key] for key in candidate.frames])
        other = total([golden.looks[key] for key in candidate.frames])
        report = {
            "frames": 0,
            "note": note,
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
        }
        if reason := guard.disagrees(comparison, mine, other, self._config.shadow):
            raise Refused("shadow-agreement", f"on the golden frames ({why}): {reason}", report)
        return report
