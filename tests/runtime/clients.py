"""Both clients behind one face, so that a test says once what holds for both."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

from runtime.client import AsyncClient, Client
from tests.waits import PATIENCE

KINDS = ("sync", "asyncio")


class _Looped:
    """An asyncio object called from a thread: coroutines are waited for, async iterators become iterators."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop = inner, loop

    def _wait(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            value = asyncio.run_coroutine_threadsafe(value, self._loop).result(PATIENCE)
        return _Looped(value, self._loop) if hasattr(value, "__anext__") else value

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            async def begin() -> Any:  # in the loop: a stream's call needs it running
                result = value(*arguments, **named)
                return await result if inspect.isawaitable(result) else result

            return self._wait(begin())

        return call

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        async def step() -> tuple[bool, Any]:
            try:
                return True, await self._inner.__anext__()
            except StopAsyncIteration:
                return False, None

        more, value = self._wait(step())
        if not more:
            raise StopIteration
        return value

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Looped(_Looped):
    """An AsyncClient with a loop of its own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:
            return AsyncClient(*arguments, **named)

        super().__init__(asyncio.run_coroutine_threadsafe(make(), loop).result(PATIENCE), loop)

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


def client(kind: str, *arguments: Any, **named: Any) -> Any:
    """A context manager: a client of that kind with the methods of `Client`."""
    return Client(*arguments, **named) if kind == "sync" else Looped(*arguments, **named)
