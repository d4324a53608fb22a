"""The command serve: what it prints, compiles and runs, and how it fails."""

import re

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: pip install 'memoryllm_jax[serve]'")

from memoryllm_jax import serve
from memoryllm_jax.inference.slots import Slots
from memoryllm_jax.server import listening, look
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.tol.serving import ModelOptions


def test_a_server_says_where_it_is_when_all_is_compiled(lab, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(Slots, "compile", lambda slots: said.append(f"compile {slots.capacity}"))

    def run(app, bound, on_ready, on_stop, end_s):
        on_ready()
        said.append((bound.getsockname()[1], end_s))

    monkeypatch.setattr(listening, "run", run)
    monkeypatch.setattr(look, "prepare", lambda model: None)
    # The first text compiles functions, which may take longer than a request may.
    options = ServerOptions(port=0, slots=2, context=6, time_limit=1)
    serve.main(ModelOptions(lab.workdir("flex-3")), options)
    compiled, (port, end_s) = said
    assert compiled == "compile 6" and end_s == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"flex-3: flex-3, 2 layers of width 32, .*; at http://127.0.0.1:{port}", line)

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Slots, "prefill", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        serve.main(ModelOptions(lab.workdir("flex-3")), options)
