"""Reads the JSON bodies of requests into typed records."""

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import Request

from memoryllm_jax.common import records
from memoryllm_jax.server.errors import ApiError

BODY_SECONDS = 30.0  # in which a body has to arrive
_CLOSE = {"Connection": "close"}  # the rest of a refused body is not read
_LARGE = 1 << 16  # bytes; a larger body is decoded in a thread, so that the event loop is not held up


class Body(records.Record, forbid_unknown_fields=True):
    """The JSON object of a request. Unlike in files, fields that it does not name are refused."""


T = TypeVar("T", bound=msgspec.Struct)


async def read(request: Request, kind: type[T]) -> T:
    """Decodes the body of a request.

    Raises: ApiError 400 that names the field, what was expected and what was found; 408, 413 or 415 for a body that
      comes too slowly, is too large or is not said to be JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # A page of another site can send other types without the browser asking this server first.
        raise ApiError(415, f"Content-Type: expected application/json, found {media_type[:80]!r}", headers=_CLOSE)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _received(request, request.app.state.body_limit)
    except TimeoutError as error:
        problem = f"body: expected all of it within {BODY_SECONDS:g} seconds"
        raise ApiError(408, problem, code="request_timeout", headers=_CLOSE) from error
    try:
        if len(data) > _LARGE:
            return await asyncio.to_thread(records.parse, kind, data, "body")
        return records.parse(kind, data, "body")
    except records.RecordError as error:
        raise ApiError(400, error.problem, error.field) from error


async def _received(request: Request, limit: int) -> bytes:
    """The body. Raises: ApiError 413 as soon as it is larger than `limit` bytes."""
    parts, size = [], 0
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        size = int(declared[:20])
    else:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
    if size > limit:
        problem = f"body: expected at most {limit:,} bytes, found more"
        raise ApiError(413, problem, code="request_too_large", headers=_CLOSE)
    return b"".join(parts)
