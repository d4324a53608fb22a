"""Completions by OpenAI's own client, and the texts of generate."""

import openai
import pytest
from lab import GREEDY


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_texts_are_those_of_generate(client, served):
    prompts = ["The list of", "def f(x): return", "A"]
    ids = [served.engine.prompt(text) for text in prompts]
    found = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
    )
    for number, choice in enumerate(found.choices):
        alone = [token for new in served.engine.generate([ids[number]], 8, GREEDY) for _, token in new]
        assert choice.index == number and choice.token_ids == alone and choice.finish_reason == "length"
    assert found.usage.prompt_tokens == sum(map(len, ids)) and found.usage.completion_tokens == 24
