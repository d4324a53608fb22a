import json
import re

import httpx
import pytest


def last(response) -> dict:
    """The last event of a response."""
    return json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))


def test_the_views_of_a_model(address, post):
    model = httpx.get(f"{address}/api/model").json()
    assert model["architecture"] == "flex-3" and model["keys"] == {"memory": 56, "compute": 32}
    assert model["views"] == ["token", "nearest", "key", "position"]
    tokens = post("/api/tokenize", {"text": "def x"}).json()["tokens"]
    assert [set(token) for token in tokens] == [{"id", "text"}] * len(tokens)
    found = httpx.get(f"{address}/api/tokens", params={"search": "e", "limit": 2}).json()
    assert found["tokens"][0]["text"] == "e" and len(found["tokens"]) == 2 < found["total"]
    seen = post("/api/look/token", {"token": 300, "top": 2}).json()
    assert seen["token"]["id"] == 300 and [layer["layer"] for layer in seen["layers"]] == [0, 1]
    key = seen["layers"][1]["keys"][0]
    assert key["sign"] == (-1 if key["c"] < 0 else 1) and set(key["says"][0]) == {"id", "text", "p"}
    near = last(post("/api/look/nearest", {"token": 300, "layer": None, "top": 3}))
    assert len(near["tokens"]) == 3 and set(near["tokens"][0]) == {"id", "text", "cosine"}
    users = last(post("/api/look/key", {"ffn": "memory", "layer": 1, "key": key["key"], "top": 3}))
    assert set(users["tokens"][0]) == {"id", "text", "c"}
    ids = [token["id"] for token in tokens]
    place = post("/api/look/position", {"ids": ids, "position": 1, "top": 2}).json()
    assert place["layers"][1]["parts"].keys() == {"residual", "attention", "memory", "compute", "output"}
    assert place["layers"][1]["parts"]["output"]["says"][0]["id"] == place["final"]["id"]
    assert place["layers"][1]["parts"]["output"]["p"] == pytest.approx(
        place["layers"][1]["parts"]["output"]["says"][0]["p"], rel=1e-5
    )
    # With edits, it is that of the model that a completion with them comes from.
    edits = [{"operation": "replace", "token": ids[1], "by": 300}]
    edited = post("/api/look/position", {"ids": ids, "position": 1, "top": 2, "edits": edits}).json()
    assert edited["layers"][0]["parts"]["memory"] != place["layers"][0]["parts"]["memory"]
    body = {"model": "tiny", "prompt": ids[:2], "max_tokens": 1, "temperature": 0, "edits": edits}
    completion = post("/v1/completions", body | {"return_token_ids": True}).json()
    assert completion["choices"][0]["token_ids"] == [edited["final"]["id"]]


@pytest.mark.parametrize(
    "view, body, message",
    [
        ("token", {"token": 512}, "token: expected from 0 to 511, found 512"),
        ("token", {"token": 1, "top": 21}, "top: expected int <= 20, found 21"),
        ("nearest", {"token": 1, "layer": 2}, "layer: expected from 0 to 1, found 2"),
        ("key", {"ffn": "memory", "layer": 1, "key": 56}, "key: expected from 0 to 55, found 56"),
        ("key", {"ffn": "compute", "layer": 1, "key": 5}, 'ffn: expected "memory", .*, found "compute"'),
        ("position", {"ids": [1, 2], "position": 2}, "position: expected from 0 to 1, found 2"),
        ("position", {"ids": [1] * 33, "position": 32}, "ids: expected from 1 to 32 token ids, found 33"),
        ("position", {"ids": [1], "position": 0, "edits": [{"operation": "zero", "token": 512}]}, r"edits\[0\]: .*512"),
        ("position", {"ids": [1, 512], "position": 0}, r"ids\[1\]: expected from 0 to 511, found 512"),
    ],
)
def test_what_the_model_does_not_have_is_refused(post, view, body, message):
    response = post(f"/api/look/{view}", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == message.partition(":")[0].partition("\\")[0]
    assert re.fullmatch(message, error["message"])
