"""Edits over HTTP: tried, measured, kept, and applied to one request alone."""

import contextlib

import pytest
from lab import GREEDY, written
from starlette.applications import Starlette
from starlette.testclient import TestClient

from memoryllm_jax import generate
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.server import edits, errors
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.tol.serving import EngineOptions

EDITS = [
    {"operation": "replace", "token": 40, "by": "#41"},
    {"operation": "blend", "token": 42, "by": 43, "share": 0.25, "layers": [1]},
    {"operation": "swap", "token": 44, "by": 45},
    {"operation": "suppress", "layer": 0, "key": 3},
    {"operation": "zero", "token": 46, "layers": [0]},
]


@contextlib.contextmanager
def served(lab, folder, *tol):
    with lab.model("flex-3", *tol) as engine:
        model = ServedModel(engine, ServerOptions(overlays=str(folder)))
        app = Starlette(routes=edits.routes(model), exception_handlers={errors.ApiError: errors.response_of})
        with contextlib.closing(model), TestClient(app) as client:
            yield model, client


@pytest.fixture(scope="module")
def live(lab, tmp_path_factory):
    with served(lab, tmp_path_factory.mktemp("overlays")) as opened:
        yield opened


def test_the_downloaded_file_is_what_generate_takes(live, lab, tmp_path):
    model, client = live
    texts = client.post("/api/edit/check", json={"edits": EDITS}).json()["texts"]
    assert len(texts) == 5 and texts[1].endswith("0.25 in layers 1")
    file = client.post("/api/edit/file", json={"edits": EDITS})
    (tmp_path / "edits.safetensors").write_bytes(file.content)
    assert "attachment" in file.headers["content-disposition"]
    print(file.content[:100], client.post("/api/edit/loss", json={"edits": EDITS}).json())
    options = EngineOptions(lab.workdir("flex-3"), overlay=f"{tmp_path}/edits.safetensors")
    generate.main(options, GREEDY, ("The file",), max_tokens=4)
