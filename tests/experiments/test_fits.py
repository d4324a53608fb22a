"""A fitted law recovers the numbers that runs were made from, and predicts a larger run."""

import math

import numpy as np
import pytest
from scipy import optimize

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import fits
from memoryllm_jax.experiments.fits import Law, Point

BASE = {"E": 1.2, "A": 60.0, "alpha": 0.38, "B": 900.0, "beta": 0.42}
LARGER = (1.5e6, 1.5e6)  # active and memory parameters


def planted(worth: float, gain: float) -> Law:
    numbers = [math.log(1.2), math.log(60), 0.38, math.log(900), 0.42, worth, gain]
    return Law(("ffn",), np.array(numbers), (1.0, 1.0))


def runs(law: Law) -> list[Point]:
    """Settings of three sizes, with and without a memory, at four lengths, of three seeds that vary by 0.3%."""
    rng, points = np.random.default_rng(0), []
    for size in (2e5, 6e5, 1.2e6):
        for share in (0, 0.42, 0.67):
            for tokens in (5e5, 1e6, 2e6, 8e6):
                kind = "ffn" if share else ""
                active, memory = size * (1 - share), size * share
                loss = law.loss(active, memory, tokens, kind) * (1 + rng.normal(0, 0.003 / math.sqrt(3)))
                points.append(Point(active, memory, tokens, loss, kind, f"{size}", f"{size} {share}"))
    return points


@pytest.mark.parametrize("worth, gain", [(0.3, 0.5), (0.0, 0.0)], ids=["useful", "useless"])
def test_planted_numbers_are_inside_their_intervals(worth, gain):
    law = planted(worth, gain)
    found = fits.fit(runs(law), replicates=20)
    numbers = found.numbers()
    for name, value in (BASE | {"k ffn": worth, "r ffn": gain}).items():
        assert law.named()[name] == pytest.approx(value)
        assert numbers[name].low <= value <= numbers[name].high, name
    assert (numbers["k ffn"].finds, numbers["r ffn"].finds) == (worth > 0, gain > 0)
    assert found.error == pytest.approx(0.003 / math.sqrt(3), rel=0.4)
    assert len(found.replicates) + found.dropped == 20 and found.curves == {"ffn": 6}
    larger = law.loss(*LARGER, 3e7, "ffn")
    predicted = found.predicted(Point(*LARGER, 3e7, math.nan, "ffn", "", ""))
    assert predicted.value == pytest.approx(larger, rel=0.01) and predicted.high - predicted.low < 0.03 * larger
    crossing = found.crossing((1e6, 0), (4e5, 6e5), "ffn")
    if worth:
        assert crossing.value == pytest.approx(law.crossing((1e6, 0), (4e5, 6e5), "ffn"), rel=0.2)
        assert crossing.low < crossing.value < crossing.high


def test_predictions_include_the_error_of_the_law():
    law = planted(0.3, 0.5)
    residuals_N = np.array([0.01, -0.01] * 20)  # which 33 degrees of freedom are left of
    found = fits.Fit(law, [law] * 100, 0, residuals_N, {"ffn": 6})
    value, low, high = found.predicted(Point(*LARGER, 3e7, math.nan, "ffn", "", ""))
    error = 0.01 * math.sqrt(40 / 33)
    assert (low, high) == pytest.approx((value * math.exp(-error), value * math.exp(error)))


def test_intervals_of_a_kind_with_few_curves_are_widened():
    laws = [planted(0.3 + aside, 0.5 - aside) for aside in np.linspace(-0.1, 0.1, 41)]
    found = fits.Fit(planted(0.3, 0.5), laws, 0, np.zeros(40), {"ffn": 3}).numbers()
    half = 0.095 * math.sqrt(3 / 2)
    assert found["k ffn"] == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert found["r ffn"] == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_each_kind_of_memory_may_be_as_harmful_as_its_tables_are_small():
    points = [Point(1e5, 1e5, 1e6, 3, "ffn", "S", "a"), Point(1e5, 1e6, 1e6, 3, "rows", "S", "b")]
    assert fits.Data.of(points, ["ffn", "rows"]).least_K == pytest.approx([-0.9, -0.09])


def test_slopes_are_those_of_the_residuals():
    data = fits.Data.of(runs(planted(0.3, 0.5)), ["ffn"])
    x, step = np.array([0.1, -0.5, 0.4, -0.3, 0.3, 0.2, 0.7]), 1e-6
    for number, slopes_N in enumerate(data.slopes(x).T):
        aside = step * np.eye(len(x))[number]
        by_steps = (data.residuals(x + aside) - data.residuals(x - aside)) / (2 * step)
        np.testing.assert_allclose(slopes_N, by_steps, atol=1e-8)


def test_the_crossing_is_the_root_of_the_difference_of_losses():
    base, other = (1e6, 0), (4e5, 6e5)
    numbers = np.array([math.log(1.2), math.log(0.4), 0.38, math.log(1.5), 0.42, 0.3, 0.5])
    law = Law(("ffn",), numbers, (6e5, 2e6))
    e, a, alpha, b, beta, k, r = law.named().values()

    def difference(log_tokens):  # the law as the module's docstring has it
        losses = []
        for active, memory in (base, other):
            tokens = math.exp(log_tokens) * (1 + r * memory / (memory + active))
            losses.append(e + a * (active + k * memory) ** -alpha + b * tokens**-beta)
        return losses[0] - losses[1]

    root = math.exp(optimize.brentq(difference, math.log(1e4), math.log(1e12)))
    assert law.crossing(base, other, "ffn") == pytest.approx(root, rel=1e-9)
    assert difference(math.log(2 * root)) < 0 < difference(math.log(root / 2))
    assert planted(0.3, -0.5).crossing(base, other, "ffn") == 0  # learns more slowly, and to a worse end
    assert planted(1.5, 0.5).crossing(base, other, "ffn") == math.inf
    assert planted(1.5, -0.5).crossing(base, other, "ffn") == math.inf  # base is ahead at first alone


def test_settings_that_do_not_determine_the_law_are_refused():
    points = runs(planted(0.3, 0.5))
    cases = {
        "3 sizes without a memory, .* found 2": [p for p in points if p.kind or p.size != "200000.0"],
        "2 sizes with ffn, .* found 1": [p for p in points if not p.kind or p.size == "200000.0"],
        "14 settings, twice as many as its numbers, found 9": [p for p in points if p.tokens == 1e6],
        "3 sizes without a memory, .* found 0": [],
    }
    for problem, few in cases.items():
        with pytest.raises(UserError, match=f"fit: expected at least {problem}"):
            fits.fit(few)
