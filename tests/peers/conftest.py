"""Our server as a child process, with the models that the recorded calls speak of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peers import calls, roadworthy
from bench.peers.process import Server


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine repository with every model of `bench.peers.calls`."""
    path = tmp_path_factory.mktemp("repository")
    for name, (model, onnx) in calls.models().items():
        roadworthy.publish(path, name, onnx, config=model.config(), labels=model.labels)
    return path


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m runtime.serve` on that repository; tests leave it as they find it."""
    with roadworthy.start(repository, work=tmp_path_factory.mktemp("work")) as running:
        yield running
