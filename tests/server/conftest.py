"""Fixtures: a small model that is served in this process, by an application and on a port."""

import asyncio
import contextlib
import threading

import httpx
import openai
import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed: pip install 'memoryllm_jax[serve]'")

from memoryllm_jax.server import listening
from memoryllm_jax.server.app import make_app
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.server.served import ServedModel


@contextlib.contextmanager
def on_a_port(app):
    """Runs an application on a free port in a thread. Yields its address."""
    bound, is_ready = listening.bind("127.0.0.1", 0), threading.Event()
    config = listening.config(app, end_s=5)
    server = listening.Server(config, is_ready.set, lambda: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    assert is_ready.wait(20)
    try:
        yield listening.address_of(bound)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


@pytest.fixture(scope="session")
def served(lab):
    """flex-3 with live rows, in four slots and a queue of eight."""
    with lab.model("flex-3") as engine:
        options = ServerOptions(name="tiny", slots=4, queue=8, body_limit="64KiB")
        with contextlib.closing(ServedModel(engine, options)) as served:
            yield served


@pytest.fixture(scope="session")
def address(served):
    """The address of a server."""
    with on_a_port(make_app(served)) as address:
        yield address


@pytest.fixture(scope="session")
def post(address):
    """post(path, body) sends a request to the server; returns the response."""
    with httpx.Client(base_url=address, timeout=60) as client:
        yield lambda path, body: client.post(path, json=body)


@pytest.fixture(scope="session")
def conforming():
    """conforming(response) checks a response of OpenAI's client, which builds its types without checks. Returns it."""

    def extra(value):
        """Names of fields that the types do not have."""
        if isinstance(value, list):
            return {name for one in value for name in extra(one)}
        if not isinstance(value, openai.BaseModel):
            return set()
        return set(value.model_extra or ()).union(*(extra(getattr(value, name)) for name in type(value).model_fields))

    def check(response):
        type(response).model_validate(response.to_dict(), strict=True)
        assert extra(response) <= {"token_ids"}
        return response

    return check
