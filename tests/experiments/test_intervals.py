"""Intervals hold a planted difference as often as they claim to, and tell a useless memory from a useful one."""

import numpy as np
import pytest

from memoryllm_jax.experiments.intervals import NO_SPREAD, Documents, Spread, of_replicates, spread_of_seeds

DOCUMENTS, SEEDS = 57, 3  # as in the held-out text and the protocol that the docs report on


def planted(rng, gains, deviation=0.01):
    """Nats by document of variants that gain this much a token on average over all documents that there could be.

    Returns: (nats [variants, seeds, documents], tokens by document).
    """
    tokens_D = np.exp(rng.normal(7, 1.2, DOCUMENTS)).round()
    document_D, seed_S = rng.normal(3, 0.3, DOCUMENTS), rng.normal(0, 0.02, SEEDS)
    nats = []
    for gain in gains:
        gain_D = rng.normal(gain, 0.05, DOCUMENTS)
        run_S = seed_S + rng.normal(0, deviation, SEEDS)
        nats.append((document_D - gain_D + run_S[:, None]) * tokens_D)
    return np.array(nats), tokens_D


def test_intervals_hold_the_truth_as_often_as_they_claim():
    rng, gain, held, trials = np.random.default_rng(0), 0.02, 0, 250
    documents = Documents(DOCUMENTS, replicates=300)
    for _ in range(trials):
        nats, tokens_D = planted(rng, [0, gain, 0, 0, 0.1])
        spread = spread_of_seeds(nats.sum(-1) / tokens_D.sum())
        found = documents.difference(nats[1], nats[0], tokens_D, spread)
        held += found.low <= -gain <= found.high
    assert 0.91 < held / trials < 0.99  # 0.95, within about three standard errors


def test_a_useless_memory_is_told_from_a_useful_one():
    nats, tokens_D = planted(np.random.default_rng(1), [0, 0, 0.1])
    spread, documents = spread_of_seeds(nats.sum(-1) / tokens_D.sum()), Documents(DOCUMENTS)
    useless, useful = (documents.difference(x, nats[0], tokens_D, spread) for x in nats[1:])
    assert useless.low < 0 < useless.high and not useless.finds
    assert useful.high < 0 and useful.finds
    same = documents.difference(nats[0], nats[0], tokens_D)
    assert same == (0, 0, 0) and not same.finds


def test_the_spread_of_seeds_is_what_variants_and_seeds_do_not_explain():
    rng = np.random.default_rng(0)
    losses_VS = rng.normal(3, 0.5, (100, 1)) + rng.normal(0, 0.5, 3) + rng.normal(0, 0.01, (100, 3))
    found = spread_of_seeds(losses_VS)
    assert found.deviation == pytest.approx(0.01, rel=0.15) and found.freedom == 99 * 2
    losses_VS[7, 1] = np.nan  # a run that is not finished
    assert spread_of_seeds(losses_VS).freedom == 99 * 2 - 1
    assert spread_of_seeds(losses_VS[:, :1]) is NO_SPREAD
    # Seeds widen an interval as Student's t says: documents that all agree leave nothing else.
    nats_SD, tokens_D = np.ones((3, DOCUMENTS)), np.ones(DOCUMENTS)
    seeds = Documents(DOCUMENTS, 5000).difference(nats_SD, 0 * nats_SD, tokens_D, Spread(0.03, 10))
    assert seeds.high - 1 == pytest.approx(2.28 * 0.03 * np.sqrt(2 / 3), rel=0.1)


def test_few_documents_get_the_interval_of_students_t():
    few, units = 20, np.full(20, 7.0)
    sums_D = 7 * np.random.default_rng(0).normal(3, 0.1, few)
    found = Documents(few, 20_000).mean(sums_D[None], units)
    half = 2.093 * np.std(sums_D / 7, ddof=1) / np.sqrt(few)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.04 * half)


def test_an_interval_of_replicates_may_be_infinite():
    assert of_replicates(5.0, [*range(1, 118), *[np.inf] * 4]) == (5.0, 4.0, np.inf)
