"""Where the time of a run goes."""

import threading

import pytest
from lab import stop_time

from memoryllm_jax.training import goodput as goodput_lib
from memoryllm_jax.training.goodput import Goodput, GoodputRecord, earlier_seconds, text


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, as a list of one number."""
    return stop_time(monkeypatch, goodput_lib)


class Step:
    """Results of a step of the devices, which are there after `end`."""

    def __init__(self):
        self._ended = threading.Event()

    def block_until_ready(self):
        self._ended.wait(10)

    def end(self, goodput):
        self._ended.set()
        while goodput._ends.last() is None:  # until the thread has noted the time
            pass


def test_each_moment_counts_for_one_activity_and_laps_are_steps_and_input(now):
    goodput = Goodput()
    now[0] += 2
    with goodput.during("compile"):
        now[0] += 30
    goodput.begin("step")
    goodput.lap()
    now[0] += 3
    with goodput.during("validation"):
        now[0] += 50
        with goodput.during("compile"):
            now[0] += 5
    now[0] += 4
    assert goodput.lap() == 7
    now[0] += 6
    assert goodput.lap() == 6
    record = goodput.record()
    assert record["seconds"] == {"start": 2, "compile": 35, "step": 13, "validation": 50}
    assert record["wall_seconds"] == 100 and record["share"] == 0.13
    assert text(record) == "goodput: 13.0% of 1m40s in steps; validation 50.0%, compile 35.0%, start 2.0%"


def test_input_counts_only_while_the_devices_have_no_step(now):
    """The host waits 10 s for each batch but the first. The second step ends within the wait, the first before it."""
    goodput, steps = Goodput(), [Step(), Step(), Step()]

    def feeds():
        now[0] += 5  # the devices have no step yet
        yield steps[0]
        now[0] += 10
        yield steps[1]
        now[0] += 3
        steps[1].end(goodput)
        now[0] += 7
        yield steps[2]
        now[0] += 10  # the last step goes on

    goodput.begin("step")
    for step in goodput.inputs(feeds()):
        goodput.dispatched(step)
        now[0] += 1
        if step is steps[0]:
            step.end(goodput)
            now[0] += 2
    steps[2].end(goodput)
    goodput.close()
    seconds = goodput.record()["seconds"]
    assert seconds["input"] == 5 + 10 + 7
    assert seconds["step"] == 3 + 1 + 3 + 1 + 10


def test_steps_after_the_checkpoint_are_lost():
    def record(at, **seconds):
        return GoodputRecord(step=at, seconds=seconds)

    first = [record(10, start=5.0, step=20.0), record(20, start=5.0, step=42.0), record(30, start=5.0, step=60.0)]
    assert earlier_seconds([], 10) == {}
    assert earlier_seconds(first, 20) == {"start": 5, "step": 42, "lost": 18}
    assert earlier_seconds(first, 0) == {"start": 5, "step": 0, "lost": 60}  # killed before its first checkpoint
    # The second process goes on from step 20, is killed after step 40, and a third one goes on from step 20 again.
    second = [*first[:2], record(20, start=5.0, step=42.0, lost=18.0), record(40, start=9.0, step=80.0, lost=18.0)]
    assert earlier_seconds(second, 20) == {"start": 9, "step": 42, "lost": 18 + 38}
