"""Hands events of sequences from the engine thread to the event loop."""

import asyncio
import collections
from collections.abc import Callable, Iterable

from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.work import Finished, Token, Work


class Stream:
    """The events of one sequence: an async iterator, which ends after `Finished`.

    It belongs to the event loop that it is made in, and only `post` may be called from other threads. Whoever reads it
    calls `cancel` when it stops before the end, such as when its client has gone.

    Args:
      work: the sequence.
      time_limit: seconds from now after which the stream fails and the sequence is cancelled.
      on_cancel: called with this stream, from any thread, when nobody wants more of its events.
    Attributes:
      work, on_cancel: as given.
      loop: the event loop that it belongs to.
    """

    def __init__(self, work: Work, time_limit: float, on_cancel: Callable[["Stream"], None]):
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.on_cancel = on_cancel
        self._events: collections.deque[Token | Finished | ApiError] = collections.deque()
        self._is_over = False  # no more events are taken
        self._waiter: asyncio.Future | None = None
        # A timer of the event loop, so that the limit holds even where the engine hangs.
        self._timer = self.loop.call_later(time_limit, self._expire, time_limit)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Token | Finished:
        """The next event. Raises: ApiError if the sequence failed or took longer than the time limit."""
        while not self._events:
            if self._is_over:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, ApiError):
            raise event
        return event

    @property
    def has_more(self) -> bool:
        """Whether the next event is there already, so that a writer can send it together with the one before."""
        return bool(self._events)

    def cancel(self) -> None:
        """Ends the sequence, unless it has ended: its slot is free after the next step, or it leaves the queue."""
        if not self._is_over:
            self._end()
            self.on_cancel(self)

    def _expire(self, time_limit):
        message = f"the request took longer than {time_limit:g} seconds, the server's time limit"
        self.take([ApiError(504, message, code="time_limit")])
        self.on_cancel(self)

    def take(self, events: Iterable[Token | Finished | ApiError]) -> None:
        """Adds events, in the event loop."""
        if self._is_over:
            return
        self._events.extend(events)
        if self._events and not isinstance(self._events[-1], Token):
            self._end()
        self._wake()

    def _end(self):
        self._is_over = True
        self._timer.cancel()
        self._wake()

    def _wake(self):
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def post(batch: list[tuple[Stream, list]]) -> None:
    """Hands events over from another thread, with one wake-up of the event loop for all of them.

    Args:
      batch: for each stream, its new events.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for entry in batch:
        by_loop.setdefault(entry[0].loop, []).append(entry)
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_take, entries)
        except RuntimeError:  # the loop is closed: nobody waits for these events
            for stream, _ in entries:
                stream.on_cancel(stream)


def _take(entries):
    for stream, events in entries:
        stream.take(events)
