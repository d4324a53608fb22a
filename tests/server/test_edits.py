"""Edits over HTTP: tried, measured, kept, and applied to one request alone."""

import asyncio
import contextlib
import functools
import re
import threading

import httpx
import numpy as np
import pytest
from lab import GREEDY, loss_on

from memoryllm_jax import generate
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.server.app import make_app
from memoryllm_jax.server.changes import Changed, Editing, Edits
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.serving import EngineOptions

EDITS = [
    {"operation": "replace", "token": 40, "by": "#41"},
    {"operation": "blend", "token": 42, "by": 43, "share": 0.25, "layers": [1]},
    {"operation": "swap", "token": 44, "by": 45},
    {"operation": "suppress", "layer": 0, "key": 3},
    {"operation": "zero", "token": 46, "layers": [0]},
]


def ask(model, *requests):
    """Sends requests, each (method, path, body), at once. Returns: their responses."""

    async def send():
        transport = httpx.ASGITransport(make_app(model))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=120) as client:
            return await asyncio.gather(*[client.request(method, path, json=body) for method, path, body in requests])

    return asyncio.run(send())


def post(model, path, *bodies):
    return ask(model, *[("POST", path, body) for body in bodies])


@pytest.fixture(scope="module")
def served(lab, tmp_path_factory):
    """served(tol's choices): flex-3 in 64 slots with live rows, or with those of a ToL file on disk."""
    with contextlib.ExitStack() as stack:

        def serve(**choices):
            options = ServerOptions(name="tiny", slots=64, queue=64, overlays=str(tmp_path_factory.mktemp("overlays")))
            files = (lab.tol("flex-3", **choices), "disk", 200 * 128) if choices else ()
            engine = stack.enter_context(lab.model("flex-3", *files))
            return stack.enter_context(contextlib.closing(ServedModel(engine, options)))

        yield functools.cache(serve)


@pytest.fixture
def live(served):
    return served()


def test_the_downloaded_file_is_what_generate_takes(live, lab, tmp_path, capsys):
    path = f"{tmp_path}/edits.safetensors"
    of_prompt = [{"operation": "zero", "token": token} for token in live.engine.prompt("The file")]
    edits = {"edits": EDITS + of_prompt}
    checked, nothing = post(live, "/api/edit/check", edits, {"edits": []})
    (file,) = post(live, "/api/edit/file", edits)
    assert "attachment" in file.headers["content-disposition"]
    with open(path, "wb") as out:
        out.write(file.content)
    texts = [edit.text for edit in Overlay.open(path, live.editing.memory).edits]
    assert checked.json() == {"texts": texts} and nothing.json() == {"texts": []}
    asked = {"model": "tiny", "prompt": "The file", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    plain, edited = (found.json()["choices"][0] for found in post(live, "/v1/completions", asked, asked | edits))
    generate.main(EngineOptions(lab.workdir("flex-3"), overlay=path), GREEDY, ("The file",), max_tokens=8)
    assert capsys.readouterr().out.endswith(f"The file{edited['text']}\n")
    assert plain["logprobs"]["token_logprobs"] != edited["logprobs"]["token_logprobs"]


def test_losses_are_those_of_evaluate(live, lab, data_path, tmp_path):
    zero = {"edits": [{"operation": "zero", "token": token} for token in range(3, 67)]}
    drop = {"contribution": {"drop_layers": [0], "alpha_compute": 0.5}}
    found = [response.json() for response in post(live, "/api/edit/loss", {}, zero, drop, zero | drop)]
    path = f"{tmp_path}/edits.safetensors"
    with open(path, "wb") as out:
        out.write(post(live, "/api/edit/file", zero)[0].content)
    with lab.model("flex-3", overlay=path) as engine:
        for number, contribution in ((1, Contribution()), (3, Contribution(drop_layers=(0,), alpha_compute=0.5))):
            engine.contribute(contribution)
            assert found[number]["after"] == pytest.approx(loss_on(engine, data_path, 8192), rel=1e-6)
    # The text comes with Python: its version decides whether there is more of it than is scored.
    assert all(losses["before"] == found[0]["after"] and 2000 < losses["tokens"] <= 8192 for losses in found)
    assert len({losses["after"] for losses in found}) == 4
    shares: dict[str, list[float]] = {}
    live.losses.measure(
        Changed(None, Contribution()), "Some files. " * 99, lambda part: shares.setdefault(part, []).append
    )
    assert list(shares) == ["scoring the text without the changes", "scoring the text with the changes"]
    for done in shares.values():
        assert len(done) > 1 and done == sorted(done) and done[-1] == 1
    short, empty = post(live, "/api/edit/loss", {"text": "Some files."}, {"text": ""})
    assert short.json()["tokens"] == len(live.engine.prompt("Some files.")) and empty.status_code == 400
    assert empty.json()["error"]["message"] == "text: expected some text, found none"


def edits_of(number: int, token: int, layers: list[int]) -> list[dict]:
    """Edits that change the row of a token, different ones for each number."""
    by, layer, key = 200 + number, layers[number % len(layers)], number % 50
    kinds = [
        [{"operation": "replace", "token": token, "by": f"#{by}"}],
        [{"operation": "blend", "token": token, "by": by, "share": 0.75, "layers": [layer]}],
        [{"operation": "zero", "token": token, "layers": [layer]}],
        [{"operation": "swap", "token": token, "by": by}],
        [{"operation": "suppress", "layer": layer, "key": k} for k in range(key, key + 4)],
        [{"operation": "replace", "token": token, "by": by}, {"operation": "suppress", "layer": layer, "key": key}],
    ]
    return kinds[number % len(kinds)]


@pytest.mark.parametrize("choices, layers", [({}, [0, 1]), ({"drop_layers": ("1",)}, [0])])
def test_64_requests_in_one_batch_have_the_texts_of_their_overlays_alone(served, choices, layers, tmp_path):
    """The first has no edits. Half of the others name an overlay, and add the rest of their edits."""
    model = served(**choices)
    prompts = np.random.default_rng(0).integers(3, 512, (64, 8)).tolist()
    edits = [[], *(edits_of(number, prompts[number][-1], layers) for number in range(1, 64))]
    bodies = [{"edits": some} for some in edits]
    for number in range(1, 64, 2):
        bodies[number] = {"overlay": f"{number}", "edits": edits[number][1:]}
    kept = ask(model, *[("PUT", f"/api/overlays/{k}", {"edits": edits[k][:1]}) for k in range(1, 64, 2)])
    assert {response.status_code for response in kept} == {200}
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": 0, "return_token_ids": True}
    found = post(model, "/v1/completions", *(asked | b | {"prompt": p} for p, b in zip(prompts, bodies)))
    choices = [response.json()["choices"][0] for response in found]
    texts = [prompt + choice["token_ids"] for prompt, choice in zip(prompts, choices)]
    engine, mesh = model.engine, model.engine.trained.mesh
    plain = scoring.score(engine.decoder, engine.rows, texts, engine.context)
    files = post(model, "/api/edit/file", *({"edits": some} for some in edits[1:]))
    path = tmp_path / "overlay"
    for number, (choice, ids) in enumerate(zip(choices, texts)):
        rows = engine.rows
        if number:
            path.write_bytes(files[number - 1].content)
            rows = EditedRows(engine.rows, Overlay.open(str(path), model.editing.memory), mesh)
        (alone,) = scoring.score(engine.decoder, rows, [ids], engine.context)
        # A text of temperature 0: each token is the likeliest after those before it.
        assert alone.greedy_T[7:].all(), number
        log_probs_T = np.array(choice["logprobs"]["token_logprobs"])
        np.testing.assert_allclose(log_probs_T, alone.log_probs_T[7:], atol=1e-4)
        assert (np.abs(log_probs_T - plain[number].log_probs_T[7:]).max() > 1e-4) == (number > 0)


def of_tokens(count):
    return [{"operation": "zero", "token": token} for token in range(3, 3 + count)]


FIVE_KEYS = [{"operation": "suppress", "layer": 0, "key": key} for key in range(5)]
COMPLETION = {"model": "tiny", "prompt": "The file", "max_tokens": 1}


@pytest.mark.parametrize(
    "request_, status, param, message",
    [
        (("POST", "/v1/completions", COMPLETION | {"overlay": "none"}), 404, "overlay", "overlay: .* found 'none'"),
        (("POST", "/v1/completions", COMPLETION | {"overlay": "../none"}), 400, "overlay", "overlay: expected a name"),
        (
            ("POST", "/v1/completions", COMPLETION | {"edits": FIVE_KEYS}),
            400,
            "edits",
            "edits: expected at most 4 suppressed keys, found 5",
        ),
        (
            ("POST", "/v1/completions", COMPLETION | {"edits": [EDITS[0], {"operation": "zero", "token": 512}]}),
            400,
            "edits",
            r"edits\[1\]: zero: expected an id below 512, found #512",
        ),
        (
            ("POST", "/v1/completions", COMPLETION | {"contribution": {"drop_layers": [2]}}),
            400,
            "contribution.drop_layers",
            "contribution.drop_layers: expected layers from 0 to 1, found 2",
        ),
        (
            ("POST", "/api/edit/loss", {"contribution": {"alpha": 101}}),
            400,
            "contribution",
            "contribution.alpha: expected float <= 100.0, found 101",
        ),
        (("POST", "/api/edit/loss", {"edits": of_tokens(257)}), 400, "edits", "edits: expected .* length <= 256"),
        (("POST", "/api/edit/file", {"edits": []}), 400, "edits", "edits: expected at least one, found none"),
        (("PUT", "/api/overlays/a.b", {"edits": EDITS}), 400, "overlay", "overlay: expected a name"),
        (("PUT", "/api/overlays/kept", {"edits": EDITS}), 409, "overlay", "free, or \"replace\": true, found 'kept'"),
        (("PUT", "/api/overlays/kept", {"edits": EDITS, "replace": True}), 200, None, ""),
    ],
)
def test_what_does_not_fit_is_refused_by_field(live, request_, status, param, message):
    ask(live, ("PUT", "/api/overlays/kept", {"edits": of_tokens(1)}))
    (found,) = ask(live, request_)
    error = found.json().get("error", {"param": None, "message": ""})
    assert (found.status_code, error["param"]) == (status, param) and re.search(message, error["message"]), error


def test_completions_with_edits_wait_for_no_view_and_no_pass(live, monkeypatch):
    """Not for those of other requests, and not for another request's suppressed key."""
    ask(live, ("PUT", "/api/overlays/kept", {"edits": of_tokens(1), "replace": True}))
    is_answered, waiting = threading.Event(), []

    def wait(*_):
        waiting.append(is_answered.wait(60))

    monkeypatch.setattr(live.editing.memory, "key", wait)  # then its result, None, is an error

    async def talk():
        transport = httpx.ASGITransport(make_app(live))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            suppress = {"edits": [{"operation": "suppress", "layer": 0, "key": 99}]}
            slow = [
                live.compute(wait),
                live.pass_over(wait),
                client.post("/v1/completions", json=COMPLETION | suppress),
            ]
            slow = [asyncio.ensure_future(each) for each in slow]
            await asyncio.sleep(0.1)
            quick = [{"overlay": "kept"}, {"edits": of_tokens(2)}]
            found = [await client.post("/v1/completions", json=COMPLETION | changes) for changes in quick]
            is_answered.set()
            await asyncio.gather(*slow)
        return found

    assert [response.status_code for response in asyncio.run(talk())] == [200, 200] and waiting == [True] * 3


def test_a_server_without_a_folder_keeps_nothing(live, monkeypatch):
    monkeypatch.setattr(live.editing, "folder", None)
    named, kept = ask(
        live, ("POST", "/api/edit/check", {"overlay": "kept"}), ("PUT", "/api/overlays/kept", {"edits": EDITS})
    )
    for found in (named, kept):
        assert (
            found.status_code == 400 and "expected a server with --overlays=FOLDER" in found.json()["error"]["message"]
        )
    assert ask(live, ("GET", "/api/overlays", None))[0].json() == {"overlays": []}


def test_a_folder_that_is_gone_is_an_error_of_the_server_without_its_path(live, monkeypatch, capsys):
    monkeypatch.setattr(live.editing.folder, "path", "/none")
    asked = [("PUT", "/api/overlays/a", {"edits": of_tokens(1)}), ("GET", "/api/overlays", None)]
    for found in ask(live, *asked):
        assert found.status_code == 500 and "/none" not in found.text
    said = capsys.readouterr().err
    assert said.count("/none") == 2 and said.count("No such file") == 2 and "Traceback" not in said


def test_a_model_without_ffn_m_has_no_edits(lab, tmp_path):
    with lab.model("base") as engine:
        with pytest.raises(ArgumentError, match=r"overlays: expected a model that adds a row for .* found base"):
            Editing(engine, {}, str(tmp_path))
        with pytest.raises(ApiError, match="overlay: expected a model that adds a row"):
            Editing(engine, {}).overlay(Edits(overlay="kept"))
