"""A fitted law recovers the numbers that runs were made from, and predicts a larger run."""

import math

import numpy as np
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import fits
from memoryllm_jax.experiments.fits import Law, Point

BASE = {"E": 1.2, "A": 60.0, "alpha": 0.38, "B": 900.0, "beta": 0.42}
LARGER = (1.5e6, 1.5e6)  # active and memory parameters


def planted(worth: float, gain: float) -> Law:
    numbers = [math.log(1.2), math.log(60), 0.38, math.log(900), 0.42, worth, gain]
    return Law(("ffn",), np.array(numbers), (1.0, 1.0))


def runs(law: Law) -> list[Point]:
    """Runs of three sizes, with and without a memory, at four lengths, whose losses vary by 0.3% with the seed."""
    rng, points = np.random.default_rng(0), []
    for size in (2e5, 6e5, 1.2e6):
        for share in (0, 0.42, 0.67):
            for tokens in (5e5, 1e6, 2e6, 8e6):
                kind = "ffn" if share else ""
                active, memory = size * (1 - share), size * share
                loss = law.loss(active, memory, tokens, kind)
                for noise in rng.normal(0, 0.003, 3):
                    points.append(Point(active, memory, tokens, loss * (1 + noise), kind, f"{size} {share} {tokens}"))
    return points


@pytest.mark.parametrize("worth, gain", [(0.3, 0.5), (0.0, 0.0)], ids=["useful", "useless"])
def test_planted_numbers_are_inside_their_intervals(worth, gain):
    law = planted(worth, gain)
    found = fits.fit(runs(law), replicates=40)
    numbers = found.numbers()
    for name, value in (BASE | {"k ffn": worth, "r ffn": gain}).items():
        assert law.named()[name] == pytest.approx(value)
        assert numbers[name].low <= value <= numbers[name].high, name
    assert (numbers["k ffn"].finds, numbers["r ffn"].finds) == (worth > 0, gain > 0)
    assert found.error == pytest.approx(0.003, rel=0.2)
    larger = law.loss(*LARGER, 3e7, "ffn")
    predicted = found.predicted(Point(*LARGER, 3e7, math.nan, "ffn", ""))
    assert predicted.low <= larger <= predicted.high and predicted.high - predicted.low < 0.03 * larger
    crossing = found.crossing((1e6, 0), (4e5, 6e5), "ffn")
    if worth:
        assert crossing.low <= law.crossing((1e6, 0), (4e5, 6e5), "ffn") <= crossing.high


def test_losses_are_equal_at_the_crossing():
    law, base, other = planted(0.3, 0.5), (1e6, 0), (4e5, 6e5)
    at = law.crossing(base, other, "ffn")
    assert law.loss(*base, at, "") == pytest.approx(law.loss(*other, at, "ffn"), rel=1e-12)
    assert law.loss(*base, 2 * at, "") < law.loss(*other, 2 * at, "ffn")
    assert planted(0.3, -0.5).crossing(base, other, "ffn") == 0  # learns more slowly, and to a worse end
    assert planted(1.5, 0.5).crossing(base, other, "ffn") == math.inf
    assert planted(1.5, -0.5).crossing(base, other, "ffn") == math.inf  # base is ahead at first alone


def test_too_few_settings_are_refused():
    with pytest.raises(UserError, match="fit: expected at least 14 settings, twice as many as its numbers, found 6"):
        fits.fit([Point(1e6, 1e6, tokens, 3.0, "ffn", str(tokens)) for tokens in range(1, 7)])
