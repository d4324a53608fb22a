"""The choice of a peak learning rate."""

import math

import pytest

from memoryllm_jax.experiments import rates
from memoryllm_jax.experiments.protocol import Sweep

SWEEP = Sweep({}, (0.002, 0.004, 0.008), {}, most=6)


@pytest.mark.parametrize(
    "best, tried, is_inside",
    [
        (0.004, [0.002, 0.004, 0.008], True),
        (0.016, [0.002, 0.004, 0.008, 0.016, 0.032], True),
        (0.001, [0.0005, 0.001, 0.002, 0.004, 0.008], True),
        (1.0, [0.002, 0.004, 0.008, 0.016, 0.032, 0.064], False),  # no more rates than `most`
    ],
)
def test_a_row_is_extended_until_its_best_rate_is_inside(best, tried, is_inside):
    losses = {}
    while (choice := rates.choose(SWEEP, losses)).missing:
        assert choice.rate is None
        losses |= {rate: abs(math.log(rate / best)) for rate in choice.missing}
    assert list(choice.losses) == tried and choice.is_inside == is_inside
    assert choice.rate == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_rates_that_diverge_are_never_chosen():
    losses = {0.002: 3.0, 0.004: math.inf, 0.008: math.inf}
    assert rates.choose(SWEEP, losses).missing == (0.001,)
    choice = rates.choose(SWEEP, losses | {0.001: 3.1})
    assert choice.rate == 0.002 and choice.is_inside
    losses = dict.fromkeys((0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008), math.inf)
    assert rates.choose(SWEEP, losses) == rates.Choice(losses, (), None, False)
