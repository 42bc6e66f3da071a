"""What the parts of one model's guarded swap share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from runtime.config import ServerConfig
from runtime.repository.repository import Repository
from runtime.serving.served_model import ServedModel
from runtime.swap.publisher import EventPublisher
from runtime.swap.scope import SwapScope
from runtime.swap.verify import Verifier


@dataclass
class SwapContext:
    """config: the limits of the next swap; it may be replaced while a swap runs.  stopping: set when the
    server stops.
    """

    host: ServedModel
    repository: Repository
    config: ServerConfig
    scope: SwapScope
    verifier: Verifier
    publisher: EventPublisher
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def model(self) -> str:
        return self.host.name
