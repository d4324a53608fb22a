"""Completions by OpenAI's own client, and the texts of generate."""

import openai
import pytest
from lab import GREEDY


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_first(client, served):
    print(client.models.list())
    print(
        client.completions.create(
            model="tiny", prompt="The list of", max_tokens=8, temperature=0, logprobs=2, echo=True
        )
    )
    with client.completions.create(
        model="tiny",
        prompt=["The list of", "a"],
        n=2,
        max_tokens=8,
        temperature=0.5,
        stream=True,
        stream_options={"include_usage": True},
    ) as s:
        for c in s:
            print(c)
    import httpx

    for m, p in (
        ("GET", "/metrics"),
        ("GET", "/nope"),
        ("DELETE", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/v1/models/tiny"),
    ):
        r = httpx.request(m, str(client.base_url).replace("/v1/", p))
        print(r.status_code, r.headers, r.text)
    for body in (
        {"model": "tiny"},
        {"model": "x", "prompt": "a"},
        {"model": "tiny", "prompt": "a", "foo": 1},
        {"model": "tiny", "prompt": "a", "best_of": 2},
        {"model": "tiny", "prompt": "a", "max_tokens": 100},
    ):
        r = httpx.post(str(client.base_url) + "completions", json=body)
        print(r.status_code, r.text)
    assert 0
