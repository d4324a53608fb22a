"""Errors of requests, in the shape of OpenAI's API."""

from starlette.requests import Request
from starlette.responses import JSONResponse


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


async def response_of(request: Request, error: ApiError) -> JSONResponse:
    """The response to a request that raised an `ApiError`."""
    return JSONResponse(error.to_json(), error.status, error.headers)
