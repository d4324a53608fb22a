"""Who is answered: names of the server, origins, and the API key."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from starlette.responses import JSONResponse

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.server import security
from memoryllm_jax.server.options import ServerOptions

KEY = b"a-key-of-sixteen+"


def status(names=(), key=None, path="/v1/models", **headers):
    """The status of a request to a guarded application that answers all with 200."""
    sent = []

    async def send(message):
        sent.append(message)

    guard = security.Guard(
        JSONResponse({}), security.Names(names), key, frozenset({"/health"}), lambda scope, status: None
    )
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    asyncio.run(guard({"type": "http", "method": "GET", "path": path, "headers": raw}, None, send))
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200),
        ("192.168.1.7", 200), ("box", 200), ("Box:1", 200), ("evil.com", 403), ("localhost.evil.com", 403),
        ("evil.com:8000", 403), ("", 403), ("localhost:x", 403), ("localhost@evil.com", 403), ("[::1", 403),
        ("localhost/", 403), ("\xff", 403), ("127.0.0.1.evil.com", 403),
    ],
)  # fmt: skip
def test_only_names_of_the_server_are_hosts(host, expected):
    assert status(names=["Box"], host=host) == expected


def test_a_request_without_a_host_is_refused():
    assert status() == 403


@pytest.mark.parametrize(
    "origin, expected",
    [
        ("http://localhost:8000", 200), ("https://localhost:8000", 200), ("http://LOCALHOST:8000", 200),
        ("http://localhost:3000", 403), ("http://localhost", 403), ("http://127.0.0.1:8000", 403), ("null", 403),
        ("", 403), ("https://evil.com", 403), ("http://localhost:8000.evil.com", 403), ("localhost:8000", 403),
    ],
)  # fmt: skip
def test_pages_of_other_origins_are_refused(origin, expected):
    assert status(host="localhost:8000", origin=origin) == expected


@pytest.mark.parametrize(
    "authorization, expected",
    [
        ("Bearer a-key-of-sixteen+", 200), ("bearer  a-key-of-sixteen+ ", 200), ("Bearer a-key-of-sixteen", 401),
        ("Bearer ", 401), ("a-key-of-sixteen+", 401), ("Basic a-key-of-sixteen+", 401), ("Bearer \xfc", 401),
    ],
)  # fmt: skip
def test_a_server_with_a_key_wants_it(authorization, expected):
    assert status(key=KEY, host="localhost", authorization=authorization) == expected
    assert status(key=KEY, host="localhost") == 401
    assert status(key=KEY, host="localhost", path="/health") == 200


def test_the_file_of_the_key_is_its_owners_alone(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    assert security.read_key(str(path)) == KEY and security.read_key("") is None
    path.chmod(0o640)
    with pytest.raises(ArgumentError, match=r"api_key_file: expected a file that its owner alone can read .* mode 640"):
        security.read_key(str(path))
    path.chmod(0o600)
    for content in (b"", b"short", b"a key with spaces in it", b"\xff" * 20, b"one-line-of-key-1\nand another"):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match="expected one line of 16 to 512 printable") as raised:
            security.read_key(str(path))
        assert content.decode("latin-1") not in str(raised.value) or not content
    with pytest.raises(ArgumentError, match=r"expected a file with the key, found .*No such file"):
        security.read_key(str(tmp_path / "none"))


def test_only_a_server_with_a_key_listens_beyond_this_machine():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        ServerOptions(host=host)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.com"):
        with pytest.raises(ArgumentError, match=r"host: expected a loopback address .* or --api_key_file as well"):
            ServerOptions(host=host)
        ServerOptions(host=host, api_key_file="key")
