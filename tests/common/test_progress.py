"""Progress in a log: when a line is printed, and the time left that it shows."""

import io

import pytest
from lab import stop_time

from memoryllm_jax.common import progress as progress_lib
from memoryllm_jax.common.progress import Progress, duration


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, as a list of one number."""
    monkeypatch.setattr("sys.stderr", io.StringIO())  # no terminal, so that there is no bar
    return stop_time(monkeypatch, progress_lib)


def test_a_log_gets_a_line_every_few_seconds(now):
    log = io.StringIO()
    progress = Progress("rows", 100, "row", every_s=10, stream=log)
    for seconds, done in ((4, 10), (9, 20), (10, 25), (19, 40), (20, 50)):
        now[0] = 100 + seconds
        progress.update(done, f"{done} done")
    progress.close()
    assert log.getvalue() == "rows 25.0%  25 done  ETA 0m30s\nrows 50.0%  50 done  ETA 0m20s\n"


def test_the_time_left_is_computed_from_the_restart_on(now):
    """The first step takes 90 s, as it compiles, and the others 2 s each."""
    log = io.StringIO()
    progress = Progress("steps", 100, "step", stream=log)
    now[0] += 90
    progress.restart(1, "loss 3")
    assert log.getvalue() == "steps 1.0%  loss 3  ETA unknown\n"
    now[0] += 2
    progress.update(2)
    assert progress.eta() == "3m16s"


def test_the_time_left_is_computed_without_what_was_done_before(now):
    progress = Progress("steps", 100, "step", initial=60, stream=io.StringIO())
    assert progress.eta() == "unknown"
    now[0] += 30
    progress.update(70)
    assert progress.eta() == "1m30s"  # 10 of the remaining steps took 30 s, so 30 more take 90 s


def test_a_line_postpones_the_next_progress(now):
    log = io.StringIO()
    progress = Progress("rows", 100, "row", every_s=10, stream=log)
    now[0] += 9
    progress.line("saved")
    now[0] += 9
    progress.update(50)
    assert log.getvalue() == "saved\n"
    now[0] += 1
    progress.update(50)
    assert log.getvalue().startswith("saved\nrows 50.0%")


def test_other_processes_print_nothing(now):
    log = io.StringIO()
    progress = Progress("rows", 100, "row", enabled=False, stream=log)
    progress.line("saved")
    now[0] += 60
    progress.update(50)
    assert log.getvalue() == "" and progress.done == 50


def test_durations():
    assert [duration(seconds) for seconds in (7.9, 307, 3900)] == ["0m07s", "5m07s", "1h05m"]
