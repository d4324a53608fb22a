import asyncio
import json
import threading
import time

import pytest
from starlette.requests import Request

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.jobs import Job, StoppedError, answer

EVENTS = "text/event-stream"


def ask(served, work, accept, gone=None, is_pass=False) -> list[bytes]:
    """Sends a request whose answer is `work`.

    Args:
      gone: an Event, at which the client goes away.
      is_pass: as of `answer`.
    Returns: the parts of the response's body.
    """
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"accept", accept.encode())]}
    parts = []

    async def receive():
        while gone is None or not gone.is_set():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        parts.append(message.get("body", b""))

    async def call():
        response = await answer(Request(scope, receive), served, work, is_pass)
        await response(scope, receive, send)

    asyncio.run(call())
    return parts


def events(parts):
    return [json.loads(line.removeprefix("data: ")) for line in b"".join(parts).decode().split("\n\n") if line]


@pytest.mark.parametrize("accept", [EVENTS, "application/json"])
def test_work_stops_when_the_client_goes_away(served, accept):
    begun, stopped, reached = threading.Event(), threading.Event(), []

    def work(job):
        report = job.begin("counting")
        begun.set()
        try:
            for done in range(1000):  # ten seconds
                report(done / 1000)
                reached.append(done)
                time.sleep(0.01)
        except StoppedError:
            stopped.set()
            raise

    try:
        ask(served, work, accept, gone=begun)
    except Exception as error:
        assert type(error).__name__ == "ClientDisconnect"
    assert stopped.wait(5) and len(reached) < 500


def test_events_tell_what_is_done_and_end_with_the_result_or_an_error(served, capsys):
    def work(job):
        job.begin("reading")(0.25)
        time.sleep(0.3)
        return {"tokens": []}

    first, *_, last = events(ask(served, work, EVENTS))
    assert first == {"done": 0.25, "doing": "reading"} and last == {"tokens": []}

    def fails(job):
        raise UserError("/a/path: token 3: its row cannot be read")

    (event,) = events(ask(served, fails, EVENTS))
    assert event["error"]["type"] == "server_error" and "path" not in event["error"]["message"]
    assert capsys.readouterr().err == "error: POST /: /a/path: token 3: its row cannot be read\n"


def test_a_computation_ends_at_the_time_limit_but_not_within_a_part_that_is_kept():
    job = Job(time_limit=0.01)
    kept = job.begin("reading", is_kept=True)
    report = job.begin("")
    time.sleep(0.02)
    kept(0.25)
    assert job.done == 0.25
    with pytest.raises(ApiError, match=r"longer than .* seconds, the server.s time limit"):
        report(0.5)
    job.stop()
    kept(0.75)
    with pytest.raises(StoppedError):
        report(1.0)


def test_a_pass_over_the_vocabulary_holds_up_nobody(served):
    def passes(job):
        body = b"".join(ask(served, lambda job: {"answered": True}, "application/json"))
        return json.loads(body)

    assert events(ask(served, passes, EVENTS, is_pass=True))[-1] == {"answered": True}
