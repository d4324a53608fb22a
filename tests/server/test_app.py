"""Requests that no client would send: an error in OpenAI's shape each time, and a server that goes on."""

import asyncio
import itertools
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memoryllm_jax.server.app import make_app
from memoryllm_jax.server.security import HEADERS


@pytest.fixture(scope="module")
def app(served):
    return make_app(served)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


def call(runner, app, method="GET", path="/health", headers=(), parts=(b"",), gone=False):
    """Calls the application as uvicorn does.

    Args:
      parts: the body, as it comes.
      gone: whether the client goes away after it.
    Returns: (status, headers, body); None if there was no response.
    """
    sent = []

    async def talk():
        coming = [{"type": "http.request", "body": p, "more_body": i < len(parts)} for i, p in enumerate(parts, 1)]
        done = asyncio.Event()

        async def receive():
            if coming:
                return coming.pop(0)
            if not gone:
                await done.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        path_, _, query = path.partition("?")
        scope = {"type": "http", "http_version": "1.1", "method": method, "path": path_, "raw_path": path_.encode(),
                 "query_string": query.encode(), "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80),
                 "client": ("127.0.0.1", 1), "headers": [(b"host", b"localhost"), *headers], "state": {}}  # fmt: skip
        await app(scope, receive, send)
        done.set()

    runner.run(talk())
    if not sent:
        return None
    start, *bodies = sent
    return start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in bodies)


def check_error(answer):
    """Checks that an answer is an error of the client in OpenAI's shape, with the headers of all responses."""
    status, headers, body = answer
    assert 400 <= status < 500, body
    assert headers[b"content-type"] == b"application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "Traceback" not in error["message"] and "/site-packages/" not in error["message"]
    for name, value in HEADERS.items():
        assert headers[name.lower().encode()] == value.encode()


JSON_TYPE = (b"content-type", b"application/json")
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["model", "prompt", "messages", "max_tokens", "n", "stop", "seed", "temperature", "top_p", "top_k", "logprobs",
          "stream", "stream_options", "echo", "logit_bias", "tools", "user", "overlay", "edits", "contribution", "ids",
          "token", "top", "layer", "key", "ffn", "position", "text", "best_of", "response_format"]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/x", "/metrics", "/api/look/token",
         "/api/look/position", "/api/look/key", "/api/tokenize", "/api/edit/check", "/api/overlays/x"]  # fmt: skip
HOSTILE = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@HOSTILE
@given(
    path=st.sampled_from(PATHS),
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ODD, max_size=6),
    valid=st.booleans(),
)
def test_odd_bodies_are_refused(loop, app, path, body, valid):
    text = json.dumps(body | ({"model": "tiny", "prompt": "a", "max_tokens": 1} if valid else {}))
    answer = call(loop, app, "POST", path, [JSON_TYPE], [text.encode()])
    if answer[0] != 200:
        check_error(answer)


@HOSTILE
@given(
    path=st.sampled_from(PATHS[:2]),
    body=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8e12 tfn', max_size=60).map(str.encode),
    cuts=st.lists(st.integers(0, 60), max_size=3),
)
def test_bytes_that_are_no_json_are_refused(loop, app, path, body, cuts):
    places = [0, *sorted(cuts), len(body)]
    check_error(call(loop, app, "POST", path, [JSON_TYPE], [body[a:b] for a, b in itertools.pairwise(places)]))


METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X"]
ELSEWHERE = ["/../etc/passwd", "/page/../served.py", "/server/app.py", "/v1/models/../../x", "/%2e%2e/x", "//x"]
HEADERS_TO_FILL = [b"content-type", b"content-length", b"origin", b"host", b"authorization", b"accept", b"x"]


@HOSTILE
@given(
    method=st.sampled_from(METHODS) | st.text(string.ascii_uppercase, min_size=5),
    path=st.sampled_from([*PATHS, "/", *ELSEWHERE]) | st.text(max_size=20).map(lambda text: f"/{text}"),
    headers=st.lists(st.tuples(st.sampled_from(HEADERS_TO_FILL), st.binary(max_size=20)), max_size=4),
)
def test_odd_methods_paths_and_headers_are_refused(loop, app, method, path, headers):
    answer = call(loop, app, method, path, headers)
    if answer[0] != 200:
        check_error(answer)
    assert answer[0] != 200 or path not in ELSEWHERE


def test_bodies_that_are_too_large_or_no_json_by_their_type(loop, app):
    big = [b'{"prompt": "' + b"a" * 40_000, b"a" * 40_000, b'"}']
    for headers, parts, expected in (
        ([JSON_TYPE], big, 413),
        ([JSON_TYPE, (b"content-length", b"99999999999999999999999")], [b""], 413),
        ([(b"content-type", b"text/plain")], [b"{}"], 415),
        ([], [b"{}"], 415),
    ):
        answer = call(loop, app, "POST", "/v1/completions", headers, parts)
        assert answer[0] == expected and answer[1][b"connection"] == b"close"
        check_error(answer)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_cancels_its_sequences(loop, app, served, monkeypatch, is_stream):
    class Endless:
        has_more = is_cancelled = False

        def __aiter__(self):
            return self

        async def __anext__(self):
            await asyncio.Event().wait()

        def cancel(self):
            self.is_cancelled = True

    streams = [Endless(), Endless()]
    monkeypatch.setattr(served.scheduler, "submit", lambda works: streams)
    body = json.dumps({"model": "tiny", "prompt": "a", "n": 2, "stream": is_stream}).encode()
    status, _, _ = call(loop, app, "POST", "/v1/completions", [JSON_TYPE], [body], gone=True)
    assert status == (200 if is_stream else 499)
    assert all(stream.is_cancelled for stream in streams)


def test_a_bug_is_one_line_with_its_traceback_once_and_no_details(loop, app, served, monkeypatch, capsys):
    def fail(works):
        raise KeyError("secret of the server")

    monkeypatch.setattr(served.scheduler, "submit", fail)
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    for times in (1, 0):
        status, _, answer = call(loop, app, "POST", "/v1/completions", [JSON_TYPE], [body])
        said = capsys.readouterr().err
        assert status == 500 and json.loads(answer)["error"]["type"] == "server_error" and b"secret" not in answer
        assert said.count("error: POST '/v1/completions': KeyError: 'secret of the server'\n") == 1
        assert said.count("Traceback") == times


def test_health_says_when_the_engine_failed(loop, app, served, monkeypatch):
    monkeypatch.setattr(served.scheduler, "error", RuntimeError("lost device"))
    assert call(loop, app)[0] == 503
    assert b"memoryllm_up 0.0" in call(loop, app, path="/metrics")[2]


def test_metrics_count_requests_by_route_and_status(loop, served):
    app = make_app(served)
    call(loop, app, path="/v1/models/none")
    call(loop, app, path="/a/random/path")
    text = call(loop, app, path="/metrics")[2].decode()
    assert 'memoryllm_requests_total{method="GET",route="/v1/models/{name:path}",status="404"} 1.0' in text
    assert 'memoryllm_requests_total{method="GET",route="other",status="404"} 1.0' in text
    for name in ("new_tokens_total", "waiting_sequences", "running_sequences", "first_token_seconds_count"):
        assert f"memoryllm_{name} " in text
