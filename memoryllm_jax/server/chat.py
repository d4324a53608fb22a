"""OpenAI's /v1/chat/completions, for models whose tokenizer brings a chat template."""

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server import bodies, generating
from memoryllm_jax.server.bodies import Body
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.generating import Alternatives, Choice, GenerationBody, Kind
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.server.work import Token, Work

_KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


class TextPart(Body):
    """A part of a message. Parts that are no text are refused."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    # Accepted where they are empty
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list, msgspec.Meta(max_length=0)] | None = None
    tool_calls: Annotated[list, msgspec.Meta(max_length=0)] | None = None
    tool_call_id: str | None = None

    def to_template(self) -> dict[str, str | None]:
        """The message as chat templates take it: text is one string, as most of them know no parts."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {
            "role": self.role,
            "content": content,
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_call_id": self.tool_call_id,
        }


class ChatBody(GenerationBody, kw_only=True):
    """The body of a request."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    # Accepted without effect
    parallel_tool_calls: Any = None
    # Accepted with the values of `_NEUTRAL` alone
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def most_tokens(self) -> int | None:
        """The most new tokens. Raises: ApiError if its two names have different values."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            problem = f"max_completion_tokens: expected the same as max_tokens = {old}, found {new}"
            raise ApiError(400, problem, "max_completion_tokens")
        return old if new is None else new

    def alternatives(self) -> int | None:
        """`Work.alternatives`. Raises: ApiError."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise ApiError(400, "top_logprobs: expected logprobs to be true as well", "top_logprobs")
        return None


_NEUTRAL = generating.NEUTRAL | {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


def routes(model: ServedModel) -> list[Route]:
    """The route /v1/chat/completions."""

    async def chat(request: Request):
        body = await bodies.read(request, ChatBody)
        generating.check(body, model, _NEUTRAL)
        alternatives = body.alternatives()
        ids = await _prompt(model, body.messages)
        most = generating.room(model, ids, body.most_tokens())
        works = await generating.works(request, model, body, [(ids, most)], alternatives=alternatives)
        choices = [ChatChoice(i, work, bool(body.return_token_ids), model) for i, work in enumerate(works)]
        return await generating.respond(request, model, body, _KIND, choices, len(ids))

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


async def _prompt(model: ServedModel, messages: list[Message]) -> list[int]:
    """The ids of the prompt that the chat template makes of messages. Raises: ApiError."""
    if model.chat is None:
        problem = "this model has no chat template, which the tokenizer of an imported model brings"
        raise ApiError(400, f"messages: {problem}; /v1/completions continues texts", "messages", "no_chat_template")
    try:
        # In a thread: a template is a program, and long chats take it a while.
        text = await asyncio.to_thread(model.chat.render, [message.to_template() for message in messages])
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    # As in transformers, the template writes bos itself, and what spells special tokens becomes these.
    ids = await generating.tokenized(model.engine.tokenizer.encode_special, text)
    if not ids:
        raise ApiError(400, "messages: expected a prompt of at least one token, found an empty one", "messages")
    return ids


class ChatChoice(Choice):
    """A choice of a chat's answer."""

    def __init__(self, index: int, work: Work, with_ids: bool, model: ServedModel):
        super().__init__(index, work, with_ids)
        self._names = model.token_names

    def opening(self) -> dict:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def content(self, tokens: list[Token], text: str, is_chunk: bool) -> dict:
        log_probs = None
        if self.work.alternatives is not None:
            log_probs = {"content": [self._log_prob(token) for token in tokens], "refusal": None}
        if is_chunk:
            return {"delta": {"content": text} if text or tokens else {}, "logprobs": log_probs}
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": log_probs}

    def _log_prob(self, token):
        own = self._one(token.id, token.log_prob)
        return own | {"top_logprobs": [self._one(*alternative) for alternative in token.alternatives]}

    def _one(self, id, log_prob):
        return {"token": self._names.name(id), "logprob": log_prob, "bytes": self._names.utf8(id)}
