"""A loop on toys: a clock that is set; a camera, a server and a channel that are played."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

from adapt.loop import Loop, LoopConfig
from adapt.loop.config import LoopTools
from adapt.loop.frame_pool import FramePool
from adapt.loop.server_channel import Command, NullChannel
from adapt.loop.state import LoopState
from adapt.round import RoundConfig
from tests.adapt.conftest import toy_scene

FAST = RoundConfig(portions=(0.4,), steps=3, source=2, target=2, rate=1e-3)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


def captured(number: int, camera: str = "front", *, dark: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        frame=toy_scene(number, dark=dark)[0],
        time=time.time(),
        source=camera,
        model="road",
        version=1,
        labels=None,
        confidence=None,
        place=None,
        collect=None,
        dropped=0,
    )


class Camera:
    """A source whose frames are there at once; then it is silent."""

    finished = False

    def __init__(self, clock: Clock, count: int = 14, names: tuple[str, ...] = ("front",)) -> None:
        self.clock, self.left = clock, [(i, n) for i in range(count) for n in names]

    def get(self, timeout: float):
        if not self.left:
            self.clock.sleep(timeout)
            return None
        i, name = self.left.pop(0)
        return captured(200 + i, name)

    def close(self) -> None: ...


class Server:
    """Says LIVE to everything."""

    def __init__(self) -> None:
        self.submitted: list = []
        self.drifting: list[dict] = []

    def submit(self, model, version):
        self.submitted.append((model, version))
        yield SimpleNamespace(time=0.0, state="LIVE", check="", reason="", detail={})

    def submit_group(self, group, members):
        self.submitted.append((group, members))
        yield SimpleNamespace(time=0.0, state="LIVE", check="", reason="", detail={})

    def drift(self, model):
        return {"sources": self.drifting}


class PlayedChannel(NullChannel):
    listening = True

    def __init__(self, *commands: Command) -> None:
        self.commands, self.answers, self.reports = list(commands), [], []

    def poll(self):
        found, self.commands = self.commands, []
        return found

    def answer(self, command, accepted, reason=""):
        self.answers.append((command.kind, accepted, reason))

    def report(self, **parts):
        self.reports.append(parts)


def make(pack, tmp_path, *, clock=None, source=None, server=None, sleep=None, **more) -> Loop:
    clock = clock or Clock()
    keys = ("remote", "vehicle", "throttle", "once", "energy", "edges", "build", "say", "imports")
    given = {key: more.pop(key) for key in keys if key in more}
    config = LoopConfig(**{"model": "road", "frames": 14, "near": 0, "round": FAST, "enough": 10, **more})
    return Loop(
        server or Server(),
        pack,
        tmp_path / "repo",
        tmp_path / "work",
        config,
        progress=lambda *a, **k: None,
        source=source or Camera(clock),
        clock=clock,
        sleep=sleep or clock.sleep,
        **{"build": lambda *a: 2, "say": lambda text: None, **given},
    )


def tools(clock: Clock, **more) -> LoopTools:
    told = {"log": lambda text: None, "progress": lambda *a, **k: None, "clock": clock, "sleep": clock.sleep}
    return LoopTools(**{**told, **more})


def pool_of(workdir: Path, clock: Clock, **settings) -> tuple[LoopConfig, LoopState, FramePool]:
    """An empty frame pool in a new folder, with the config and the state that it uses."""
    config = LoopConfig(**{"model": "road", "frames": 14, "near": -1, "enough": 10, **settings})
    state = LoopState(workdir, "p" * 64)
    return config, state, FramePool(config, tools(clock), state, 4)
