"""Learning rates by step, and what the decay of wsd may not change before it begins."""

import jax
import numpy as np
import pytest

from memoryllm_jax.training import schedules

RATES = {"optimizer.peak_lr": 1e-3, "optimizer.final_lr": 1e-4, "optimizer.warmup_steps": 10}


def rates(config, **kwargs):
    return np.asarray(jax.jit(schedules.learning_rate(config, **kwargs))(np.arange(config.steps)))


def test_cosine_falls_from_the_warm_up_to_the_last_step(make_config):
    rate = rates(make_config(steps=100, **RATES))
    assert rate[[0, 9, 54, 99]] == pytest.approx([1e-4, 1e-3, (1e-3 + 1e-4) / 2, 1e-4])


def test_wsd_is_stable_and_then_falls_by_the_root(make_config):
    config = make_config(steps=100, **RATES, **{"optimizer.schedule": "wsd", "optimizer.decay_share": 0.25})
    rate, number = rates(config), np.arange(1, 101)
    falling = 1e-4 + 9e-4 * (1 - np.sqrt((number - 75) / 25, where=number > 75, out=np.zeros(100)))
    np.testing.assert_allclose(rate, np.minimum(number / 10, 1) * falling, rtol=1e-6)
    assert set(rate[9:75]) == {np.float32(1e-3)} and rate[75] < rate[74]
    np.testing.assert_allclose(rates(config, peak=0.02), 20 * rate, rtol=1e-6)

    # Neither the length of the run nor its decay changes the rates before it.
    longer = make_config(steps=1000, **RATES, **{"optimizer.schedule": "wsd"})
    constant = make_config(steps=100, **RATES, **{"optimizer.schedule": "constant"})
    np.testing.assert_array_equal(rate[:75], rates(longer)[:75])
    np.testing.assert_array_equal(rates(constant), rates(longer)[:100])
