"""Reads the JSON bodies of requests into typed records."""

from typing import TypeVar

import msgspec
from starlette.requests import Request

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server.errors import ApiError


class Body(records.Record, forbid_unknown_fields=True):
    """The JSON object of a request. Unlike in files, fields that it does not name are refused."""


T = TypeVar("T", bound=msgspec.Struct)


async def read(request: Request, kind: type[T]) -> T:
    """Decodes the body of a request.

    Raises: ApiError 400 that names the field, what was expected and what was found.
    """
    try:
        return records.parse(kind, await request.body(), "body")
    except UserError as error:
        raise ApiError(400, str(error)) from error
