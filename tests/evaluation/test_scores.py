"""Errors of scores and of their changes, against the bootstrap."""

import math

import numpy as np
import pytest

from memoryllm_jax.evaluation.scores import Change, Score


def deviation(value, units, draws=4000):
    """The standard deviation of a function of units that are drawn with replacement."""
    draw = np.random.default_rng(1)
    return np.std([value(draw.integers(units, size=units)) for _ in range(draws)], ddof=1)


def test_errors_of_perplexities_are_those_of_the_bootstrap_over_documents():
    draw = np.random.default_rng(0)
    tokens_D = draw.integers(50, 500, 60)
    nats_D = tokens_D * draw.normal(2.0, 0.3, 60)
    more_D = nats_D + tokens_D * draw.normal(0.1, 0.02, 60)  # close to the first, document by document
    full, half = Score.of_losses(nats_D, tokens_D), Score.of_losses(more_D, tokens_D)

    def perplexity(sums_D, chosen):
        return math.exp(sums_D[chosen].sum() / tokens_D[chosen].sum())

    assert full.value == pytest.approx(perplexity(nats_D, slice(None)))
    assert full.error == pytest.approx(deviation(lambda i: perplexity(nats_D, i), 60), rel=0.1)
    change = half.change(full)
    assert change.amount == pytest.approx(100 * (half.value / full.value - 1))
    expected = deviation(lambda i: 100 * perplexity(more_D, i) / perplexity(nats_D, i), 60)
    assert change.error == pytest.approx(expected, rel=0.1) and change.error < 0.2 * full.error / full.value * 100


def test_errors_of_accuracies_are_those_of_the_bootstrap_over_examples():
    draw = np.random.default_rng(0)
    right_N = draw.random(200) < 0.8
    some_N = right_N & (draw.random(200) < 0.7)
    full, half = Score.of_examples(right_N), Score.of_examples(some_N)
    assert full.error == pytest.approx(np.std(right_N, ddof=1) / math.sqrt(200))  # as the harness has it
    expected = deviation(lambda i: 100 * some_N[i].sum() / right_N[i].sum(), 200)
    assert half.change(full).error == pytest.approx(expected, rel=0.1)
    points = half.points(full)
    assert points.amount == pytest.approx(100 * (some_N.mean() - right_N.mean()))
    expected = deviation(lambda i: 100 * (some_N[i].mean() - right_N[i].mean()), 200)
    assert points.error == pytest.approx(expected, rel=0.1)


def test_what_is_not_known_is_nan():
    assert Score(3.0).change(Score(2.0)) == Change(50, pytest.approx(math.nan, nan_ok=True))
    assert math.isnan(Score(1.0).change(Score(0.0)).amount)
    assert math.isnan(Score.of_examples([0, 1] * 4 + [1]).error) and Score.of_examples([0, 1] * 5).error > 0
