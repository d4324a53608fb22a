"""Responses that take a while: server-sent events, and work that ends when its client goes away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"  # the last event of OpenAI's streams

# Not "Connection: close": after its last event the client may use the connection for another request.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx


def event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """A response of server-sent events, sent as they come. It ends early when the client goes away.

    Args:
      events: the events, as `event` encodes them. The response closes the iterator.
      on_end: called when no more events are sent, however that came.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None] = lambda: None):
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientDisconnect:
            pass
        finally:
            self._on_end()

    async def _write(self, send):
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first.

    Args:
      receive: of the request, whose body has been read.
    Raises: ClientDisconnect.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()
        # `work` may have streams to cancel, which it does before the request ends.
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnection(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
