"""Connections: what comes too slowly, is too large or is no HTTP; addresses; and an orderly end by a signal."""

import asyncio
import json
import os
import signal
import socket
import threading

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.server import bodies, listening

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
FIT = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'


def talk(address, *parts, end=False):
    """Sends bytes to a server, and returns all that it answers until it closes the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        for part in parts:
            client.sendall(part)
        if end:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := client.recv(1 << 16):
                answer += part
        except ConnectionResetError:
            pass
    return answer


def error_of(answer):
    """(status, error) of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-content-type-options: nosniff" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "parts, status",
    [
        ([b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"], 400),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS?\r\n\r\n"], 400),
        ([b"GET /health HTTP/1.1\r\n\r\n"], 400),
        ([b"GET /health HTTP/1.0\r\n\r\n"], 403),
        ([POST + b"Content-Length: 99999999\r\n\r\n"], 413),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n"] + [b"8000\r\n" + b" " * 0x8000 + b"\r\n"] * 3, 413),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n", b"no number\r\n"], 400),
        ([POST + b"Content-Length: -1\r\n\r\n"], 400),
        ([POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"], 400),
        ([POST + b"Content-Length: 500\r\n\r\n{"], 408),
        ([POST], 408),
        ([], 408),
    ],
)
def test_odd_connections_get_an_error_and_end(address, parts, status, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.2)
    found, error = error_of(talk(address, *parts))
    assert found == status and error["type"] == "invalid_request_error" and error["message"]


def test_requests_may_be_sent_ahead_and_connections_kept(address):
    whole = POST + b"Content-Length: %d\r\n\r\n%s" % (len(FIT), FIT)
    answer = talk(address, GET + b"\r\n" + whole, GET + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 3 and answer.index(b"text_completion") > answer.index(b'{"status":"ok"}')


def test_a_client_that_closes_its_side_or_all_at_once_leaves_a_server_that_goes_on(address):
    talk(address, POST + b"Content-Length: 500\r\n\r\n{", end=True)
    talk(address, POST + b"Content-Length: %d\r\n\r\n%s" % (len(FIT), FIT), end=True)
    assert b"200 OK" in talk(address, GET + b"Connection: close\r\n\r\n")


def test_addresses():
    with listening.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert listening.address_of(bound) == f"http://127.0.0.1:{port}"
        other = listening.bind("127.0.0.1", port)  # another server that is starting too
        bound.listen()
        taken = rf"port: expected a free port on 127.0.0.1, found that {port} cannot"
        with pytest.raises(ArgumentError, match=taken):
            listening.bind("127.0.0.1", port)
        with pytest.raises(ArgumentError, match=taken):
            listening.run(None, other, lambda: None, lambda: None, end_s=1)
    for host in ("nowhere.invalid", "a..b", "192.0.2.1"):
        with pytest.raises(ArgumentError, match=f"host: expected an address of this machine, found '{host}': .*[a-z]"):
            listening.bind(host, 0)


def test_a_signal_stops_accepting_and_lets_what_runs_finish():
    bound, is_called, said = listening.bind("127.0.0.1", 0), threading.Event(), []
    address = listening.address_of(bound)

    async def app(scope, receive, send):
        is_called.set()
        while "stop" not in said:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"finished"})

    answers = []

    def client():
        thread = threading.Thread(target=lambda: answers.append(talk(address, GET + b"\r\n")))
        thread.start()
        is_called.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join()

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    thread = threading.Thread(target=client)
    try:
        listening.run(app, bound, lambda: (said.append("ready"), thread.start()), lambda: said.append("stop"), end_s=20)
        # A second signal would end the process at once.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
    thread.join()
    assert said == ["ready", "stop"] and b"finished" in answers[0]
    with pytest.raises(ConnectionRefusedError):
        talk(address, GET)
