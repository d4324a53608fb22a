"""Runs an application on a socket, with uvicorn: limits of connections, signals, and an orderly end."""

import asyncio
import contextlib
import errno
import json
import signal
import socket
import threading
from collections.abc import Callable

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.server import security
from memoryllm_jax.server.errors import ApiError

HEADER_BYTES = 1 << 15  # most of a request's line and headers
HEADER_SECONDS = 15.0  # in which they have to arrive
KEEP_ALIVE_SECONDS = 30  # that a connection may wait for its next request
STALL_SECONDS = 60.0  # after which a client that does not read what it is sent is given up
MOST_CONNECTIONS = 1000
_BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """A socket on this address, which does not accept connections yet.

    Args:
      port: 0 for any free one.
    Raises: ArgumentError if the address cannot be used.
    """
    not_here = f"expected an address of this machine, found {host!r}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the second for what cannot be a name, such as "a..b"
        raise ArgumentError("host", f"{not_here}: {storage.reason(error)}") from error
    try:
        # A server that has just ended leaves connections behind that would hold the port for a minute.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ArgumentError("host", f"{not_here}: {error.strerror}") from error
        raise _not_free(host, port, error) from error
    return bound


def _not_free(host: str, port: int, error: OSError) -> ArgumentError:
    return ArgumentError("port", f"expected a free port on {host}, found that {port} cannot be used: {error.strerror}")


def address_of(bound: socket.socket) -> str:
    """The address of a socket as a browser takes it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: ASGIApp, bound: socket.socket, on_ready: Callable[[], None], on_stop: Callable[[], None], end_s: float
) -> None:
    """Serves until SIGTERM or SIGINT: then no connection is accepted any more, and what runs is finished.

    A second signal ends the process at once.

    Args:
      bound: of `bind`; it is closed.
      on_ready: called when connections are accepted.
      on_stop: called at the first signal.
      end_s: seconds after which what still runs is ended.
    Raises: ArgumentError if another process has begun to listen on the address since `bind`.
    """
    server = Server(config(app, end_s), on_ready, on_stop)
    with contextlib.closing(bound):
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            raise _not_free(*bound.getsockname()[:2], error) from error
        asyncio.run(server.serve(sockets=[bound]))


def config(app: ASGIApp, end_s: float) -> uvicorn.Config:
    """uvicorn's settings. The arguments are those of `run`."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        backlog=_BACKLOG,
        log_config=None,
        log_level="critical",  # it would write a line for each odd request of a stranger
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(end_s) + 1,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which ends without raising the signal again: an orderly end has exit code 0."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stop: Callable[[], None]):
        super().__init__(config)
        self._on_ready, self._on_stop = on_ready, on_stop

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self):
        if threading.current_thread() is not threading.main_thread():  # others cannot take signals
            yield
            return

        def stop(number, frame):
            self.should_exit = True
            self._on_stop()
            for each in before:
                signal.signal(each, signal.SIG_DFL)  # the second signal ends the process

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            # Not the handlers from before: what runs now is the end of the process, which a signal may cut short.
            for number in before:
                signal.signal(number, signal.SIG_DFL)


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with times for headers and for clients that do not read, and errors in OpenAI's shape."""

    _headers_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._headers_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc) -> None:
        self._stop_timer("_headers_timer")
        self._stop_timer("_stall_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer("_headers_timer")
        elif self._headers_timer is None:  # the next request of a connection has begun
            self._headers_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_timer("_stall_timer")
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer("_stall_timer")

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"expected an HTTP/1.1 request with headers of at most {HEADER_BYTES:,} bytes"))

    def _give_up(self):
        self._headers_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            problem = f"expected a request within {HEADER_SECONDS:g} seconds"
            self._refuse(ApiError(408, problem, code="request_timeout"))

    def _refuse(self, error: ApiError):
        """Answers instead of the application, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.to_json()).encode()
            headers = {
                **security.HEADERS,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            response = h11.Response(status_code=error.status, headers=list(headers.items()))
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _stop_timer(self, name):
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
