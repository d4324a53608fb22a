"""OpenAI's /v1/completions: continues texts."""

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from memoryllm_jax.common.errors import shown
from memoryllm_jax.inference.text import Streamer
from memoryllm_jax.server import bodies, generating
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.generating import Alternatives, Choice, GenerationBody, Kind
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.server.work import Token, Work

_KIND = Kind("cmpl", "text_completion", "text_completion")
_MAX_TOKENS = 16  # OpenAI's default


class CompletionBody(GenerationBody, kw_only=True):
    """The body of a request. `prompt` is a text or the ids of one, or a list of either."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    # Accepted with the values of `_NEUTRAL` alone
    best_of: Any = None
    suffix: Any = None


_NEUTRAL = generating.NEUTRAL | {"best_of": (None, 1), "suffix": (None, "")}


def routes(model: ServedModel) -> list[Route]:
    """The route /v1/completions."""

    async def complete(request: Request):
        body = await bodies.read(request, CompletionBody)
        generating.check(body, model, _NEUTRAL)
        prompts = await _prompts(model, body.prompt)
        with_room = [(ids, generating.room(model, ids, body.max_tokens, _MAX_TOKENS)) for ids in prompts]
        works = await generating.works(
            request, model, body, with_room, alternatives=body.logprobs, echo=bool(body.echo)
        )
        choices = [TextChoice(i, work, bool(body.return_token_ids), model) for i, work in enumerate(works)]
        return await generating.respond(request, model, body, _KIND, choices, sum(map(len, prompts)))

    return [Route("/v1/completions", complete, methods=["POST"])]


async def _prompts(model: ServedModel, prompt: str | list) -> list[list[int]]:
    """The ids of each prompt, checked. Raises: ApiError."""
    is_single = isinstance(prompt, str) or (prompt and _is_id(prompt[0]))
    each = [prompt] if is_single else prompt
    if not each:
        raise ApiError(400, "prompt: expected at least one, found an empty list", "prompt")
    if len(each) > model.most_sequences:
        problem = f"prompt: expected at most {model.most_sequences} of them, found {len(each)}"
        raise ApiError(400, problem, "prompt")
    out = []
    for one in each:
        ids = await generating.tokenized(model.engine.prompt, one) if isinstance(one, str) else _checked(model, one)
        if not ids:
            raise ApiError(400, "prompt: expected at least one token, found none", "prompt")
        out.append(ids)
    return out


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(model, ids) -> list[int]:
    """The ids of a prompt. Raises: ApiError if they are none of the model's."""
    size = model.engine.tokenizer.vocab_size
    if not isinstance(ids, list):
        raise ApiError(400, f"prompt: expected texts, or lists of token ids, found {shown(ids)}", "prompt")
    for id in ids:
        if not _is_id(id) or not 0 <= id < size:
            raise ApiError(400, f"prompt: expected token ids from 0 to {size - 1}, found {shown(id)}", "prompt")
    return ids


class TextChoice(Choice):
    """A choice of a completion."""

    def __init__(self, index: int, work: Work, with_ids: bool, model: ServedModel):
        super().__init__(index, work, with_ids)
        self._names = model.token_names
        # Texts of events are held back where they may begin a stop text. Offsets count the characters before that.
        self._streamer = Streamer(model.engine.tokenizer, [] if work.echo else list(work.ids))
        self._offset = 0

    def content(self, tokens: list[Token], text: str, is_chunk: bool) -> dict:
        return {"text": text, "logprobs": None if self.work.alternatives is None else self._log_probs(tokens)}

    def _log_probs(self, tokens):
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._streamer.add(token.id))
        return {
            "tokens": [self._names.name(token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token):
        """{text: log-probability} of the likeliest tokens and, as OpenAI does, of this one."""
        if token.log_prob is None:
            return None
        own = () if token.id in dict(token.alternatives) else ((token.id, token.log_prob),)
        return self._names.by_name((*token.alternatives, *own))
