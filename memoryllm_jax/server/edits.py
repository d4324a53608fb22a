"""Routes that try edits of the token memory, measure them, and keep them as overlay files."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from memoryllm_jax.server import bodies
from memoryllm_jax.server.changes import Changes, Edits
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.jobs import answer
from memoryllm_jax.server.served import ServedModel


class LossBody(Changes):
    """Asks for the loss with and without changes.

    Attributes:
      text: the text; None: the held-out text of the model's training data.
    """

    text: str | None = None


class KeptEdits(Edits):
    """Asks to keep edits.

    Attributes:
      replace: whether an overlay of the same name is replaced.
    """

    replace: bool = False


def routes(model: ServedModel) -> list[Route]:
    """The routes under /api/edit and /api/overlays."""

    async def check(request: Request):
        """The edits in words."""
        overlay = await model.overlay(request, await bodies.read(request, Edits))
        return JSONResponse({"texts": _texts(overlay)})

    async def loss(request: Request):
        """The loss with and without changes, in nats a token."""
        body = await bodies.read(request, LossBody)
        changed = await model.changed(request, body)
        return await answer(request, model, lambda job: model.losses.measure(changed, body.text, job.begin)._asdict())

    async def file(request: Request):
        """The overlay file of the edits, which `generate --overlay` takes."""
        overlay = await _some_edits(request, model, await bodies.read(request, Edits))
        return Response(
            await model.edit(overlay.to_bytes),
            media_type="application/octet-stream",
            headers={"Content-Disposition": 'attachment; filename="edits.safetensors"'},
        )

    async def names(request: Request):
        """The names of the kept overlays."""
        return JSONResponse({"overlays": await model.edit(model.editing.names)})

    async def kept(request: Request):
        """The edits of a kept overlay in words."""
        name = request.path_params["name"]
        overlay = await model.overlay(request, Edits(overlay=name))
        return JSONResponse({"name": name, "texts": _texts(overlay)})

    async def keep(request: Request):
        """Keeps edits as an overlay of this name."""
        name, body = request.path_params["name"], await bodies.read(request, KeptEdits)
        folder = model.editing.folder
        if folder is None:
            raise ApiError(400, "overlays: expected a server with --overlays=FOLDER, found one without")
        overlay = await _some_edits(request, model, body)
        await model.edit(folder.keep, name, overlay, body.replace)
        return JSONResponse({"name": name, "texts": _texts(overlay)})

    return [
        Route("/api/edit/check", check, methods=["POST"]),
        Route("/api/edit/loss", loss, methods=["POST"]),
        Route("/api/edit/file", file, methods=["POST"]),
        Route("/api/overlays", names),
        Route("/api/overlays/{name}", kept),
        Route("/api/overlays/{name}", keep, methods=["PUT"]),
    ]


def _texts(overlay):
    return [] if overlay is None else [edit.text for edit in overlay.edits]


async def _some_edits(request, model, body):
    overlay = await model.overlay(request, body)
    if overlay is None:
        raise ApiError(400, "edits: expected at least one, found none", "edits")
    return overlay
