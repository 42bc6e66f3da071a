"""Which road is this?  The roads that versions were adapted to, and what to do when it is another one.

A *look* is the mean and variance that a few frames have before the first batch normalisations of the released
network.  That is how the picture looks (light, haze, sensor, contrast) and hardly what is in it.  Two looks
are compared by the Bhattacharyya distance of their channels' normal distributions, mean over channels and
layers.  The released network brings its own look: its running statistics; every version that goes live leaves
the look of its frames here.  Measured (docs/results/continual.md): looks of one road differ by 0.00 to 0.05,
those of day and dusk, fog or night by 0.04 to 0.6, with rendered streets and with CamVid alike.

`Response` is offered the frames that are kept, and says after every few of them what should answer here:

    stay      what is live was adapted to a road like this
    back      another version was: go back to that one, nothing has to be learnt
    refresh   no version was: new batch statistics now, from these frames; a training round follows when its
              frames are there

Knows networks and numpy arrays; neither the frame store nor the service.  Version 0 is the released pack.
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
from adapt.files import MOST_BYTES
from networks.pack.pack import Pack, normalise

__all__ = [
    "RELEASED", "Action", "Look", "Probe", "Response", "Road", "RoadConfig", "distance",
]  # fmt: skip

RELEASED = 0
EPSILON = 1e-5  # of batch normalisation
PIXELS, STRIPS = 65536, 8  # of a frame that are looked at, and the most strips it is cut into for that
CAMERAS = 16  # whose latest frames are held


@dataclass(frozen=True)
class RoadConfig:
    """frames: kept frames of one look.  agree: looks in a row that must say the same.  near: distance up to
    which a look is of a known road.  nearer: a version takes over from the live one where the road's look is
    nearer to its own by this factor.  layers: batch normalisations looked at.  known: roads remembered.
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
class Look:
    """mean, variance: float32, all channels of all layers in one row, and the layers' widths."""

    mean: np.ndarray
    variance: np.ndarray
    widths: tuple[int, ...]
    frames: int = 0

    def joined(self, other: Look) -> Look:
        """The look of both sets of frames together."""
        n = self.frames + other.frames
        a, b = self.frames / n, other.frames / n
        mean = a * self.mean + b * other.mean
        second = a * (self.variance + self.mean**2) + b * (other.variance + other.mean**2)
        return Look(mean, np.maximum(second - mean**2, 0.0), self.widths, n)


def distance(one: Look, other: Look) -> float:
    """Bhattacharyya distance of two normal distributions a channel; mean over a layer's channels, then over
    layers.  0 = alike; infinite where the looks are of different networks.
    """
    if one.widths != other.widths:
        return float("inf")
    a, b = one.variance + EPSILON, other.variance + EPSILON
    v = (a + b) / 2
    each = (one.mean - other.mean) ** 2 / (8 * v) + 0.5 * np.log(v / np.sqrt(a * b))
    ends = np.cumsum(one.widths)[:-1]
    return float(np.mean([part.mean() for part in np.split(each, ends)]))


class _Enough(Exception):
    """All layers were seen: the rest of the network need not be computed."""


class Probe:
    """Takes looks with the first layers of the released network.

    Raises ValueError where the network has no batch normalisation: there is nothing to look at.
    """

    def __init__(self, pack: Pack, layers: int = RoadConfig.layers) -> None:
        self.spec = pack.spec
        self.network = pack.network().eval()
        self._seen: list[tuple[nn.Module, np.ndarray, np.ndarray]] = []
        self._wanted = layers
        found = list(batchnorm.layers(self.network))
        if not found:
            raise ValueError("the network has no batch normalisation: a change of road cannot be seen")
        self._wanted = min(layers, len(found))
        for module in found:
            module.register_forward_pre_hook(self._note)
        self._run(np.full((*self.spec.size, 3), 127, np.uint8)[None])  # the order in which they are run
        self._order = [module for module, _, _ in self._seen]

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if any(module is one for one, _, _ in self._seen):
            return
        x = inputs[0].float()
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, axes, unbiased=False)
        self._seen.append((module, mean.cpu().numpy(), variance.cpu().numpy()))
        if len(self._seen) >= self._wanted:
            raise _Enough

    @torch.no_grad()
    def _run(self, frames: np.ndarray) -> None:
        self._seen = []
        with contextlib.suppress(_Enough):
            self.network(normalise(inference.as_tensor(frames), self.spec))

    def look(self, frames: Sequence[np.ndarray], first: int = 0) -> Look:
        """Of frames uint8 [H,W,3]; each is resized to the pack's size.

        Of large ones an upright strip of each is looked at, the next one of the next frame: the scale stays
        what the network knows, and the cost bounded.  `first`: with which strip to begin.
        """
        height, width = self.spec.size
        strips = min(STRIPS, max(1, -(-height * width // PIXELS)))
        wide = width // strips
        parts = []
        for i, frame in enumerate(frames, first):
            left = i % strips * wide
            parts.append(resize_frame(frame, self.spec.size)[:, left : left + wide])
        self._run(np.stack(parts))
        return _row([(mean, variance) for _, mean, variance in self._seen], len(frames))

    def all_of(self, frames: Iterable[np.ndarray], chunk: int = 6) -> Look:
        """Of any number of frames, a few in memory at a time."""
        found: Look | None = None
        some: list[np.ndarray] = []
        for frame in frames:
            some.append(frame)
            if len(some) == chunk:
                look, some = self.look(some, found.frames if found else 0), []
                found = look if found is None else found.joined(look)
        if some:
            look = self.look(some, found.frames if found else 0)
            found = look if found is None else found.joined(look)
        if found is None:
            raise ValueError("no frame to look at")
        return found

    def released(self) -> Look:
        """What the network was released with: its running statistics."""
        parts = [(np.asarray(m.running_mean), np.asarray(m.running_var)) for m in self._order]
        return _row(parts, 1)


def _row(parts: Sequence[tuple[np.ndarray, np.ndarray]], frames: int) -> Look:
    mean = np.concatenate([m for m, _ in parts]).astype(np.float32)
    variance = np.concatenate([v for _, v in parts]).astype(np.float32)
    return Look(mean, variance, tuple(len(m) for m, _ in parts), frames)


@dataclass(frozen=True)
class Action:
    """kind: "stay", "back" or "refresh".  version: what should answer.  why: one line.  sure: enough looks in
    a row said so.
    """

    kind: str
    version: int = RELEASED
    why: str = ""
    sure: bool = True


@dataclass
class Road:
    """A road by its look, and the version that answers best there."""

    look: Look
    version: int
    source: str = ""
    used: float = 0.0


@dataclass
class Response:
    """Says what should answer, look by look.

    Args:
        probe: takes the looks.
        file: where the known roads are kept over restarts, or None.
    """

    probe: Probe
    config: RoadConfig = field(default_factory=RoadConfig)
    file: Path | None = None

    def __post_init__(self) -> None:
        self.released = Road(self.probe.released(), RELEASED)
        self.roads: list[Road] = self._read()
        self._recent: dict[str, list[tuple[Look, str]]] = {}  # looks in a row, and what each says by itself
        self._frames: dict[str, list[np.ndarray]] = {}

    # ------------------------------------------------------------------------------------------ the library
    def _read(self) -> list[Road]:
        if self.file is None or not self.file.is_file():
            return []
        try:
            if self.file.stat().st_size > MOST_BYTES:
                raise ValueError("larger than any that is written")
            with np.load(io.BytesIO(self.file.read_bytes()), allow_pickle=False) as kept:
                told = json.loads(str(kept["roads"]))
                found, like = [], self.released.look
                for i, one in enumerate(told):
                    look = Look(kept[f"mean_{i}"], kept[f"variance_{i}"], like.widths, int(one["frames"]))
                    if look.mean.shape == like.mean.shape == look.variance.shape:
                        road = Road(look, int(one["version"]), str(one["source"]), float(one["used"]))
                        found.append(road)
                return found
        except Exception:  # what cannot be read is learnt again
            return []

    def _write(self) -> None:
        if self.file is None:
            return
        told = [
            {"version": r.version, "source": r.source, "used": r.used, "frames": r.look.frames}
            for r in self.roads
        ]
        arrays = {f"mean_{i}": r.look.mean for i, r in enumerate(self.roads)}
        arrays |= {f"variance_{i}": r.look.variance for i, r in enumerate(self.roads)}
        temporary = self.file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk: known until the next start
            with open(temporary, "wb") as out:
                np.savez(out, roads=np.array(json.dumps(told)), **arrays)  # type: ignore[arg-type]
            os.replace(temporary, self.file)

    def learn(self, version: int, look: Look, source: str = "") -> None:
        """A road with this look is answered by `version` from now on."""
        self.roads = [
            r for r in self.roads if r.source != source or distance(r.look, look) > self.config.near
        ]
        self.roads.append(Road(look, version, source, time.time()))
        if len(self.roads) > self.config.known:
            self.roads.remove(min(self.roads, key=lambda r: r.used))
        self.start_again()
        self._write()

    def forget(self, version: int) -> None:
        """No road is answered by `version` any more: it was taken away, or it is gone."""
        self.roads = [r for r in self.roads if r.version != version]
        self._write()

    def versions(self) -> set[int]:
        """Those that some road may want back."""
        return {r.version for r in self.roads} - {RELEASED}

    # --------------------------------------------------------------------------------------------- the looks
    def start_again(self) -> None:
        """What was seen so far is no longer news."""
        self._recent.clear()
        self._frames.clear()

    def offer(self, frame: np.ndarray, live: int, source: str = "") -> Action | None:
        """One more frame of this camera; an Action after every `frames` of them, None in between.

        live: the version that answers now.  The camera that it was adapted to decides; while the released one
        answers, any does.
        """
        owners = {r.source for r in self.roads if r.version == live}
        if live != RELEASED and owners and source not in owners:
            return None
        if source not in self._frames and len(self._frames) >= CAMERAS:  # names without end
            self.start_again()
        frames = self._frames.setdefault(source, [])
        frames.append(resize_frame(frame, self.probe.spec.size))
        if len(frames) < self.config.frames:
            return None
        look = self.probe.look(frames)
        frames.clear()
        recent = [*self._recent.get(source, []), (look, self._says(look, live, source))]
        self._recent[source] = recent = recent[-self.config.agree :]
        if len(recent) < self.config.agree or len({word for _, word in recent}) > 1:
            return Action("stay", live, "not sure yet", sure=False)
        return self._decide(recent[-1][1], self.seen(source), live, source)

    def seen(self, source: str = "") -> Look:
        """The looks that the latest decision was made of, together."""
        recent = self._recent[source]
        found = recent[0][0]
        for look, _ in recent[1:]:
            found = found.joined(look)
        return found

    def refreshed(
        self, version: int | None, failed: Sequence[str], live: int, look: Look, source: str = ""
    ) -> int:
        """A refresh is over: `version` is live, or None, and `failed` names what spoke against it.

        Returns what should answer here from now on, which is learnt; so the same road is not tried again.
        """
        answer = live if version is None else version
        if version is None and "changed" in failed:  # the released statistics are the best there are
            answer = RELEASED
        self.learn(answer, look, source)
        return answer

    def _known(self, source: str) -> list[Road]:
        return [self.released, *(r for r in self.roads if r.source == source)]

    def _says(self, look: Look, live: int, source: str) -> str:
        """The word new, or the number of the version whose road is nearest."""
        known = self._known(source)
        nearest = min(known, key=lambda r: distance(r.look, look))
        here = min((distance(r.look, look) for r in known if r.version == live), default=float("inf"))
        best = distance(nearest.look, look)
        if best > self.config.near:
            return "new"
        if here <= self.config.near and best > self.config.nearer * here:
            return str(live)
        return str(nearest.version)

    def _decide(self, word: str, look: Look, live: int, source: str) -> Action:
        known = self._known(source)
        far = min((distance(r.look, look) for r in known if r.version == live), default=float("inf"))
        if word == str(live):
            return Action("stay", live, f"the road of version {live} (distance {far:.3f})")
        if word == "new":
            best = min(distance(r.look, look) for r in known)
            return Action("refresh", live, f"no known road is near: the nearest at {best:.3f}")
        version = int(word)
        near = min((r for r in known if r.version == version), key=lambda r: distance(r.look, look))
        near.used = time.time()
        name = f"version {version}" if version else "the released version"
        words = f"the road of {name} (distance {distance(near.look, look):.3f}; of what is live {far:.3f})"
        return Action("back", version, words)
