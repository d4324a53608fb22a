"""Edits over HTTP: tried, measured, kept, and applied to one request alone."""

import asyncio
import contextlib

import httpx
import pytest
from lab import GREEDY, loss_on, write_untrained

from memoryllm_jax import generate
from memoryllm_jax.server.app import make_app
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.serving import EngineOptions, memory_of, open_engine

EDITS = [
    {"operation": "replace", "token": 40, "by": "#41"},
    {"operation": "blend", "token": 42, "by": 43, "share": 0.25, "layers": [1]},
    {"operation": "swap", "token": 44, "by": 45},
    {"operation": "suppress", "layer": 0, "key": 3},
    {"operation": "zero", "token": 46, "layers": [0]},
]


def ask(model, method, path, *bodies):
    """Sends requests of these bodies at once. Returns: the responses."""

    async def send():
        transport = httpx.ASGITransport(make_app(model))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=120) as client:
            return await asyncio.gather(*[client.request(method, path, json=body) for body in bodies])

    return asyncio.run(send())


@contextlib.contextmanager
def served(*opened, **options):
    """A model in 64 slots. The arguments are those of `open_engine` and of `ServerOptions`."""
    options = ServerOptions(name="tiny", slots=64, queue=64, **options)
    with contextlib.closing(open_engine(*opened)) as engine, contextlib.closing(ServedModel(engine, options)) as model:
        yield model


@pytest.fixture(scope="module")
def workdir(make_config, tmp_path_factory):
    """A model with random weights, whose texts are more varied than those of a model after a few steps."""
    return write_untrained(make_config("flex-3"), str(tmp_path_factory.mktemp("flex")))


@pytest.fixture(scope="module")
def live(workdir, tmp_path_factory):
    with served(workdir, overlays=str(tmp_path_factory.mktemp("overlays"))) as model:
        yield model


def test_the_downloaded_file_is_what_generate_takes(live, workdir, tmp_path, capsys):
    path = f"{tmp_path}/edits.safetensors"
    of_prompt = [{"operation": "zero", "token": token} for token in live.engine.prompt("The file")]
    edits = {"edits": EDITS + of_prompt}
    checked, nothing = ask(live, "POST", "/api/edit/check", edits, {"edits": []})
    (file,) = ask(live, "POST", "/api/edit/file", edits)
    assert "attachment" in file.headers["content-disposition"]
    with open(path, "wb") as out:
        out.write(file.content)
    with contextlib.closing(open_engine(workdir, overlay=path)) as engine:
        overlay = Overlay.open(path, memory_of(engine))
    assert checked.json() == {"texts": [edit.text for edit in overlay.edits]} and nothing.json() == {"texts": []}
    texts = []
    for options in (EngineOptions(workdir), EngineOptions(workdir, overlay=path)):
        generate.main(options, GREEDY, ("The file",), max_tokens=8)
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_losses_are_those_of_evaluate(live, workdir, data_path, tmp_path):
    zero = {"edits": [{"operation": "zero", "token": token} for token in range(3, 67)]}
    drop = {"contribution": {"drop_layers": [0], "alpha_compute": 0.5}}
    found = [response.json() for response in ask(live, "POST", "/api/edit/loss", {}, zero, drop, zero | drop)]
    path = f"{tmp_path}/edits.safetensors"
    with open(path, "wb") as out:
        out.write(ask(live, "POST", "/api/edit/file", zero)[0].content)
    for losses, overlay, chosen in zip(found, ("", path, "", path), ({}, {}, drop, drop)):
        contribution = {"drop_layers": ("0",), "alpha_compute": 0.5} if chosen else {}
        with contextlib.closing(EngineOptions(workdir, overlay=overlay, **contribution).open()) as engine:
            assert losses["after"] == pytest.approx(loss_on(engine, data_path, 0), rel=1e-6)
        assert losses["before"] == found[0]["after"] and losses["tokens"] == 2495
    assert len({losses["after"] for losses in found}) == 4
    short, empty = ask(live, "POST", "/api/edit/loss", {"text": "Some files."}, {"text": ""})
    assert short.json()["tokens"] == len(live.engine.prompt("Some files.")) and empty.status_code == 400
    assert empty.json()["error"]["message"] == "text: expected some text, found none"
