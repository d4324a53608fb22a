"""Which requests are answered at all: by their Host, their Origin and their API key; and headers of all responses."""

import hmac
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.server import errors
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.options import is_loopback

HEADERS = {
    # The page has files of its own only: nothing inline, nothing from elsewhere, and no other page shows it in a frame.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_KEY = re.compile(rb"[!-~]{16,512}")
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")


def read_key(path: str) -> bytes | None:
    """The API key in a file; None for the path "".

    Raises: ArgumentError if there is no such file, others than its owner can read it, or it holds no key.
    """
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(4096)
    except OSError as error:
        raise ArgumentError("api_key_file", f"expected a file with the key, found {path}: {error.strerror}") from error
    if mode & 0o077:
        problem = f"expected a file that its owner alone can read (chmod 600), found {path} with mode {mode:o}"
        raise ArgumentError("api_key_file", problem)
    key = content.strip()
    if not _KEY.fullmatch(key):
        # The key itself is never shown.
        problem = f"expected one line of 16 to 512 printable ASCII characters without spaces in {path}, found another"
        raise ArgumentError("api_key_file", problem)
    return key


class Names:
    """The names by which requests may address this server.

    A page of another site can make its own name resolve to this server (DNS rebinding), and then reads the answers as
    if they were its own. Its name stays in the header Host, by which it is refused. No name resolves that is an IP
    address already, so these are all allowed.

    Args:
      names: host names without ports, besides localhost.
    """

    def __init__(self, names: Iterable[str]):
        self._names = {"localhost", *(name.lower() for name in names)}

    def allow(self, host: str) -> bool:
        """Whether a header Host names this server."""
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = match["name"].lower()
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def names_of(host: str, more: Iterable[str]) -> Names:
    """The names of a server that listens on `host`, with more that were given."""
    # On loopback alone, no other machine has a name for this one.
    own = () if is_loopback(host) else (host, socket.gethostname())
    return Names((*own, *more))


class Guard:
    """Refuses requests that do not come from a client of this server, and adds the headers of all responses.

    It is the outermost part of the application, so that no other part sees such a request.

    Args:
      app: what answers the others.
      names: names of this server.
      key: the API key that requests must bring, or None.
      public: paths that need no key.
      count: called with the scope and the status after each response; None: no response was started.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Names,
        key: bytes | None,
        public: frozenset[str],
        count: Callable[[Scope, int | None], None],
    ):
        self._app, self._names, self._key, self._public, self._count = app, names, key, public, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = None

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope["path"], Headers(scope=scope))
        try:
            if refusal is None:
                await self._app(scope, receive, send_safely)
            else:
                await refusal.response()(scope, receive, send_safely)
        except Exception as error:
            # Starlette raises an error again that it has answered and reported. Reported here is one that came after
            # the response had begun, or while it was sent.
            if status is None or status < 500:
                failure = errors.of(error, f"{scope['method']} {scope['path'][:200]!a}")
                if status is None:
                    await failure.response()(scope, receive, send_safely)
        finally:
            self._count(scope, status)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        """Why a request is refused; None if it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._names.allow(host):
            problem = f"Host: expected a name of this server, found {host[:100]!a}; --names adds one"
            return ApiError(403, problem, code="host_not_allowed")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            problem = f"Origin: expected that of this server, found {origin[:100]!a}"
            return ApiError(403, problem, code="origin_not_allowed")
        if self._key is not None and path not in self._public:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
                problem = "Authorization: expected Bearer and this server's API key, found another or none"
                return ApiError(401, problem, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None
