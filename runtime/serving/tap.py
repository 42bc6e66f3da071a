"""The tap: live frames with their answers, for adaptation.

Holds references to the request's own bytes and never copies on the answer path.  Each
subscriber has a bounded queue that drops its oldest frame; no subscriber can delay an answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.config import TapConfig
from runtime.errors import Code, ServiceError
from runtime.tensors import Array


@dataclass(frozen=True, slots=True)
class Observation:
    """One answered request of a model of the graph contract, as observers get it.

    frame uint8 [N,H,W,3]; outputs: what the request asked for, by name, with the shapes of the contract.
    Read-only by agreement: the arrays are those of the request and of the answer.
    collect: whether the request allows its frame to be kept, None = it did not say.  place: (latitude,
    longitude).
    """

    model: str
    version: int
    source: str
    frame: Array
    outputs: Mapping[str, Array]
    time: float
    collect: bool | None = None
    place: tuple[float, float] | None = None

    @property
    def labels(self) -> Array | None:
        """uint8 [N,H,W]; None where the request did not ask for them or the model has none (edges)."""
        return self.outputs.get("labels")

    @property
    def confidence(self) -> Array | None:
        """uint8 [N,H,W], or None."""
        return self.outputs.get("confidence")

    @property
    def edge_bits(self) -> Array | None:
        """int32 [N,H,W], or None."""
        return self.outputs.get("edge_bits")


class TapSubscription:
    def __init__(self, model: str, source: str, max_fps: float, limit: int) -> None:
        self.model = model
        self.source = source
        self.dropped = 0
        self._interval = 1.0 / max_fps if max_fps > 0 else 0.0
        self._due = 0.0
        self._queue: deque[Observation] = deque()
        self._limit = limit
        self._changed = threading.Condition()
        self._closed = False

    def offer(self, observation: Observation) -> None:
        if self.source and self.source != observation.source:
            return
        with self._changed:
            now = time.monotonic()
            if now < self._due:
                return
            # next slot on the grid, so that a rate of 5 of 7 frames per second is not made 3.5
            self._due = (
                max(self._due + self._interval, now - self._interval) if self._due else now + self._interval
            )
            if len(self._queue) >= self._limit:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(observation)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Observation]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._closed)
                if self._closed:
                    return
                observation = self._queue.popleft()
            yield observation


class Tap:
    def __init__(self, config: TapConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._subscriptions: tuple[TapSubscription, ...] = ()
        self._closed = False

    def __call__(self, observation: Observation) -> None:
        if observation.collect is False or (self._config.opt_in and not observation.collect):
            return
        for subscription in self._subscriptions:
            if subscription.model == observation.model:
                subscription.offer(observation)

    def subscribe(self, model: str, *, source: str = "", max_fps: float = 0.0) -> TapSubscription:
        """Raises ServiceError(RESOURCE_EXHAUSTED) beyond the configured number of subscribers."""
        if max_fps < 0 or max_fps != max_fps:
            raise ServiceError(
                Code.INVALID_ARGUMENT, f"max_fps = {max_fps}: must be 0 (every frame) or above"
            )
        with self._lock:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            if len(self._subscriptions) >= self._config.subscribers:
                message = (
                    f"{len(self._subscriptions)} subscribers already; close one or raise tap.subscribers"
                )
                raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "subscribers")
            subscription = TapSubscription(model, source, max_fps, self._config.queue)
            self._subscriptions += (subscription,)
            return subscription

    def unsubscribe(self, subscription: TapSubscription) -> None:
        with self._lock:
            self._subscriptions = tuple(other for other in self._subscriptions if other is not subscription)
        subscription.close()

    @property
    def subscriptions(self) -> tuple[TapSubscription, ...]:
        return self._subscriptions

    def close(self) -> None:
        with self._lock:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            subscription.close()


class Sampler:
    """Takes what it has room for and never waits: the shadow's view of the live frames."""

    def __init__(self, limit: int) -> None:
        self._queue: deque[Observation] = deque()
        self._limit = limit
        self._changed = threading.Condition()

    def __call__(self, observation: Observation) -> None:
        if len(self._queue) < self._limit:
            with self._changed:
                self._queue.append(observation)
                self._changed.notify()

    def get(self, timeout: float) -> Observation | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue), timeout)
            return self._queue.popleft() if self._queue else None
