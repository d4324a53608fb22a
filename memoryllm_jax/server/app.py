"""The server's application: its routes and what all of them have in common."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from memoryllm_jax.server import look
from memoryllm_jax.server.errors import ApiError, response_of
from memoryllm_jax.server.served import ServedModel


def make_app(model: ServedModel) -> Starlette:
    """The application that serves a model."""

    async def health(request: Request):
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/health", health), *look.routes(model)], exception_handlers={ApiError: response_of})
