from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.config import EngineConfig, ServerConfig, ShadowConfig, WatchConfig
from runtime.repository.repository import Repository
from runtime.server import Server


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "engines")


@pytest.fixture
def quick(repository: Repository) -> ServerConfig:
    """One thread, any port, and a shadow that does not wait."""
    return ServerConfig(
        repository=str(repository.path),
        port=0,
        metrics_port=0,
        engine=EngineConfig(threads=1),
        shadow=ShadowConfig(frames=6, timeout=10.0, idle_timeout=0.2, min_frames=3),
        watch=WatchConfig(seconds=60.0, max_fps=50.0),
    )


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
