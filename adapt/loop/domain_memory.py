"""Which domain is this?  Remembers the domains that versions were adapted to and decides what should answer.

The *feature statistics* of a few frames are the mean and variance before the first batch normalisations of
the released network.  They describe the picture's appearance (light, haze, sensor, contrast) and hardly its
content.  Two of them are compared by the Bhattacharyya distance of their channels' normal distributions, mean
over channels and layers.  Those of the released network are its running statistics; every version that goes
live leaves those of its frames here.  Measured (docs/results/continual.md): statistics of one road differ by
0.00 to 0.05, those of day and dusk, fog or night by 0.04 to 0.6, with rendered streets and with CamVid alike.

`DomainPolicy` is offered the frames that are kept and decides after every few of them what should answer:

    stay      the live version was adapted to a domain like this
    back      another version was: return to it, nothing has to be learnt
    refresh   no version was: new batch statistics now, from these frames; a training round follows when its
              frames are there

Knows networks and numpy arrays; knows neither the frame store nor the service.  Version 0 is the released
pack.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapt import batchnorm, inference
from adapt.data.base import resize_frame
from common.files import MAX_JSON_BYTES
from networks.pack import Pack, normalise

__all__ = [
    "RELEASED",
    "Action",
    "DomainConfig",
    "DomainPolicy",
    "FeatureProbe",
    "FeatureStats",
    "KnownDomain",
    "distance",
]

RELEASED = 0
EPSILON = 1e-5  # of batch normalisation
PIXELS, STRIPS = 65536, 8  # most pixels of a frame that are measured, and most strips it is cut into for that
CAMERAS = 16  # most cameras whose latest frames are held in memory


@dataclass(frozen=True)
class DomainConfig:
    """When a change of domain is recognised.  Raises ValueError for values that cannot be.

    frames  kept frames per measurement
    agree   consecutive measurements that must agree before anything is done
    near    largest distance at which a measurement is of a known domain
    nearer  another version takes over if the distance to its domain is at most this fraction of the distance
            to the live version's, above 0 to 1
    layers  batch normalisations that are measured
    known   domains that are remembered
    """

    frames: int = 6
    agree: int = 2
    near: float = 0.05
    nearer: float = 0.5
    layers: int = 4
    known: int = 8

    def __post_init__(self) -> None:
        counts = (self.frames, self.agree, self.layers, self.known)
        if min(counts) < 1 or not self.near > 0 or not 0 < self.nearer <= 1:
            raise ValueError(f"{self}: counts from 1 on, near above 0, nearer above 0 and at most 1")


@dataclass(frozen=True)
class FeatureStats:
    """Mean and variance of features over frames and positions.

    mean, variance: float32 [C], the channels of all layers in one row.  widths: channels per layer, their sum
    is C.  frames: how many were measured.
    """

    mean: np.ndarray
    variance: np.ndarray
    widths: tuple[int, ...]
    frames: int = 0

    def joined(self, other: FeatureStats) -> FeatureStats:
        """Return the statistics of both sets of frames together."""
        n = self.frames + other.frames
        a, b = self.frames / n, other.frames / n
        mean = a * self.mean + b * other.mean
        second = a * (self.variance + self.mean**2) + b * (other.variance + other.mean**2)
        return FeatureStats(mean, np.maximum(second - mean**2, 0.0), self.widths, n)


def distance(one: FeatureStats, other: FeatureStats) -> float:
    """Return the Bhattacharyya distance of two normal distributions, mean over channels, then over layers.

    0 = alike; infinite if the statistics are of different networks.
    """
    if one.widths != other.widths:
        return float("inf")
    a, b = one.variance + EPSILON, other.variance + EPSILON
    v = (a + b) / 2
    each = (one.mean - other.mean) ** 2 / (8 * v) + 0.5 * np.log(v / np.sqrt(a * b))
    ends = np.cumsum(one.widths)[:-1]
    return float(np.mean([part.mean() for part in np.split(each, ends)]))


class _AllMeasured(Exception):
    """All layers were measured: the rest of the network need not be computed."""


class FeatureProbe:
    """Measures frames with the first layers of the released network.

    Raises ValueError if the network has no batch normalisation.
    """

    def __init__(self, pack: Pack, layers: int = DomainConfig.layers) -> None:
        self.spec = pack.spec
        self.network = pack.network().eval()
        self._measured: list[tuple[nn.Module, np.ndarray, np.ndarray]] = []
        found = list(batchnorm.layers(self.network))
        if not found:
            raise ValueError("the network has no batch normalisation: a change of road cannot be seen")
        self._layers = min(layers, len(found))
        for module in found:
            module.register_forward_pre_hook(self._on_layer)
        # Hooks run in the order of the forward pass, which need not be that of the modules.
        self._order = [module for module, _, _ in self._forward(self._grey())]

    def _grey(self) -> np.ndarray:
        return np.full((1, *self.spec.size, 3), 127, np.uint8)

    def _on_layer(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if any(module is one for one, _, _ in self._measured):
            return
        x = inputs[0].float()
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, axes, unbiased=False)
        self._measured.append((module, mean.cpu().numpy(), variance.cpu().numpy()))
        if len(self._measured) >= self._layers:
            raise _AllMeasured

    @torch.no_grad()
    def _forward(self, frames: np.ndarray) -> list[tuple[nn.Module, np.ndarray, np.ndarray]]:
        """Return (layer, mean, variance) of the first layers for frames uint8 [N,H,W,3]."""
        self._measured = []
        with contextlib.suppress(_AllMeasured):
            self.network(normalise(inference.as_tensor(frames), self.spec))
        return self._measured

    def strips(self, frames: Sequence[np.ndarray], first: int = 0) -> np.ndarray:
        """Return what is measured of frames uint8 [H,W,3], each resized to the pack's size: uint8 [N,h,w,3].

        Of a large frame only an upright strip is measured, the next strip of the next frame: the network sees
        the scale it knows, and the cost is bounded.  first: the strip of the first frame.
        """
        height, width = self.spec.size
        count = min(STRIPS, max(1, -(-height * width // PIXELS)))
        wide = width // count
        parts = []
        for i, frame in enumerate(frames, first):
            left = i % count * wide
            parts.append(resize_frame(frame, self.spec.size)[:, left : left + wide])
        return np.stack(parts)

    def measure(self, frames: Sequence[np.ndarray], first: int = 0) -> FeatureStats:
        """Return the statistics of frames uint8 [H,W,3].  first: see `strips`."""
        measured = self._forward(self.strips(frames, first))
        return _joined_layers([(mean, variance) for _, mean, variance in measured], len(frames))

    def measure_all(self, frames: Iterable[np.ndarray], chunk: int = 6) -> FeatureStats:
        """Return the statistics of any number of frames, `chunk` in memory at a time.

        Raises ValueError if there is no frame.
        """
        total: FeatureStats | None = None
        pending: list[np.ndarray] = []

        def join() -> FeatureStats:
            stats = self.measure(pending, total.frames if total else 0)
            return stats if total is None else total.joined(stats)

        for frame in frames:
            pending.append(frame)
            if len(pending) == chunk:
                total, pending = join(), []
        if pending:
            total = join()
        if total is None:
            raise ValueError("no frame to look at")
        return total

    def released(self) -> FeatureStats:
        """Return the running statistics that the network was released with."""
        parts = [(np.asarray(m.running_mean), np.asarray(m.running_var)) for m in self._order]
        return _joined_layers(parts, 1)


def _joined_layers(parts: Sequence[tuple[np.ndarray, np.ndarray]], frames: int) -> FeatureStats:
    mean = np.concatenate([m for m, _ in parts]).astype(np.float32)
    variance = np.concatenate([v for _, v in parts]).astype(np.float32)
    return FeatureStats(mean, variance, tuple(len(m) for m, _ in parts), frames)


@dataclass(frozen=True)
class Action:
    """What should be done.

    kind: "stay", "back" or "refresh".  version: what should answer.  why: one line.  sure: False until
    `agree` measurements agree.
    """

    kind: str
    version: int = RELEASED
    why: str = ""
    sure: bool = True


@dataclass
class KnownDomain:
    """A domain by its statistics, and the version that answers best there.

    source: the camera.  used: when it was recognised last, in seconds since the epoch.
    """

    stats: FeatureStats
    version: int
    source: str = ""
    used: float = 0.0


@dataclass
class DomainPolicy:
    """Decides what should answer, measurement by measurement.

    Args:
        probe: measures the frames.
        file: stores the known domains over restarts; None = they are lost.
    """

    probe: FeatureProbe
    config: DomainConfig = field(default_factory=DomainConfig)
    file: Path | None = None

    def __post_init__(self) -> None:
        self.released = KnownDomain(self.probe.released(), RELEASED)
        self.domains: list[KnownDomain] = self._read()
        # Per camera: consecutive measurements, and which version's domain each is of (None = a new domain).
        self._recent: dict[str, list[tuple[FeatureStats, int | None]]] = {}
        self._pending: dict[str, list[np.ndarray]] = {}  # per camera: frames of the next measurement

    # ------------------------------------------------------------------------------------------ the memory
    def _read(self) -> list[KnownDomain]:
        if self.file is None or not self.file.is_file():
            return []
        try:
            if self.file.stat().st_size > MAX_JSON_BYTES:
                raise ValueError("larger than any that is written")
            with np.load(io.BytesIO(self.file.read_bytes()), allow_pickle=False) as stored:
                domains, like = [], self.released.stats
                for i, one in enumerate(json.loads(str(stored["roads"]))):
                    stats = FeatureStats(
                        stored[f"mean_{i}"], stored[f"variance_{i}"], like.widths, int(one["frames"])
                    )
                    if stats.mean.shape == like.mean.shape == stats.variance.shape:
                        domains.append(
                            KnownDomain(stats, int(one["version"]), str(one["source"]), float(one["used"]))
                        )
                return domains
        except Exception:  # what cannot be read is learnt again
            return []

    def _write(self) -> None:
        if self.file is None:
            return
        rows = [
            {"version": d.version, "source": d.source, "used": d.used, "frames": d.stats.frames}
            for d in self.domains
        ]
        arrays = {f"mean_{i}": d.stats.mean for i, d in enumerate(self.domains)}
        arrays |= {f"variance_{i}": d.stats.variance for i, d in enumerate(self.domains)}
        temporary = self.file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # on a full disk the domains are known until the next start
            with open(temporary, "wb") as out:
                np.savez(out, roads=np.array(json.dumps(rows)), **arrays)  # type: ignore[arg-type]
            os.replace(temporary, self.file)

    def learn(self, version: int, stats: FeatureStats, source: str = "") -> None:
        """Remember that `version` answers the domain with these statistics."""
        self.domains = [
            d for d in self.domains if d.source != source or distance(d.stats, stats) > self.config.near
        ]
        self.domains.append(KnownDomain(stats, version, source, time.time()))
        if len(self.domains) > self.config.known:
            self.domains.remove(min(self.domains, key=lambda d: d.used))
        self.start_again()
        self._write()

    def forget(self, version: int) -> None:
        """Forget the domains of `version`: it was rejected or deleted."""
        self.domains = [d for d in self.domains if d.version != version]
        self._write()

    def versions(self) -> set[int]:
        """Return the versions that some known domain may need again."""
        return {d.version for d in self.domains} - {RELEASED}

    # ------------------------------------------------------------------------------------- the measurements
    def start_again(self) -> None:
        """Drop the frames and measurements since the last decision."""
        self._recent.clear()
        self._pending.clear()

    @property
    def cameras(self) -> int:
        """How many cameras have frames in memory."""
        return len(self._pending)

    def offer(self, frame: np.ndarray, live: int, source: str = "") -> Action | None:
        """Take a frame uint8 [H,W,3] of this camera; return an Action after every `frames` of them.

        It returns None in between.  live: the version that answers now.  Only the camera that it was adapted
        to decides; while the released version answers, any camera does.
        """
        owners = {d.source for d in self.domains if d.version == live}
        if live != RELEASED and owners and source not in owners:
            return None
        if source not in self._pending and len(self._pending) >= CAMERAS:  # bounds the memory
            self.start_again()
        frames = self._pending.setdefault(source, [])
        frames.append(resize_frame(frame, self.probe.spec.size))
        if len(frames) < self.config.frames:
            return None
        stats = self.probe.measure(frames)
        frames.clear()
        recent = [*self._recent.get(source, []), (stats, self._nearest_version(stats, live, source))]
        self._recent[source] = recent = recent[-self.config.agree :]
        if len(recent) < self.config.agree or len({version for _, version in recent}) > 1:
            return Action("stay", live, "not sure yet", sure=False)
        return self._decide(recent[-1][1], self.recent_stats(source), live, source)

    def recent_stats(self, source: str = "") -> FeatureStats:
        """Return the joined statistics that the latest decision about this camera was made from."""
        (total, _), *rest = self._recent[source]
        for stats, _ in rest:
            total = total.joined(stats)
        return total

    def refreshed(
        self, version: int | None, failed: Sequence[str], live: int, stats: FeatureStats, source: str = ""
    ) -> int:
        """Learn how a refresh ended, so that the same domain is not refreshed again.

        version: what it made live, or None.  failed: names of the gate's checks that it failed.

        Returns the version that should answer this domain from now on.
        """
        answer = live if version is None else version
        if version is None and "changed" in failed:  # the released statistics are the best there are
            answer = RELEASED
        self.learn(answer, stats, source)
        return answer

    def _known(self, source: str) -> list[KnownDomain]:
        return [self.released, *(d for d in self.domains if d.source == source)]

    def _nearest_version(self, stats: FeatureStats, live: int, source: str) -> int | None:
        """Return the version of the nearest known domain; None if no known domain is near."""
        known = self._known(source)
        nearest = min(known, key=lambda d: distance(d.stats, stats))
        of_live = min((distance(d.stats, stats) for d in known if d.version == live), default=float("inf"))
        best = distance(nearest.stats, stats)
        if best > self.config.near:
            return None
        if of_live <= self.config.near and best > self.config.nearer * of_live:
            return live
        return nearest.version

    def _decide(self, version: int | None, stats: FeatureStats, live: int, source: str) -> Action:
        known = self._known(source)
        far = min((distance(d.stats, stats) for d in known if d.version == live), default=float("inf"))
        if version == live:
            return Action("stay", live, f"the road of version {live} (distance {far:.3f})")
        if version is None:
            best = min(distance(d.stats, stats) for d in known)
            return Action("refresh", live, f"no known road is near: the nearest at {best:.3f}")
        nearest = min((d for d in known if d.version == version), key=lambda d: distance(d.stats, stats))
        nearest.used = time.time()
        name = f"version {version}" if version else "the released version"
        near = distance(nearest.stats, stats)
        return Action("back", version, f"the road of {name} (distance {near:.3f}; of what is live {far:.3f})")
