"""Intervals hold a planted difference as often as they claim to, alone and all together."""

import numpy as np
import pytest

from memoryllm_jax.experiments import intervals
from memoryllm_jax.experiments.intervals import NO_SPREAD, Documents, Estimate, SeedSpread

DOCUMENTS, SEEDS = 193, 3  # as in the held-out text and the protocol that the docs report on


def sizes(rng) -> np.ndarray:
    """Tokens of held-out documents: pages that are cut to their first 4,096 bytes, and shorter ones."""
    return np.minimum(np.exp(rng.normal(7.5, 0.9, DOCUMENTS)), 1400).round()


def planted(rng, gains, tokens_D, deviation=0.01):
    """Nats [variants, seeds, documents] of variants that gain this much a token on average over all documents.

    The gain is larger in long documents.
    """
    document_D, seed_S = rng.normal(3, 0.3, len(tokens_D)), rng.normal(0, 0.02, SEEDS)
    nats = []
    for gain in gains:
        gain_D = rng.normal(gain, 0.05, len(tokens_D)) * np.where(tokens_D == 1400, 1.5, 1)
        run_S = seed_S + rng.normal(0, deviation, SEEDS)
        nats.append((document_D - gain_D + run_S[:, None]) * tokens_D)
    return np.array(nats)


def mean_gain(gain: float) -> float:
    tokens_N = np.concatenate([sizes(np.random.default_rng(seed)) for seed in range(100)])
    return gain * float((tokens_N * np.where(tokens_N == 1400, 1.5, 1)).sum() / tokens_N.sum())


def test_intervals_hold_the_truth_as_often_as_they_claim():
    rng, held, all_held, trials = np.random.default_rng(0), 0, 0, 150
    documents, gains = Documents(DOCUMENTS, replicates=300), [0.02, 0, 0.02, 0.04, 0.1]
    truth = [-mean_gain(gain - gains[0]) for gain in gains[1:]]
    for _ in range(trials):
        tokens_D = sizes(rng)
        nats = planted(rng, gains, tokens_D)
        spread = intervals.spread_of_seeds(nats.sum(-1) / tokens_D.sum()).times(np.sqrt(2))
        found = [documents.estimate(x - nats[0], tokens_D, spread, i) for i, x in enumerate(nats[1:])]
        alone, (together, factor) = [estimate.interval for estimate in found], intervals.simultaneous(found)
        assert factor > 1 and together[0].high - together[0].low > alone[0].high - alone[0].low
        held += sum(i.low <= x <= i.high for i, x in zip(alone, truth)) / len(truth)
        all_held += all(i.low <= x <= i.high for i, x in zip(together, truth))
    assert 0.92 < held / trials < 0.98  # 0.95, within about three standard errors
    assert 0.90 < all_held / trials < 0.99


def test_few_documents_get_no_interval():
    tokens_D = np.ones(57)
    tokens_D[0] = 28  # a third of the text, which is worth 7 documents of equal size
    assert intervals.effective(tokens_D) == pytest.approx(8.4, abs=0.1)
    found = Documents(57).mean(np.random.default_rng(0).random((1, 57)), tokens_D)
    assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all() and not found.finds
    assert str(found) == f"{found.value:+.4f}"


def test_the_spread_of_seeds_is_what_variants_and_seeds_do_not_explain():
    rng = np.random.default_rng(0)
    losses_VS = rng.normal(3, 0.5, (100, 1)) + rng.normal(0, 0.5, 3) + rng.normal(0, 0.01, (100, 3))
    found = intervals.spread_of_seeds(losses_VS)
    assert found.deviation == pytest.approx(0.01, rel=0.15) and found.freedom == 99 * 2
    losses_VS[7, 1] = np.nan  # a run that is not finished
    assert intervals.spread_of_seeds(losses_VS).freedom == 99 * 2 - 1
    assert intervals.spread_of_seeds(losses_VS[:, :1]) is NO_SPREAD
    # Seeds widen an interval as Student's t says: documents that all agree leave nothing else.
    nats_SD, tokens_D = np.ones((3, DOCUMENTS)), np.ones(DOCUMENTS)
    seeds = Documents(DOCUMENTS, 5000).difference(nats_SD, 0 * nats_SD, tokens_D, SeedSpread(0.03, 10))
    assert seeds.high - 1 == pytest.approx(2.28 * 0.03 * np.sqrt(2 / 3), rel=0.1)


def test_a_cell_of_one_seed_takes_the_spread_of_others():
    alike = [SeedSpread(0.010, 12), SeedSpread(0.012, 6)]
    pooled = intervals.shared_spread(NO_SPREAD, alike)
    assert pooled == (pytest.approx(np.sqrt((12 * 0.01**2 + 6 * 0.012**2) / 18)), 18)
    assert intervals.shared_spread(alike[0], alike) == pooled
    unequal = [SeedSpread(0.05, 12), SeedSpread(0.01, 12)]
    assert intervals.shared_spread(NO_SPREAD, unequal) == unequal[1]  # of the most similar cell
    assert intervals.shared_spread(unequal[0], unequal) == unequal[0]
    assert intervals.shared_spread(NO_SPREAD, []) is NO_SPREAD
    assert intervals.shared_spread(SeedSpread(0.01, 2), [SeedSpread(0.01, 2)]) is NO_SPREAD


def test_few_documents_of_equal_size_get_the_interval_of_students_t():
    few, units = 20, np.full(20, 7.0)
    sums_D = 7 * np.random.default_rng(0).normal(3, 0.1, few)
    found = Documents(few, 20_000).mean(sums_D[None], units)
    half = 2.093 * np.std(sums_D / 7, ddof=1) / np.sqrt(few)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.04 * half)


def test_intervals_of_equal_losses_and_of_unknown_ones_do_not_widen_the_others():
    values_R = np.random.default_rng(0).normal(1, 1, 2000)
    same, unknown = Estimate(0.0, np.zeros(2000)), Estimate(2.0, np.full(2000, np.nan))
    (one, zero, none), factor = intervals.simultaneous([Estimate(1.0, values_R), same, unknown])
    assert factor == pytest.approx(1, abs=0.05) and one.high == pytest.approx(1 + 1.96 * factor, abs=0.2)
    assert zero == (0, 0, 0) and np.isnan(none.high)


def test_an_interval_of_replicates_may_be_infinite():
    assert intervals.of_replicates(5.0, [*range(1, 118), *[np.inf] * 4]) == (5.0, 4.0, np.inf)
