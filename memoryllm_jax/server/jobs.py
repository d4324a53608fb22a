"""Computations of the worker thread that tell how far they are, and that stop when the client goes away."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.served import ServedModel

EVENTS = "text/event-stream"
_EVERY_S = 0.1  # seconds between two events, and between two looks whether the client is still there
_GONE = 499  # status that proxies log for a client that went away; nobody receives it


class StoppedError(Exception):
    """The client went away, so that nobody waits for the result."""


class Job:
    """One computation, which the worker thread runs and the event loop watches.

    Attributes:
      done: the share that is done, from 0 to 1.
      doing: what is being done, for people; "" for the computation itself.
    """

    def __init__(self):
        self.done, self.doing = 0.0, ""
        self._stopped = threading.Event()

    def report(self, done: float) -> None:
        """Notes the share that is done. Raises: StoppedError, which ends the computation, if the client went away."""
        if self._stopped.is_set():
            raise StoppedError
        self.done = done

    def begin(self, doing: str) -> Callable[[float], None]:
        """Begins another part of the work, whose share is counted from 0. Returns: `report`."""
        self.doing = doing
        self.report(0.0)
        return self.report

    def stop(self) -> None:
        """Ends the computation at its next report."""
        self._stopped.set()


Function = Callable[[Job], dict]


async def answer(request: Request, model: ServedModel, function: Function, always_events: bool = False) -> Response:
    """Runs a computation in the worker thread and answers with its result.

    A client that accepts `text/event-stream` gets server-sent events: while the computation runs
    {"done": share, "doing": text}, and at the end the result, or {"error": ...} as OpenAI's API writes it.

    Args:
      function: gets its Job and returns the result.
      always_events: whether every client gets events.
    Raises: ApiError.
    """
    if always_events or EVENTS in request.headers.get("accept", ""):
        return StreamingResponse(_events(model, function), media_type=EVENTS, headers={"Cache-Control": "no-store"})
    job = Job()
    task = asyncio.ensure_future(model.compute(_run, function, job))
    try:
        while not (await asyncio.wait({task}, timeout=_EVERY_S))[0]:
            if await request.is_disconnected():
                return Response(status_code=_GONE)
        return JSONResponse(task.result())
    finally:
        job.stop()
        task.cancel()  # if it waits for the worker still


async def _events(model: ServedModel, function: Function) -> AsyncIterator[bytes]:
    """The events of a computation. Starlette ends this generator when the client goes away."""
    job = Job()
    task = asyncio.ensure_future(model.compute(_run, function, job))
    try:
        while not (await asyncio.wait({task}, timeout=_EVERY_S))[0]:
            yield _event({"done": job.done, "doing": job.doing})
        try:
            result = task.result()
        except ApiError as error:
            result = error.to_json()
        yield _event(result)
    finally:
        job.stop()
        task.cancel()


def _run(function: Function, job: Job) -> dict:
    job.report(0.0)  # the client may have gone while the job waited
    try:
        return function(job)
    except UserError as error:
        raise ApiError(500, str(error)) from error


def _event(data: dict) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
