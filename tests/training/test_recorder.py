"""How the clock of a run is paused."""

import types

import jax
import numpy as np
import pytest
from lab import records, stop_time

from memoryllm_jax.common import progress
from memoryllm_jax.training import goodput
from memoryllm_jax.training.goodput import Goodput
from memoryllm_jax.training.recorder import Recorder, _limited
from memoryllm_jax.training.sizes import Sizes


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, as a list of one number."""
    return stop_time(monkeypatch, goodput, progress)


@pytest.mark.parametrize("late", ["validation or saving", "compilation"])
def test_a_pause_begins_when_the_devices_are_done(make_config, tmp_path, now, monkeypatch, late):
    """Each step takes a device 5 s, also while the clock is paused."""
    config = make_config("memory", steps=3)
    batches = types.SimpleNamespace(shards=1, epoch=lambda step: 0, bytes_a_token=4)
    done_at = {}

    def device_get(values):
        now[0] = max(now[0], done_at[values["loss"]])
        return values

    monkeypatch.setattr(jax, "device_get", device_get)
    sizes = Sizes((64,), 128)
    recorder = Recorder(config, str(tmp_path), 0, batches, None, None, sizes, Goodput())
    for step, size in recorder.steps(enumerate((64, 128 if late == "compilation" else 64, 64))):
        with recorder.dispatching(step, size):
            if size == 128:
                now[0] += 1000
            done_at[step] = max([now[0], *done_at.values()]) + 5
        recorder.add(step, size, {"loss": step, "grad_norm": 1, "learning_rate": 1})
        if step == 0 and late != "compilation":
            with recorder.paused("validation"):
                now[0] += 1000
    recorder.read()
    recorder.close()
    assert [record["tokens_per_second"] for record in records(tmp_path)] == [8 * 32 / 5] * 3


def test_only_a_spike_is_shown_with_its_limit():
    shown = [_limited(value, limit) for value, limit in ((9, 5), (5, 5), (np.nan, 5), (9, np.inf))]
    assert shown == ["9 (a spike, above 5)", "5", "nan", "9"]
