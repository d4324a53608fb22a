"""Crossings that are read from measured differences."""

import dataclasses
import math
import types

import numpy as np
import pytest

from memoryllm_jax.experiments import answers, exploration
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.intervals import NO_SPREAD, Estimate, SeedSpread
from memoryllm_jax.experiments.protocol import Contrast, Setting
from memoryllm_jax.experiments.results import Cell, Difference

TOKENS_L = np.array([1e6, 2e6, 4e6, 8e6])
# {variant: (loss after 1 M tokens, what it falls by when tokens double)}
LINES = {"base": (3.0, 0.3), "memory": (2.8, 0.2), "flex-3": (2.85, 0.2), "rows-3": (2.5, 0.2)}
SHIFTS = np.linspace(-0.05, 0.05, 41)  # those of a 95% interval reach from -0.0475 to 0.0475


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


class Made:
    """As `Results`: losses that are lines over the logarithm of tokens, up to shifts in the replicates."""

    def __init__(self):
        self.texts = {"512": types.SimpleNamespace(bytes_per_token=1.5)}
        contrasts = (Contrast("", "memory", "base"), Contrast("", "base", "flex-3"), Contrast("", "rows-3", "base"))
        contrasts += (Contrast("", "flex-3", "rows-3"), Contrast("", "flex-3", ""))
        contrasts += (Contrast("", "base-rate-x2", "base"),)  # base does not overtake itself
        self.protocol = dataclasses.replace(protocol_lib.load("configs/protocols/small.py"), contrasts=contrasts)

    def cells(self, *variants):
        return [Cell("S", "512", tokens) for tokens in (1_000_000, 2_000_000, 8_000_000)]

    def seeds(self, variant, cell):
        return {0: self.protocol.run(Setting(variant, *cell[:2]), cell.tokens, 0, 1e-3)}

    def difference(self, a, b, cell):
        of_a, of_b = (loss - falls * math.log2(cell.tokens / 1e6) for loss, falls in (LINES[a], LINES[b]))
        spread = NO_SPREAD if a == "flex-3" and cell.tokens == 1_000_000 else SeedSpread(0.01, 4)
        return Difference(Estimate(of_a - of_b, of_a - of_b + SHIFTS), 1, spread)


def test_the_crossing_of_lines_is_measured_and_shown():
    results = Made()
    found = {crossing.variant: crossing for crossing in answers.crossings(results)}
    assert set(found) == {"memory", "flex-3", "rows-3"}
    for variant, log2_tokens in (("memory", 2), ("flex-3", 1.5)):
        # Lines that approach each other by 0.1 whenever tokens double
        expected = 1e6 * 2.0 ** (log2_tokens + np.array([0, -0.475, 0.475]))
        assert found[variant].tokens == pytest.approx(expected, rel=1e-9)
    assert found["rows-3"].tokens == (math.inf,) * 3
    assert [crossing.covers_seeds for crossing in found.values()] == [True, True, False]
    tables = []
    page = types.SimpleNamespace(table=lambda head, rows, *args, **kwargs: tables.append(rows))
    exploration.crossing_table(page, results, list(found.values()), "", "")
    ((memory, rows, flex),) = tables
    # Attention and FFNs of base have 201,280 parameters.
    assert memory == ["memory", "S", "512", "4 [2.88, 5.56]", "6 [4.32, 8.34]", "19.9 [14.3, 27.6]"]
    assert rows[3:] == ["not before 8", "not before 12", "not before 39.7"]
    assert flex[3] == "2.83 [2.03, 3.93] *"
