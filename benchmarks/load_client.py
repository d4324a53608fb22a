"""The two sides of the load test (load.py): a server in a process of its own, and clients that read streams."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import NamedTuple

from workers import last_line

from memoryllm_jax.common.child import end_with_parent
from memoryllm_jax.common.errors import UserError

_START_S = 300  # the longest start, which compiles
_END_S = 60


class Server:
    """`python -m memoryllm_jax.serve` on a free port of this machine.

    Args:
      arguments: of the command, besides the port.
    Attributes:
      port, name: where it listens, and the name of its model.
      start_s: seconds until it served.
    Raises: UserError if it does not start.
    """

    def __init__(self, arguments: list[str]):
        self._errors, self._is_ending = tempfile.TemporaryFile("w+"), False
        start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memoryllm_jax.serve", "--port=0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            preexec_fn=end_with_parent(),
        )
        watch = threading.Timer(_START_S, self._process.kill)
        watch.start()
        for line in self._process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise UserError(f"serve: expected a server, found exit code {self._process.wait()}: {self._said()}")
        watch.cancel()
        self.port, self.start_s = int(found[1]), time.monotonic() - start
        self.name = json.loads(self.get("/v1/models"))["data"][0]["id"]

    def _said(self) -> str:
        self._errors.seek(0)
        return last_line(self._errors.read())

    def get(self, path: str) -> str:
        """The body of a response."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """The values of /metrics that have no labels."""
        lines = [line.split() for line in self.get("/metrics").splitlines()]
        return {line[0]: float(line[1]) for line in lines if line and line[0] != "#" and "{" not in line[0]}

    def rss(self) -> int:
        """Bytes of its memory that are resident."""
        with open(f"/proc/{self._process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/task"))

    def processor_s(self) -> float:
        """Seconds of all cores that it has used."""
        with open(f"/proc/{self._process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        """Asks it, once, to finish what runs and to end: a second signal would end it at once."""
        if not self._is_ending:
            self._process.send_signal(signal.SIGTERM)
        self._is_ending = True

    def close(self) -> int:
        """Asks it to end, and waits. Returns: its exit code."""
        self.terminate()
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
      status: of the response.
      texts: of each choice, as far as they came.
      first_s: seconds to the first token.
      new_tokens: as the server counts them; None if it did not say.
      is_whole: whether the stream came to its end.
      error: the message of an error, or "".
      retry_after: seconds, of a refused request.
    """

    status: int
    texts: tuple[str, ...]
    first_s: float
    new_tokens: int | None
    is_whole: bool
    error: str
    retry_after: float


async def ask(server: Server, body: dict, leave_after: int | None = None) -> Answer:
    """Sends a completion to the server, and reads the stream.

    Args:
      body: of the request, without "model" and "stream".
      leave_after: after so many events the client goes away.
    """
    body = body | {"model": server.name, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        # In HTTP/1.0 a body is not cut into chunks, and ends with the connection.
        head = f"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if status != 200:
            error = json.loads(await reader.read())["error"]["message"]
            return Answer(status, (), 0.0, None, False, error, float(headers.get("retry-after", 0)))
        return await _read(reader, start, body.get("n", 1), leave_after)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _read(reader, start, count, leave_after) -> Answer:
    texts, first_s, new_tokens, error, is_whole = [""] * count, 0.0, None, "", False
    events = 0
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            is_whole = not error
            break
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            error = event["error"]["message"]
            continue
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            first_s = first_s or time.monotonic() - start
        if event.get("usage"):
            new_tokens = event["usage"]["completion_tokens"]
        events += 1
        if leave_after is not None and events >= leave_after:
            break
    return Answer(200, tuple(texts), first_s, new_tokens, is_whole, error, 0.0)
