"""The server's application: its routes and what all of them have in common."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from memoryllm_jax.server import chat, completions, edits, errors, look, page_files, security
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.metrics import Metrics
from memoryllm_jax.server.served import ServedModel


def make_app(model: ServedModel) -> ASGIApp:
    """The application that serves a model."""
    metrics = Metrics(model)
    pages = page_files.routes()
    routes = [
        *pages,
        *_about(model),
        *metrics.routes(),
        *completions.routes(model),
        *chat.routes(model),
        *look.routes(model),
        *edits.routes(model),
    ]
    paths = {route.endpoint: route.path for route in routes}
    app = Starlette(routes=routes, exception_handlers=errors.HANDLERS)
    app.router.redirect_slashes = False  # a redirect would be a response without a body in OpenAI's shape
    app.state.body_limit = model.options.body_bytes
    options = model.options
    return security.Guard(
        app,
        security.names_of(options.host, options.names),
        model.api_key,
        # Programs that watch the server have no key, and the page asks for it when it is open.
        public=frozenset({"/health", *(route.path for route in pages)}),
        count=lambda scope, status: metrics.count(scope, paths.get(scope.get("endpoint")), status),
    )


def _about(model: ServedModel) -> list[Route]:
    """The routes that say what is served, and whether it is."""
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "memoryllm_jax"}

    async def health(request: Request):
        if not model.is_healthy:
            raise ApiError(503, "the engine failed, or the server is closing", code="unhealthy")
        return JSONResponse({"status": "ok"})

    async def models(request: Request):
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request):
        name = request.path_params["name"]
        if name != model.name:
            raise ApiError(404, f"model: expected {model.name}, found {name[:100]!r}", "model", "model_not_found")
        return JSONResponse(card)

    return [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),  # a name may have slashes
    ]
