"""Chat by OpenAI's own client, with a template and without one."""

import contextlib
import json
import shutil
import types

import openai
import pytest
from lab import GOLDEN, GREEDY

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.hf.import_ import import_model
from memoryllm_jax.inference.text import text_after
from memoryllm_jax.server import served as served_lib
from memoryllm_jax.server.chat_template import ChatTemplate

TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ m.role[0] }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}
{% if add_generation_prompt %}a:{% endif %}"""
MESSAGES = [{"role": "system", "content": "be "}, {"role": "user", "content": "in it?"}]


@pytest.fixture(scope="module")
def chat(address, conforming):
    """chat(messages, ...) sends a request."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:

        def create(messages=MESSAGES, **more):
            found = client.chat.completions.create(**{"model": "tiny", "messages": messages} | more)
            return found if more.get("stream") else conforming(found)

        yield create


@pytest.fixture
def with_template(served, monkeypatch):
    monkeypatch.setattr(served, "chat", ChatTemplate(TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}))


def test_an_import_keeps_the_template(tmp_path):
    shutil.copytree(f"{GOLDEN}/base", tmp_path / "hf")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    import_model(str(tmp_path / "hf"), str(tmp_path / "work"))
    with contextlib.closing(TrainedModel(str(tmp_path / "work"))) as trained:
        found = served_lib._chat_template(types.SimpleNamespace(trained=trained, tokenizer=trained.tokenizer))
    assert found.render(MESSAGES) == "<s>s: be</s>u: in it?</s>a:"


@pytest.mark.usefixtures("with_template")
def test_an_answer_continues_the_prompt_of_the_template(chat, served, conforming):
    prompt = served.engine.tokenizer.encode_special("<s>s: be</s>u: in it?</s>a:")
    new = [token for step in served.engine.generate([prompt], 6, GREEDY) for _, token in step]
    text = text_after(served.engine.tokenizer, prompt, new)
    how = {"temperature": 0, "max_completion_tokens": 6}
    whole = chat(**how)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 6)
    parts = [{"role": "system", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "e"}]}]
    with chat(parts + MESSAGES[1:], stream=True, stream_options={"include_usage": True}, **how) as stream:
        first, *chunks, last = map(conforming, stream)
    assert first.choices[0].delta.role == "assistant" and last.usage == whole.usage
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length" and first.object == "chat.completion.chunk"
    left = served.context - len(prompt)  # without a limit, an answer may take the rest of the context
    assert chat(temperature=0).usage.completion_tokens <= left and chat(temperature=0, n=2).choices[1].index == 1


@pytest.mark.usefixtures("with_template")
def test_log_probabilities_have_the_shape_of_chat(chat):
    found = chat(temperature=0, max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(found) == 3
    for token in found:
        assert token.bytes is None or token.token.encode() == bytes(token.bytes)
        likeliest, second = token.top_logprobs
        assert (likeliest.token, likeliest.logprob) == (token.token, token.logprob) and second.logprob <= token.logprob


def says(content, role="user", **more):
    return {"messages": [{"role": role, "content": content} | more]}


@pytest.mark.parametrize(
    "more, param, problem",
    [
        (says("x", "tool", tool_call_id="1"), "messages", "refuses them: no tools here"),
        ({"messages": []}, "messages", "messages: expected array of length >= 1, found []"),
        (says([{"type": "image_url"}]), "messages", "messages[0].content[0].type"),
        (says("", "king"), "messages", "messages[0].role: expected a known value, found 'king'"),
        (says("x", weight=1), "messages", "messages[0]: expected known fields only, found 'weight'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools: is not supported; expected null or []"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "expected logprobs to be true as well"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "expected the same as max_tokens = 2"),
        ({"max_tokens": 1000}, "max_tokens", "the context is"),
        (says("A" * 1000), "prompt", "the context is"),
    ],
)
@pytest.mark.usefixtures("with_template")
def test_requests_are_refused_by_field(chat, more, param, problem):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(**more)
    assert problem in raised.value.body["message"] and raised.value.param == param


def test_a_model_without_a_template_says_so(chat):
    with pytest.raises(openai.BadRequestError, match="this model has no chat template") as raised:
        chat()
    assert raised.value.code == "no_chat_template"
