"""The clock of a run."""

import time

from memoryllm_jax.training.recorder import Clock


def test_clock_leaves_out_what_is_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    now[0] += 3
    with clock.paused():
        now[0] += 50
    now[0] += 4
    assert clock.lap() == 7
    now[0] += 2
    assert clock.lap() == 2  # the lap and the pause before do not count
