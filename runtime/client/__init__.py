"""Clients for both services: frames in, answers with their provenance out; the guarded swap by name.

`Client` is for threads, `AsyncClient` for asyncio; they have the same methods.  Both speak plain KServe v2,
so they work against any such server for `infer`; the rest needs Roadworthy's control service.

`sync` and `aio` hold the two ways of calling, `messages` everything else.
"""

from __future__ import annotations

import grpc

from runtime.client.aio import AsyncClient, AsyncStream
from runtime.client.messages import Answer, Event, Rejected, TappedFrame
from runtime.client.sync import Client, Stream

RpcError = grpc.RpcError

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Event",
    "Rejected",
    "RpcError",
    "Stream",
    "TappedFrame",
]
