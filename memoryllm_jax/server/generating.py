"""What completions and chat have in common: fields of requests, sequences to generate, and their results."""

import abc
import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.server import errors
from memoryllm_jax.server.bodies import Body
from memoryllm_jax.server.changes import Changes
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.events import DONE, EventStream, event, unless_gone
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.server.work import Finished, Token, Work

_LONG = 1 << 14  # characters; longer texts are tokenized in a thread, so that the event loop is not held up

Alternatives = Annotated[int, msgspec.Meta(ge=0, le=20)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class StreamOptions(Body):
    """How a stream is sent. Chunks are never obfuscated: that hides token lengths from others on the way."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Changes, kw_only=True):
    """The fields that completions and chat have in common. null stands for the default, as in OpenAI's API."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1000)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    stop: Text | Annotated[list[Text], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # Accepted without effect
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Accepted with the values of `NEUTRAL` alone
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    service_tier: Any = None
    store: Any = None

    def sampling(self) -> Sampling:
        """How tokens are drawn. Raises: ArgumentError."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k or 0, 1.0 if self.top_p is None else self.top_p)

    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a sequence."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


# Fields of OpenAI's API that this server does not support, with the values that ask for nothing.
NEUTRAL = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}


async def works(
    request: Request, model: ServedModel, body: GenerationBody, prompts: list[tuple[list[int], int]], **more
) -> list[Work]:
    """The sequences of a request: n for each prompt.

    Args:
      prompts: (ids of a prompt, most new tokens).
      more: further fields of `Work`.
    Raises: ApiError, ClientDisconnect.
    """
    # Drawn anew for each request that names none, as in OpenAI's API.
    seed = secrets.randbits(32) if body.seed is None else body.seed
    each = [prompt for prompt in prompts for _ in range(body.n or 1)]
    changed = await model.changed(request, body, for_slot=True)
    return [
        Work(
            tuple(ids),
            max_tokens,
            sampling=body.sampling(),
            seed=seed,
            number=number,
            stop_ids=frozenset(model.engine.tokenizer.stop_ids),
            stop_texts=body.stop_texts(),
            contribution=changed.contribution,
            overlay=changed.overlay,
            **more,
        )
        for number, (ids, max_tokens) in enumerate(each)
    ]


def check(body: GenerationBody, model: ServedModel, neutral: dict[str, tuple]) -> None:
    """Checks what all requests have in common.

    Args:
      neutral: {field that is not supported: its accepted values}.
    Raises: ApiError.
    """
    if body.model != model.name:
        problem = f"model: expected {model.name}, which this server serves, found {body.model[:100]!r}"
        raise ApiError(404, problem, "model", "model_not_found")
    for name, values in neutral.items():
        value = getattr(body, name)
        if value not in values:
            expected = " or ".join(msgspec.json.encode(v).decode() for v in values)
            found = msgspec.json.encode(value).decode()[:60]
            raise ApiError(400, f"{name}: is not supported; expected {expected}, found {found}", name)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: expected stream to be true as well", "stream_options")


async def tokenized(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """The ids of a text, by `encode`."""
    return await asyncio.to_thread(encode, text) if len(text) > _LONG else encode(text)


def room(model: ServedModel, prompt: list[int], max_tokens: int | None, default: int | None = None) -> int:
    """The most new tokens after a prompt.

    Args:
      max_tokens: as asked for; None: `default`, or fewer if the context has no room for so many.
      default: None: as many as the context has room for.
    Raises: ApiError if the context has not room for so many.
    """
    left = model.context - len(prompt)
    wanted = max_tokens
    if wanted is None:
        wanted = max(1, left if default is None else min(default, left))
    if wanted > left:
        problem = f"the context is {model.context} tokens, and this request asks for {len(prompt) + wanted}: "
        problem += f"{len(prompt)} in the prompt and {wanted} in the completion"
        raise ApiError(400, problem, "max_tokens" if left > 0 else "prompt", "context_length_exceeded")
    return wanted


class Choice(abc.ABC):
    """Turns the events of one sequence into the parts of a response.

    Args:
      index: its number in the response.
      work: the sequence.
      with_ids: whether each part lists the ids of its tokens.
    Attributes:
      index, work: as given.
      new_tokens: tokens that were generated so far.
    """

    def __init__(self, index: int, work: Work, with_ids: bool):
        self.index, self.work, self._with_ids = index, work, with_ids
        self.new_tokens = -len(work.ids) if work.echo else 0

    def opening(self) -> dict | None:
        """What a stream sends of it before its first token; None: nothing."""
        return None

    @abc.abstractmethod
    def content(self, tokens: list[Token], text: str, is_chunk: bool) -> dict:
        """The fields that hold these tokens and this text, "logprobs" among them."""

    def is_worth_sending(self, happened: list[Token | Finished]) -> bool:
        """Whether a chunk with these events would say anything: a token may have no text yet."""
        has_lists = self._with_ids or self.work.alternatives is not None
        return has_lists or any(event.text or isinstance(event, Finished) for event in happened)

    def part(self, happened: list[Token | Finished], is_chunk: bool) -> dict:
        """The JSON of these events: of all in a whole response, or of some in a chunk of a stream."""
        tokens = [event for event in happened if isinstance(event, Token)]
        self.new_tokens += len(tokens)
        end = happened[-1] if isinstance(happened[-1], Finished) else None
        out = {"index": self.index}
        out |= self.content(tokens, "".join(event.text for event in happened), is_chunk)
        out["finish_reason"] = end.reason if end else None
        if self._with_ids:
            out["token_ids"] = [token.id for token in tokens]
        return out


class Kind(NamedTuple):
    """What tells completions from chat in a response: the beginning of its id, and its `object` and its chunks'."""

    prefix: str
    whole: str
    chunk: str


async def respond(
    request: Request, model: ServedModel, body: GenerationBody, kind: Kind, choices: list[Choice], prompt_tokens: int
) -> Response:
    """Generates the sequences of a request.

    Args:
      choices: one for each sequence.
      prompt_tokens: for the counts of tokens.
    Returns: the whole response, or a stream that sends it as it comes.
    Raises: ApiError.
    """
    streams = model.scheduler.submit([choice.work for choice in choices])

    def cancel():
        for stream in streams:
            stream.cancel()

    def head(name):
        return {"id": id, "object": name, "created": created, "model": model.name}

    id, created = f"{kind.prefix}-{uuid.uuid4().hex}", int(time.time())
    if body.stream:
        chunk = head(kind.chunk)
        what = f"{request.method} {request.url.path}"
        return EventStream(_chunks(streams, choices, chunk, body.stream_options, prompt_tokens, what), cancel)
    try:
        found = await unless_gone(request.receive, _all_events(streams))
    finally:
        cancel()
    parts = [choice.part(happened, is_chunk=False) for choice, happened in zip(choices, found)]
    whole = head(kind.whole) | {"choices": parts, "usage": _usage(choices, prompt_tokens)}
    return Response(msgspec.json.encode(whole), media_type="application/json")


async def _all_events(streams):
    """The events of each stream. Raises: ApiError if one fails."""

    async def read(stream):
        return [event async for event in stream]

    return await asyncio.gather(*map(read, streams))


async def _chunks(streams, choices, head, options, prompt_tokens, what):
    """The events of a stream: chunks as tokens come, the counts of tokens if they are asked for, and its end."""
    with_usage = options is not None and bool(options.include_usage)
    if with_usage:
        head = head | {"usage": None}
    try:
        opened = [part for part in (choice.opening() for choice in choices) if part]
        for part in opened:
            yield event(head | {"choices": [part]})
        async for number, happened in _as_they_come(streams):
            choice = choices[number]
            part = choice.part(happened, is_chunk=True)
            if choice.is_worth_sending(happened):
                yield event(head | {"choices": [part]})
        if with_usage:
            yield event(head | {"choices": [], "usage": _usage(choices, prompt_tokens)})
        yield DONE
    except Exception as error:
        # The status is sent already. OpenAI's client raises for an event with an error.
        yield event(errors.of(error, what).to_json())


async def _as_they_come(streams):
    """Yields (number of a stream, its new events). Raises: ApiError if a stream fails."""
    found: asyncio.Queue = asyncio.Queue()

    async def read(number, stream):
        happened = []
        try:
            async for event in stream:
                happened.append(event)
                # While the client reads more slowly than tokens come, a chunk holds all that have come.
                if not stream.has_more:
                    found.put_nowait((number, happened))
                    happened = []
        except Exception as error:
            found.put_nowait((number, [*happened, error]))
        finally:
            found.put_nowait((number, []))

    tasks = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, happened = await found.get()
            if happened and isinstance(happened[-1], Exception):
                if happened[:-1]:
                    yield number, happened[:-1]
                raise happened[-1]
            if happened:
                yield number, happened
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()


def _usage(choices, prompt_tokens):
    new = sum(max(0, choice.new_tokens) for choice in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}
