"""Crossings that are read from measured differences."""

import math

import numpy as np
import pytest

from memoryllm_jax.experiments import answers

TOKENS_L = np.array([1e6, 2e6, 4e6, 8e6])


@pytest.mark.parametrize(
    "differences, tokens",
    [
        ([-0.2, -0.1, 0.1, 0.2], 2e6 * math.sqrt(2)),  # halfway between two lengths on a logarithmic axis
        ([-0.2, -0.1, -0.1, 0.3], 4e6 * 2**0.25),
        ([0.1, -0.1, 0.1, 0.2], 2e6 * math.sqrt(2)),  # the last of several
        ([0.1, 0.1, 0.2, 0.2], 0),
        ([-0.1, 0.1, 0.2, -0.1], math.inf),  # base does not stay ahead
        ([-0.1, -0.1, -0.2, 0], math.inf),
        ([-0.1, math.nan, 0.2, 0.1], math.nan),
    ],
)
def test_base_is_ahead_after_the_last_crossing(differences, tokens):
    # Beside another replicate, which must not change it
    both_LR = np.array([differences, [-0.1, -0.1, 0.1, 0.1]]).T
    found = answers.zero_crossings(TOKENS_L, both_LR)
    assert found == pytest.approx([tokens, 2e6 * math.sqrt(2)], nan_ok=True)
