"""The scheduler over a model of one line (fake_slots.py), so that each text is known and each call can be looked at."""

import asyncio
import contextlib
import itertools
import random

import pytest
from fake_slots import PIECE, Bytes, Fake, alone

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.scheduler import QueueFullError, Scheduler
from memoryllm_jax.server.work import Finished, Token, Work
from memoryllm_jax.tol.slot_edits import PoolFullError


@contextlib.contextmanager
def started(fake, queue=64, time_limit=5.0, drain=True, edits=None):
    scheduler = Scheduler(fake, edits, Bytes(), queue, time_limit)
    try:
        yield scheduler
    finally:
        fake.go()
        scheduler.close(drain)


def work(prompt: str, max_tokens: int = 5, **more) -> Work:
    return Work(tuple(prompt.encode()), max_tokens, Sampling(0), **more)


async def read(stream) -> tuple[list[int], str, str]:
    """Returns: (the tokens, their text, why it ended)."""
    events = [event async for event in stream]
    assert all(isinstance(event, Token) for event in events[:-1]) and isinstance(events[-1], Finished)
    return [event.id for event in events[:-1]], "".join(event.text for event in events), events[-1].reason


def expected(work: Work) -> tuple[list[int], str, str]:
    """What `read` returns of it, in a loop over its tokens."""
    ids, text = [], ""
    for id in alone(work.ids, work.max_tokens):
        if id in work.stop_ids:
            return ids, Bytes().decode(ids), "stop"
        ids.append(id)
        text = Bytes().decode(ids)
        places = [text.find(stop) for stop in work.stop_texts if stop in text]
        if places:
            return ids, text[: min(places)], "stop"
    return ids, text, "length"


def test_each_text_is_that_of_its_prompt_alone_whatever_runs_beside_it_and_nothing_is_left_behind():
    rng = random.Random(0)
    fake = Fake(slots=3, untaken=lambda step: step % 7 == 0, seconds=0.0005)

    async def one(scheduler):
        await asyncio.sleep(rng.random() * 0.05)
        prompt = "".join(rng.choices("abcdef", k=rng.randint(1, 3 * PIECE)))
        more = {"stop_texts": ("é ", "bb")} if rng.random() < 0.5 else {"stop_ids": frozenset(b" ")}
        asked = work(prompt, rng.choice((0, 1, 2, 20)), **more)
        (stream,) = scheduler.submit([asked])
        if rng.random() < 0.3:
            async for _ in stream:
                if rng.random() < 0.3:
                    break
            stream.cancel()
        else:
            assert await read(stream) == expected(asked)

    async def all_of_them(scheduler):
        await asyncio.gather(*(one(scheduler) for _ in range(60)))

    with started(fake) as scheduler:
        asyncio.run(all_of_them(scheduler))
    assert scheduler.running == scheduler.waiting == 0 and fake.ids == [None] * 3
    ended = scheduler.statistics.sequences
    assert sum(ended.values()) == 60 and all(ended[how] for how in ("stop", "length", "cancelled"))


def test_requests_enter_the_queue_whole_or_not_at_all_and_leave_it_first_come_first_served():
    fake = Fake(slots=2)

    async def run(scheduler):
        fake.hold(0)

        def submit(*works):
            return [asyncio.create_task(read(stream)) for stream in scheduler.submit(list(works))]

        tasks = submit(work("a", 30), work("b", 3))
        while scheduler.waiting:
            await asyncio.sleep(0.001)
        tasks += submit(work("c", 3), work("d", 3))
        with pytest.raises(QueueFullError) as full:
            scheduler.submit([work("e"), work("f")])
        assert scheduler.waiting == 2 and full.value.headers == {"Retry-After": str(full.value.retry_after)}
        with pytest.raises(ApiError, match="expected at most 5 sequences of a request, found 6") as never:
            scheduler.submit([work("e")] * 6)
        with pytest.raises(ApiError, match="expected 1 to 63 tokens, found 64"):
            scheduler.submit([work("e" * 64)])
        assert full.value.status == 429 and never.value.status == 400
        tasks += submit(work("e", 3))
        fake.go()
        await asyncio.gather(*tasks)

    with started(fake, queue=3) as scheduler:
        asyncio.run(run(scheduler))
    assert [entry[2] for entry in fake.log if entry[0] == "prefill"] == [list(name.encode()) for name in "abcde"]


class FullEdits:
    """`SlotEdits` without room for an error as the overlay, which it raises."""

    def place(self, slot, overlay):
        if overlay:
            raise overlay

    def free(self, slot):
        pass


def test_a_sequence_whose_edits_do_not_fit_is_told_so_and_the_next_one_takes_its_slot():
    errors = [(PoolFullError("edits", "no room"), 429, {"Retry-After": "1"}), (UserError("too large"), 400, None)]

    async def run(scheduler):
        for error, status, headers in errors:
            (refused,), (other,) = scheduler.submit([work("a", overlay=error)]), scheduler.submit([work("b")])
            with pytest.raises(ApiError, match=str(error)) as found:
                await read(refused)
            assert (found.value.status, found.value.headers) == (status, headers)
            assert await read(other) == expected(work("b"))

    with started(Fake(slots=1), edits=FullEdits()) as scheduler:
        asyncio.run(run(scheduler))


def test_next_step_is_dispatched_before_tokens_are_read_and_prompts_take_a_bounded_part():
    fake = Fake(slots=3)

    async def run(scheduler):
        fake.hold(0)
        first = scheduler.submit([work("a", 40)])
        while not fake.log:
            await asyncio.sleep(0.001)
        others = scheduler.submit([work("b" * (4 * PIECE + 3), 4), work("c", 4)])
        fake.go()
        for stream in (*first, *others):
            await read(stream)

    with started(fake) as scheduler:
        asyncio.run(run(scheduler))
    steps = [k for k, entry in enumerate(fake.log) if entry[0] == "step"]
    for number, (step, next_step) in enumerate(itertools.pairwise(steps)):
        between = fake.log[step + 1 : next_step]
        assert sum(len(entry[2]) for entry in between if entry[0] == "prefill") <= PIECE
        # Of the steps before this one, all but the last are read.
        assert fake.log[:next_step].count(("read",)) == number
    assert fake.log.count(("read",)) == len(steps) <= 44


def test_client_that_goes_frees_its_slot_at_the_next_step_or_its_place_in_the_queue():
    fake = Fake(slots=1)

    async def run(scheduler):
        fake.hold(3)
        (running,) = scheduler.submit([work("a", 60)])
        await anext(running)
        (waiting,), (last,) = scheduler.submit([work("b")]), scheduler.submit([work("c")])
        waiting.cancel()
        assert scheduler.waiting == 1
        running.cancel()
        assert [event async for event in running if isinstance(event, Finished)] == []
        fake.go()
        assert await read(last) == expected(work("c"))
        # At most those before the held one, that one, and those of the third prompt.
        assert fake.steps <= 3 + 1 + 4

    with started(fake) as scheduler:
        asyncio.run(run(scheduler))
    assert scheduler.statistics.sequences == {"stop": 0, "length": 1, "cancelled": 2, "failed": 0}


def test_request_that_takes_too_long_fails_even_where_the_engine_hangs():
    fake = Fake(slots=1)

    async def run(scheduler):
        fake.hold(0)
        (running,), (waiting,) = scheduler.submit([work("a")]), scheduler.submit([work("b")])
        for stream in (running, waiting):
            with pytest.raises(ApiError, match=r"longer than 0\.1 seconds") as error:
                await read(stream)
            assert error.value.status == 504
        fake.go()
        assert await read(scheduler.submit([work("c", 2)])[0]) == expected(work("c", 2))

    with started(fake, time_limit=0.1) as scheduler:
        asyncio.run(run(scheduler))
    assert scheduler.statistics.sequences["cancelled"] == 2


def test_error_of_the_engine_ends_all_streams_and_refuses_new_ones():
    fake = Fake(slots=1)

    async def run(scheduler):
        fake.hold(3)
        running, waiting = scheduler.submit([work("a", 60), work("b")])
        await anext(running)
        fake.broken = RuntimeError("the device\nis lost")
        fake.go()
        for stream in (running, waiting):
            with pytest.raises(ApiError, match="the engine failed, and the server has to be started again") as error:
                async for _ in stream:
                    pass
            assert error.value.status == 503
        assert scheduler.error is fake.broken
        with pytest.raises(ApiError, match="the engine failed"):
            scheduler.submit([work("c")])

    with started(fake) as scheduler:
        asyncio.run(run(scheduler))
    assert scheduler.running == scheduler.waiting == 0 and scheduler.statistics.sequences["failed"] == 2


@pytest.mark.parametrize("drain", [True, False])
def test_closing_refuses_new_sequences_and_finishes_or_fails_the_accepted_ones(drain):
    fake = Fake(slots=1)
    scheduler = Scheduler(fake, None, Bytes(), 4, 60.0)

    async def run():
        fake.hold(3)
        accepted = scheduler.submit([work("a", 9), work("b", 3)])
        await anext(accepted[0])
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, drain))
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="the server is closing"):
            scheduler.submit([work("c")])
        fake.go()
        if drain:
            assert [(await read(stream))[2] for stream in accepted] == ["length", "length"]
        else:
            for stream in accepted:
                with pytest.raises(ApiError, match="the server is closing"):
                    await read(stream)
        await closing

    asyncio.run(run())
    assert not scheduler._thread.is_alive()


def test_step_that_waits_for_rows_is_taken_again():
    fake = Fake(slots=1, untaken=lambda step: step in (1, 5))

    async def run(scheduler):
        assert await read(scheduler.submit([work("a", 5)])[0]) == expected(work("a", 5))

    with started(fake) as scheduler:
        asyncio.run(run(scheduler))


def test_echo_gives_the_prompt_with_its_scores_and_then_the_new_tokens():
    ids = ("ab" * PIECE + "é").encode()
    cut = Work(ids + b"\xc3", 0, Sampling(0), echo=True, alternatives=1)  # within a character

    async def run(scheduler):
        scored, echoed = scheduler.submit([cut, Work(ids, 2, Sampling(0), echo=True)])
        events = [event async for event in scored]
        assert events[-1] == Finished("length")
        assert "".join(event.text for event in events) == Bytes().decode(cut.ids)
        first, *others = cut.ids
        assert events[0][:1] + events[0][2:] == (first, None, ())
        for event, id in zip(events[1:-1], others, strict=True):
            assert event[:1] + event[2:] == (id, -float(id), ((id + 1, id - 0.1),))
        found, text, _ = await read(echoed)
        assert found == [*ids, *alone(ids, 2)] and text == Bytes().decode(found)

    with started(Fake()) as scheduler:
        asyncio.run(run(scheduler))


def test_events_of_one_round_wake_the_event_loop_once():
    fake = Fake(slots=8)

    async def run(scheduler):
        loop, calls = asyncio.get_running_loop(), []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *arguments: (calls.append(1), original(*arguments))
        await asyncio.gather(*(read(stream) for stream in scheduler.submit([work("a", 30)] * 8)))
        assert scheduler.statistics.new_tokens == 8 * 30
        assert len(calls) <= fake.steps + 2

    with started(fake) as scheduler:
        asyncio.run(run(scheduler))
