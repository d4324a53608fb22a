"""Errors of requests, in the shape of OpenAI's API."""

import sys
import traceback

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from memoryllm_jax.common.errors import ArgumentError, UserError, one_line

_MOST_TRACEBACKS = 100  # different ones that are printed; more would be a flood
_CLIENT_GONE = 499  # nginx's status for a request whose client went away; nobody receives it


class ApiError(Exception):
    """A request that is refused, or that failed.

    Args:
      status: the HTTP status.
      message: one sentence: the field, what was expected and what was found.
      param: the field that the message is about, or None.
      code: a word for programs, such as "model_not_found", or None.
      headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def to_json(self) -> dict:
        """The body of the response, which is also what a stream sends when it fails."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response to the request."""
        return JSONResponse(self.to_json(), self.status, self.headers)


def of(error: Exception, what: str) -> ApiError:
    """The error to send to a client.

    What clients must not learn goes to stderr: paths of the server, and a bug's traceback.

    Args:
      error: what was raised.
      what: the request, as the line on stderr names it: "POST /v1/completions".
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ArgumentError):
        return ApiError(400, str(error), error.name)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    report(error, what)
    return ApiError(500, "the server failed to answer this request; its own output says why")


_reported: set[tuple] = set()


def report(error: BaseException, what: str) -> None:
    """Prints an error of the server as one line on stderr, and the traceback of a bug the first time that it occurs."""
    is_bug = not isinstance(error, UserError)  # else of a file or a device, which its text names
    kind = f"{type(error).__name__}: " if is_bug else ""
    print(f"error: {what}: {kind}{one_line(error, 300)}", file=sys.stderr, flush=True)
    if not is_bug:
        return
    frames = traceback.extract_tb(error.__traceback__)
    place = (type(error), *((frame.filename, frame.lineno) for frame in frames[-1:]))
    if place not in _reported and len(_reported) < _MOST_TRACEBACKS:
        _reported.add(place)
        traceback.print_exception(error, file=sys.stderr)


def _named(request: Request) -> str:
    return f"{request.method} {request.url.path[:200]!a}"


async def _respond(request: Request, error: Exception) -> Response:
    return of(error, _named(request)).response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    return ApiError(404, f"{_named(request)}: there is no such address", code="not_found").response()


async def _not_allowed(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    message = f"{_named(request)}: expected one of the methods {headers.get('Allow')}"
    return ApiError(405, message, code="method_not_allowed", headers=headers).response()


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)


HANDLERS = {
    404: _not_found,
    405: _not_allowed,
    HTTPException: _respond,
    ApiError: _respond,
    UserError: _respond,
    ClientDisconnect: _gone,
    Exception: _respond,
}
