"""Settings of the loop.  Knows no algorithm and no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt.frames.selection import Rules
from adapt.loop.budget import Budget
from adapt.loop.domain_memory import DomainConfig
from adapt.loop.errors import LoopError
from adapt.loop.vehicle import Conditions
from adapt.round import RoundConfig

__all__ = ["RESPONSES", "TRIGGERS", "EdgeMember", "LoopConfig", "LoopTools"]

TRIGGERS = ("frames", "drift", "schedule", "command")
RESPONSES = ("off", "back", "refresh")


@dataclass(frozen=True)
class EdgeMember:
    """A pack with an edge head that follows the segmentation's rounds.

    Each round adapts it on the same frames and submits it together with the segmentation.

    pack    a joint pack as `adapt.round.edges` takes it
    model   its model in the repository
    group   the frame group that both models are members of
    config  `adapt.round.edges.EdgeRoundConfig`; None = the defaults
    """

    pack: Any
    model: str
    group: str
    config: Any = None


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop.  Raises LoopError for values that cannot be.

    model            the served model to adapt
    frames           new frames that make a round
    max_fps          sampling rate that the tap is asked for
    source           adapt to frames of this camera alone; "" = all
    mix              a round may take frames of several cameras
    wait             seconds without a frame after which the loop gives up; 0 = never
    max_bytes        bound of the frame store
    near             hash distance of near-duplicates (ignored if `rules` is given)
    rules            which frames the store keeps
    key              file whose key encrypts the stored pictures
    patience         seconds without a new view after which a round starts with fewer frames; 0 = never
    enough           fewest frames of such a round, and of one on command or schedule
    on               what starts a round, of TRIGGERS
    every            seconds between two rounds on schedule
    rest             least seconds between two rounds
    conditions       what the vehicle must report before work is done
    budget           what work may spend
    gpu_fraction     of CUDA memory, above 0 to 1; None = no limit
    swap_timeout     seconds within which the server must decide about a submitted version
    retry            seconds to wait after a round that failed
    respond          to a change of domain, of RESPONSES: "off"; "back": return to the version that was
                     adapted to it; "refresh": that, or new batch statistics if no version was
    road             when a change of domain is recognised
    refresh_driving  batch statistics may be refreshed whatever the vehicle reports; the budget still holds
    keep_versions    engine versions made by rounds that stay in the repository; 0 = all.  The live version,
                     the previous one, pinned and released ones always stay
    round            settings of a segmentation round
    """

    model: str
    frames: int = 60
    max_fps: float = 5.0
    source: str = ""
    mix: bool = False
    wait: float = 0.0
    max_bytes: int = 2_000_000_000
    near: int = 4
    rules: Rules | None = None
    key: Path | None = None
    patience: float = 0.0
    enough: int = 8
    on: tuple[str, ...] = ("frames", "command")
    every: float = 86_400.0
    rest: float = 0.0
    conditions: Conditions = field(default_factory=Conditions)
    budget: Budget = field(default_factory=Budget)
    gpu_fraction: float | None = None
    swap_timeout: float = 600.0
    retry: float = 60.0
    respond: str = "off"
    road: DomainConfig = field(default_factory=DomainConfig)
    refresh_driving: bool = False
    keep_versions: int = 0
    round: RoundConfig = field(default_factory=RoundConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.on) - set(TRIGGERS))
        if unknown or not self.on:
            raise LoopError(f"rounds on {', '.join(unknown) or 'nothing'}: choose of {', '.join(TRIGGERS)}")
        if self.respond not in RESPONSES:
            raise LoopError(f"respond {self.respond!r}: choose one of {', '.join(RESPONSES)}")
        if self.keep_versions < 0:
            raise LoopError(f"keep_versions {self.keep_versions}: a number of versions, 0 = all")
        if self.frames < 1 or self.every <= 0 or self.rest < 0:
            raise LoopError("frames is 1 or more, every above 0, rest 0 or more")

    def camera_of(self, source: str) -> str:
        """Return the camera that frames of `source` count for: "" for every one if cameras may mix."""
        return "" if self.mix else source[:200]


@dataclass(frozen=True)
class LoopTools:
    """What every component of one loop is given.

    log       takes one line for the person who watches
    progress  called as progress(stage, done, total, **numbers)
    clock     seconds that only grow
    sleep     waits so many seconds of that clock
    once      raise Paused if the budget cannot last, and let errors of a round through
    """

    log: Callable[[str], None]
    progress: Callable[..., None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    once: bool = False
