from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.config import EngineConfig, GuardConfig, ServerConfig, ShadowConfig, WatchConfig
from runtime.repository.repository import Repository
from runtime.server import Server
from tests.waits import PATIENCE

UNLIMITED = 1e9  # ms that a run may take longer than the live version's


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "engines")


@pytest.fixture
def quick(repository: Repository) -> ServerConfig:
    """One thread, any port, and a shadow that does not wait for traffic.

    Nothing in it is decided by the speed of the machine: no candidate is too slow, no run hangs and no window
    ends while a test looks at it.  Tests of these limits set them.
    """
    return ServerConfig(
        repository=str(repository.path),
        port=0,
        metrics_port=0,
        engine=EngineConfig(threads=1, load_timeout=PATIENCE, hang=0.0),
        guard=GuardConfig(latency_slack_ms=UNLIMITED),
        shadow=ShadowConfig(frames=6, timeout=PATIENCE, idle_timeout=0.2, min_frames=3),
        watch=WatchConfig(seconds=5 * PATIENCE, max_fps=50.0),
    )


@pytest.fixture
def driving(quick: ServerConfig) -> ServerConfig:
    """For tests that send frames meanwhile: the shadow waits for them, however late they come."""
    return dataclasses.replace(quick, shadow=dataclasses.replace(quick.shadow, idle_timeout=PATIENCE))


@pytest.fixture
def serve() -> Iterator[object]:
    """serve(config) -> a running Server, stopped at the end of the test."""
    servers: list[Server] = []

    def start(config: ServerConfig) -> Server:
        servers.append(Server(config).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
