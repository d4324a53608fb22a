"""The files of the page: those of the folder page/ beside this module, by a table that is made at the start."""

import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def routes() -> list[Route]:
    """A route for each file, and / for the page itself.

    The files are read now, so that no request makes the server open a file.
    """
    return [_route(path, content, media_type) for path, (content, media_type) in _files().items()]


def _files() -> dict[str, tuple[bytes, str]]:
    """{path in requests: (content, type)} of the files with a known type."""
    folder = importlib.resources.files("memoryllm_jax.server") / "page"
    if not folder.is_dir():
        return {}
    found = {}
    for file in folder.iterdir():
        media_type = _TYPES.get(f".{file.name.rpartition('.')[2]}")
        if media_type and file.is_file():
            found["/" if file.name == _INDEX else f"/{file.name}"] = (file.read_bytes(), media_type)
    return found


def _route(path, content, media_type):
    async def send(request: Request):
        # A server of another version may answer at this address next time.
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return Route(path, send)
