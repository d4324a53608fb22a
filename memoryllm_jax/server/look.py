"""Routes of the page that look into the model: its facts, tokens, and what `Looker` computes."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from memoryllm_jax.analysis.views import MOST, Key, Says
from memoryllm_jax.common.records import Count
from memoryllm_jax.model import memories
from memoryllm_jax.server import bodies, errors
from memoryllm_jax.server.bodies import Body
from memoryllm_jax.server.changes import Edits
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.jobs import Job, answer
from memoryllm_jax.server.looker import Looker
from memoryllm_jax.server.served import ServedModel

Top = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
_MOST_FOUND = 1000  # tokens that one search returns, at most


class TextBody(Body):
    text: str


class TokenBody(Body):
    token: Count
    top: Top = 5


class NearestBody(Body):
    token: Count
    layer: Count | None = None
    top: Top = 8


class KeyBody(Body):
    ffn: str
    layer: Count
    key: Count
    top: Top = 5


class PositionBody(Edits, kw_only=True):
    """Asks what each layer does at a position of a text, by the model with the edits."""

    ids: list[Count]
    position: Count
    top: Top = 3


def routes(model: ServedModel) -> list[Route]:
    """The routes that look into a model."""
    looking = _Look(model)
    return [
        Route("/api/model", looking.model, methods=["GET"]),
        Route("/api/tokenize", looking.tokenize, methods=["POST"]),
        Route("/api/tokens", looking.tokens, methods=["GET"]),
        Route("/api/look/token", looking.token, methods=["POST"]),
        Route("/api/look/nearest", looking.nearest, methods=["POST"]),
        Route("/api/look/key", looking.key, methods=["POST"]),
        Route("/api/look/position", looking.position, methods=["POST"]),
    ]


def prepare(model: ServedModel) -> None:
    """Makes the texts of tokens and compiles the views in the background."""
    _one_by_one(model.looker.preparations(), model.compute_later)
    _one_by_one(model.looker.pass_preparations(), model.pass_later)


def _one_by_one(steps: Iterator[Callable[[], object]], later: Callable[[Callable[[], None]], None]) -> None:
    """Each step waits in its thread's queue for itself, so that requests come in between."""

    def next_step():
        step = next(steps, None)
        if step is not None:
            try:
                step()
            except Exception as error:  # who asks for the view gets it too
                errors.report(error, "preparing the views of the page")
            later(next_step)

    later(next_step)


class _Look:
    """The handlers of the routes."""

    def __init__(self, served: ServedModel):
        self._served = served
        self._config = served.engine.config

    @property
    def _looker(self) -> Looker:
        return self._served.looker

    async def model(self, request: Request) -> JSONResponse:
        c = self._config
        keys = {"memory": c.memory_dim, "compute": c.compute_dim}
        return JSONResponse(
            {
                "name": self._served.name,
                "architecture": c.architecture,
                "layers": c.layers,
                "dim": c.dim,
                "vocab_size": c.vocab_size,
                "context": self._served.context,
                "ffns": [ffn for ffn, width in keys.items() if width],
                "keys": {ffn: width for ffn, width in keys.items() if width},
                "can_edit": memories.can_edit(c),
                "can_look": True,
                "views": self._views(),
                "keeps_rows": self._looker.keeps_rows,
                "overlays": await asyncio.to_thread(self._served.editing.names),
                "keeps_overlays": bool(self._served.options.overlays),
                "has_chat": self._served.chat is not None,
                "has_held_out": self._served.losses.has_held_out,
                "facts": _facts(self._served),
            }
        )

    def _views(self) -> list[str]:
        """The names of the views that the model has."""
        c = self._config
        has = {"token": c.row_dim > 0, "nearest": c.row_dim > 0, "key": c.memory_dim > 0, "position": True}
        return [view for view, is_there in has.items() if is_there]

    async def tokenize(self, request: Request) -> JSONResponse:
        body = await bodies.read(request, TextBody)

        def tokenize() -> list[dict]:
            return [self._looker.shown(token) for token in self._served.engine.prompt(body.text)]

        # In a thread, as a long text would hold up the event loop.
        return JSONResponse({"tokens": await asyncio.to_thread(tokenize)})

    async def tokens(self, request: Request) -> JSONResponse:
        limit = _number(request, "limit", 50, _MOST_FOUND)
        query = request.query_params.get("search", "")
        found, total = await asyncio.to_thread(self._looker.search, query, limit)
        return JSONResponse({"tokens": [self._looker.shown(token) for token in found], "total": total})

    async def token(self, request: Request):
        body = await bodies.read(request, TokenBody)
        self._check_token(body.token)

        def look(job: Job) -> dict:
            layers = [
                {
                    "layer": layer,
                    "norm": found.norm,
                    "says": self._says(found.says),
                    "keys": [self._key(key) for key in found.keys],
                }
                for layer, found in enumerate(self._looker.token(body.token, body.top, job.begin))
            ]
            return {"token": self._looker.shown(body.token), "layers": layers}

        return await answer(request, self._served, look)

    async def nearest(self, request: Request):
        body = await bodies.read(request, NearestBody)
        self._check_token(body.token)
        if body.layer is not None:
            _check("layer", body.layer, self._config.layers, self._config.row_layers.start)

        def look(job: Job) -> dict:
            found = self._looker.nearest(body.token, body.layer, body.top, job.begin)
            return {"tokens": [self._looker.shown(token) | {"cosine": cosine} for token, cosine in found]}

        return await answer(request, self._served, look, is_pass=True)

    async def key(self, request: Request):
        body = await bodies.read(request, KeyBody)
        if body.ffn != "memory":
            raise ApiError(400, f'ffn: expected "memory", whose keys read single tokens, found "{body.ffn}"', "ffn")
        if not self._config.memory_dim:
            problem = f"expected a memory or flex model, found {self._config.architecture}, which has no FFN-M"
            raise ApiError(400, f"ffn: {problem}", "ffn")
        _check("layer", body.layer, self._config.layers)
        _check("key", body.key, self._config.memory_dim)

        def look(job: Job) -> dict:
            found = self._looker.key(body.layer, body.key, body.top, job.begin)
            return {"tokens": [self._looker.shown(token) | {"c": c} for token, c in found]}

        return await answer(request, self._served, look, is_pass=True)

    async def position(self, request: Request):
        body = await bodies.read(request, PositionBody)
        context = self._served.engine.context
        if not 1 <= len(body.ids) <= context:
            raise ApiError(400, f"ids: expected from 1 to {context} token ids, found {len(body.ids)}", "ids")
        for place, token in enumerate(body.ids):
            _check(f"ids[{place}]", token, self._config.vocab_size)
        _check("position", body.position, len(body.ids))
        overlay = await self._served.overlay(request, body)

        def look(job: Job) -> dict:
            found = self._looker.position(body.ids, body.position, body.top, job.begin, overlay)
            layers = [
                {
                    "layer": layer,
                    "parts": {
                        name: {"says": self._says(says), "p": says.p_final} for name, says in of_layer.parts.items()
                    },
                    "keys": [self._key(key) for key in of_layer.keys],
                }
                for layer, of_layer in enumerate(found.layers)
            ]
            return {"final": self._looker.shown(found.final), "layers": layers}

        return await answer(request, self._served, look)

    def _check_token(self, token: int) -> None:
        if not self._config.row_dim:
            problem = f"expected a model with a token memory, found {self._config.architecture}, which reads no rows"
            raise ApiError(400, f"token: {problem}", "token")
        _check("token", token, self._config.vocab_size)

    def _says(self, says: Says | None) -> list[dict]:
        if says is None:
            return []
        return [self._looker.shown(token) | {"p": p} for token, p in zip(says.ids, says.p)]

    def _key(self, key: Key) -> dict:
        sign = -1 if key.c < 0 else 1
        return {"key": key.key, "c": key.c, "share": key.share, "sign": sign, "says": self._says(key.says)}


def _facts(served: ServedModel) -> dict[str, str]:
    """What the page says of the model. It names no paths, which are nobody's business but the server's."""
    trained = served.engine.trained
    place = served.engine.rows.stats().get("rows")
    rows = "computed from the weights" if place is None else f"looked up in a ToL file ({place})"
    return {"model": trained.facts()["model"], "step": f"{trained.step:,}", "rows": rows}


def _check(name: str, value: int, end: int, start: int = 0) -> None:
    """Raises: ApiError unless start <= value < end."""
    if not start <= value < end:
        raise ApiError(400, f"{name}: expected from {start} to {end - 1}, found {value}", name.partition("[")[0])


def _number(request: Request, name: str, default: int, most: int) -> int:
    """A number from 1 to `most` of the query string. Raises: ApiError."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and 1 <= int(text) <= most):
        raise ApiError(400, f"{name}: expected from 1 to {most}, found {text[:40]!r}", name)
    return int(text)
