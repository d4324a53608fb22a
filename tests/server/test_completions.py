"""Completions by OpenAI's own client: texts of generate, streams, log-probabilities, and errors as its exceptions."""

import numpy as np
import openai
import pytest
from lab import GREEDY, of_sequences

from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import text_after
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.scheduler import QueueFullError

PROMPTS = ["The list of", "def f(x): return", "A"]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client, conforming):
    """complete(prompt, ...) sends a request to the server."""

    def create(prompt=PROMPTS[0], **more):
        found = client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 8} | more)
        # OpenAI's API sends null for the first token of an echo, and its types do not allow it.
        return found if more.get("stream") or more.get("echo") else conforming(found)

    return create


def alone(served, prompts, sampling, seed=0, tokens=8):
    """Token ids of the continuations by `generate`."""
    out = [[] for _ in prompts]
    for new in served.engine.generate(prompts, tokens, sampling, seed):
        for sequence, token in new:
            out[sequence].append(token)
    return out


def test_texts_are_those_of_generate_for_texts_and_ids_and_any_setting(complete, served):
    ids = [served.engine.prompt(text) for text in PROMPTS]
    with_ids = {"return_token_ids": True}
    greedy = alone(served, ids, GREEDY)
    for prompt, expected in ((PROMPTS, greedy), (ids, greedy), (ids[0], greedy[:1]), (PROMPTS[2], greedy[2:])):
        found = complete(prompt, temperature=0, extra_body=with_ids)
        assert [choice.token_ids for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == list(range(len(expected)))
    assert found.choices[0].text == text_after(served.engine.tokenizer, ids[2], greedy[2])
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids[2]), 8)

    drawn = alone(served, [ids[0], ids[0], ids[1], ids[1]], Sampling(0.9, 7, 0.8), seed=5)
    how = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "extra_body": with_ids | {"top_k": 7}}
    assert [choice.token_ids for choice in complete(PROMPTS[:2], n=2, **how).choices] == drawn
    texts = {complete(max_tokens=20).choices[0].text for _ in range(3)}
    assert len(texts) == 3  # without a seed, each request draws anew


def test_streams_bring_the_same_texts_and_the_counts(complete, conforming):
    whole = complete(PROMPTS, temperature=0, n=2)
    with complete(PROMPTS, temperature=0, n=2, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    conforming(last)
    assert last.choices == [] and last.usage == whole.usage and chunks[0].usage is None
    texts, reasons = [""] * 6, [None] * 6
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.text or choice.finish_reason
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and reasons == ["length"] * 6
    assert {chunk.id for chunk in chunks} == {last.id} and last.object == "text_completion"


def test_a_stop_text_ends_a_text_before_it(complete):
    text = complete(temperature=0, max_tokens=20).choices[0].text
    stop = text[5:8]
    found = complete(temperature=0, max_tokens=20, stop=[stop, "never"])
    assert found.choices[0].text == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    with complete(temperature=0, max_tokens=20, stop=stop, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_log_probabilities_are_those_of_the_equations(complete, served):
    ids = served.engine.prompt(PROMPTS[1])
    found = complete(
        PROMPTS[1], echo=True, logprobs=3, max_tokens=2, temperature=0, extra_body={"return_token_ids": True}
    )
    (choice,) = found.choices
    ((log_probs, is_top),) = of_sequences(served.engine, [choice.token_ids])
    of_tokens = choice.logprobs
    assert choice.token_ids[:-2] == ids and of_tokens.token_logprobs[0] is None and of_tokens.top_logprobs[0] is None
    np.testing.assert_allclose(of_tokens.token_logprobs[1:], log_probs, atol=2e-4)
    for name, own, top, is_first in zip(
        of_tokens.tokens[1:], of_tokens.token_logprobs[1:], of_tokens.top_logprobs[1:], is_top
    ):
        # What the harness takes for greedy, and OpenAI's one more entry for a token that is not among the likeliest.
        assert (own == max(top.values())) == is_first and top[name] == own and len(top) in (3, 4)
        assert list(top.values())[:3] == sorted(top.values(), reverse=True)[:3]
    assert choice.text.startswith(PROMPTS[1])
    assert of_tokens.text_offset == sorted(of_tokens.text_offset) and of_tokens.text_offset[-1] < len(choice.text)
    for name, start in zip(of_tokens.tokens, of_tokens.text_offset):
        assert name.startswith(("token_id:", "<s>")) or choice.text[start:].startswith(name)
    scored = complete(PROMPTS[1], echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].logprobs.token_logprobs == of_tokens.token_logprobs[:-2]
    assert scored.usage.completion_tokens == 0 and scored.choices[0].text == PROMPTS[1]


@pytest.mark.parametrize(
    "kind, more, param, problem",
    [
        ("NotFoundError", {"model": "gpt-4"}, "model", "expected tiny, which this server serves, found 'gpt-4'"),
        ("BadRequestError", {"temperature": -1}, "temperature", "temperature: expected float >= 0.0, found -1"),
        ("BadRequestError", {"temperature": 1e-5}, "temperature", "expected 0 (greedy), or from 0.001 to 1000"),
        ("BadRequestError", {"logprobs": 21}, "logprobs", "logprobs: expected int <= 20, found 21"),
        ("BadRequestError", {"extra_body": {"beams": 2}}, "beams", "expected known fields only, found 'beams'"),
        ("BadRequestError", {"best_of": 2}, "best_of", "is not supported; expected null or 1, found 2"),
        ("BadRequestError", {"presence_penalty": 0.5}, "presence_penalty", "expected null or 0, found 0.5"),
        ("BadRequestError", {"prompt": []}, "prompt", "prompt: expected at least one, found an empty list"),
        ("BadRequestError", {"prompt": [[1, 512]]}, "prompt", "expected token ids from 0 to 511, found 512"),
        ("BadRequestError", {"prompt": [True]}, "prompt", "expected texts, or lists of token ids, found True"),
        ("BadRequestError", {"max_tokens": 31}, "max_tokens", "the context is 32 tokens, and this request asks for 3"),
        ("BadRequestError", {"prompt": [[1] * 32]}, "prompt", "32 in the prompt and 8 in the completion"),
        ("BadRequestError", {"n": 100}, None, "expected at most 12 sequences of a request, found 100"),
        ("BadRequestError", {"stop": [""]}, "stop", "stop[0]: expected str of length >= 1"),
        ("BadRequestError", {"stream_options": {}}, "stream_options", "expected stream to be true as well"),
    ],
)  # fmt: skip
def test_errors_are_exceptions_of_the_client(complete, kind, more, param, problem):
    with pytest.raises(getattr(openai, kind)) as raised:
        complete(**more)
    assert problem in raised.value.body["message"] and raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_neutral_values_of_other_fields_are_accepted(complete):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "suffix": None,
        "user": "x",
    }
    assert complete(temperature=0, **neutral).choices[0].text == complete(temperature=0).choices[0].text


def test_a_full_queue_and_a_failure_in_a_stream_are_errors_too(complete, served, monkeypatch):
    def full(works):
        raise QueueFullError(7)

    class Failing:
        has_more = False

        def __aiter__(self):
            return self

        async def __anext__(self):
            raise ApiError(504, "took too long", code="time_limit")

        def cancel(self):
            pass

    monkeypatch.setattr(served.scheduler, "submit", full)
    with pytest.raises(openai.RateLimitError) as raised:
        complete()
    assert raised.value.response.headers["retry-after"] == "7" and raised.value.code == "queue_full"
    monkeypatch.setattr(served.scheduler, "submit", lambda works: [Failing() for _ in works])
    with pytest.raises(openai.InternalServerError, match="took too long"):
        complete()
    with complete(stream=True) as stream, pytest.raises(openai.APIError, match="took too long") as raised:
        list(stream)
    assert raised.value.code == "time_limit"
