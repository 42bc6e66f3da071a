"""Opens a loop as ``python -m adapt.run`` describes it: priorities, pack, server, vehicle and channel.

Mistakes of the command line raise here, before any frame is collected.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch

from adapt.loop.assembly import Loop
from adapt.loop.config import EdgeMember
from adapt.loop.errors import LoopError
from adapt.loop.options import loop_config
from adapt.loop.process_priority import lower_priority
from adapt.loop.server_channel import ControlChannel
from adapt.loop.server_latency import counters_of
from adapt.loop.state import Phase
from adapt.loop.throttle import Throttle, ThrottleConfig
from adapt.loop.vehicle import open_vehicle
from adapt.round.edges import EdgeRoundError, check_pack
from adapt.sources import FileSource, open_source
from common import files
from networks.pack import load_pack
from runtime.client import Client, token
from runtime.repository.repository import Repository

__all__ = ["NullSource", "connect", "open_loop", "set_priority"]

FIRST_CONTACT = 10.0  # seconds within which the server must answer once


class NullSource:
    """No further frame: with --from, every frame has been read."""

    finished = True

    def get(self, timeout: float) -> None:
        return None

    def close(self) -> None: ...


def set_priority(arguments: argparse.Namespace) -> None:
    """Lower the priority of this process as --priority, --nice and --cores ask.  Raises ValueError."""
    cores = [int(part) for part in arguments.cores.split(",")] if arguments.cores else None
    nice = 10 if arguments.nice is None else arguments.nice
    lower_priority(nice=nice, idle=arguments.priority == "idle", cores=cores)
    torch.set_num_threads(arguments.threads)


def connect(arguments: argparse.Namespace) -> Client:
    """Return a client of the server, with the given token and certificate authority."""
    credentials = None
    if arguments.ca is not None:
        credentials = grpc.ssl_channel_credentials(files.read_file(arguments.ca))
    return Client(arguments.server, token=token.given(file=arguments.token_file), credentials=credentials)


@contextlib.contextmanager
def open_loop(arguments: argparse.Namespace, progress: Callable[..., None]) -> Iterator[Loop]:
    """Open the loop, and close it and its channel afterwards.

    Raises LoopError, BudgetError, VehicleError, PackError or ValueError for what cannot be, one line each.
    """
    loop_config(arguments)  # reports impossible settings before the pack is read
    pack = load_pack(arguments.pack)
    arguments.source_free = arguments.source_free or not pack.replay("train")
    config = loop_config(arguments)
    if not _versions_in(Path(arguments.repository), arguments.model):
        raise LoopError(
            f"repository {arguments.repository!r} holds no version of {arguments.model!r}: give the one that "
            "the server serves, or publish the pack with export.build first"
        )
    vehicle = open_vehicle(arguments.vehicle, fresh=arguments.vehicle_fresh) if arguments.vehicle else None
    if config.conditions and vehicle is None:
        raise LoopError("--parked, --charging, --min-battery and --max-temperature need --vehicle")
    edges = _edge_member(arguments) if arguments.edge_pack else None
    client = connect(arguments)
    throttle = None
    if arguments.slow:
        throttle = Throttle(counters_of(client, arguments.model), ThrottleConfig(slow=arguments.slow))
    channel = ControlChannel(client, arguments.model, arguments.name)
    loop = Loop(
        client,
        pack,
        Path(arguments.repository),
        Path(arguments.workdir),
        config,
        progress=progress,
        imports=_imports(arguments) if arguments.imports else None,
        source=NullSource() if arguments.imports else None,
        remote=channel,
        vehicle=vehicle,
        throttle=throttle,
        edges=edges,
        once=arguments.once,
        quiet=arguments.quiet,
    )
    try:
        if loop.state.phase is Phase.COLLECT:  # a round that has started needs no server until it submits
            _require_server(client, arguments.server, max(FIRST_CONTACT, arguments.wait))
        channel.open()
        yield loop
    finally:
        channel.close()
        loop.close()


def _imports(arguments: argparse.Namespace) -> Callable[[dict[str, int]], list[tuple[str, FileSource]]]:
    def imports(done: dict[str, int]) -> list[tuple[str, FileSource]]:
        return [
            (text, open_source(text, max_fps=arguments.max_fps, skip=done.get(text, 0)))
            for text in arguments.imports
        ]

    return imports


def _versions_in(repository: Path, model: str) -> list[int]:
    """Return the versions of `model`; does not create the directory of a mistyped path."""
    return Repository(repository).versions(model) if repository.is_dir() else []


def _require_server(client: Any, server: str, patience: float) -> None:
    """Raise LoopError if the server does not answer now.  The loop tolerates later outages."""
    try:
        client.wait_ready(patience)
    except grpc.FutureTimeoutError:
        raise LoopError(
            f"server {server!r} did not answer for {patience:.0f} s: start runtime.serve or correct --server"
        ) from None


def _edge_member(arguments: argparse.Namespace) -> EdgeMember:
    """Return the pack whose edges follow.  Raises LoopError for a pack that every round would decline."""
    pack = load_pack(arguments.edge_pack)
    try:
        multiple = check_pack(pack)
    except EdgeRoundError as error:
        raise LoopError(f"--edge-pack: {error}") from error
    if any(side % multiple for side in pack.spec.size):
        raise LoopError(f"--edge-pack: size {pack.spec.size} is no multiple of {multiple}: train it at one")
    if not _versions_in(Path(arguments.repository), arguments.edge_model):
        raise LoopError(
            f"repository {arguments.repository!r} holds no version of {arguments.edge_model!r}: publish the "
            "edge pack with export.build first"
        )
    return EdgeMember(pack, arguments.edge_model, arguments.group)
