"""Computations in threads of their own, which tell how far they are and stop when the client goes away."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from memoryllm_jax.server import errors
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.events import EventStream, event, unless_gone
from memoryllm_jax.server.served import ServedModel

_EVERY_S = 0.1  # seconds between two events


class StoppedError(Exception):
    """The client went away, so that nobody waits for the result."""


class Job:
    """One computation, which another thread runs and the event loop watches.

    Args:
      time_limit: seconds from now after which it is ended.
    Attributes:
      done: the share that is done, from 0 to 1.
      doing: what is being done, for people; "" for the computation itself.
    """

    def __init__(self, time_limit: float):
        self.done, self.doing = 0.0, "waiting for earlier requests"
        self._time_limit, self._end = time_limit, time.monotonic() + time_limit
        self._stopped = threading.Event()

    def report(self, done: float) -> None:
        """Notes the share that is done.

        Raises: what ends the computation: StoppedError if the client went away, ApiError at the time limit.
        """
        if self._stopped.is_set():
            raise StoppedError
        if time.monotonic() > self._end:
            message = f"the request took longer than {self._time_limit:g} seconds, the server's time limit"
            raise ApiError(504, message, code="time_limit")
        self.done = done

    def begin(self, doing: str, is_kept: bool = False) -> Callable[[float], None]:
        """Begins another part of the work, whose share is counted from 0.

        Args:
          is_kept: whether the part's result is kept for later requests. Then nothing ends it before its end: the next
            request would begin it anew.
        Returns: a function that takes the share that is done: `report`, or one that only notes it.
        """
        self.report(0.0)
        self.doing = doing
        return self._note if is_kept else self.report

    def _note(self, done):
        self.done = done

    def stop(self) -> None:
        """Ends the computation at its next report."""
        self._stopped.set()


Function = Callable[[Job], dict]


async def answer(request: Request, model: ServedModel, function: Function, is_pass: bool = False) -> Response:
    """Runs a computation in another thread and answers with its result.

    A client that accepts `text/event-stream` gets server-sent events: while the computation runs
    {"done": share, "doing": text}, and at the end the result, or {"error": ...} as OpenAI's API writes it.

    Args:
      function: gets its Job and returns the result.
      is_pass: whether it passes over the vocabulary. These have a thread of their own, and every client gets events.
    Raises: ApiError, ClientDisconnect.
    """
    job = Job(model.options.time_limit)
    computation = (model.pass_over if is_pass else model.compute)(_run, function, job)
    if is_pass or EventStream.media_type in request.headers.get("accept", ""):
        what = f"{request.method} {request.url.path}"
        return EventStream(_events(computation, job, what), job.stop)
    try:
        return JSONResponse(await unless_gone(request.receive, computation))
    finally:
        job.stop()


async def _events(computation: Awaitable[dict], job: Job, what: str) -> AsyncIterator[bytes]:
    """The events of a computation.

    Args:
      what: the request, for a line about an unexpected error.
    """
    task = asyncio.ensure_future(computation)
    try:
        while not (await asyncio.wait({task}, timeout=_EVERY_S))[0]:
            yield event({"done": job.done, "doing": job.doing})
        try:
            last = task.result()
        except Exception as error:  # the response has begun: whatever it is, the client is told in an event
            last = errors.of(error, what).to_json()
        yield event(last)
    finally:
        task.cancel()  # if it still waits for its thread


def _run(function: Function, job: Job) -> dict:
    job.begin("")  # ends here if the client went away while the job waited
    return function(job)
