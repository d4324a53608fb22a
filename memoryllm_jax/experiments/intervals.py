"""95% intervals of losses and of their differences between variants: over held-out documents, and over seeds.

Variants are scored on the same documents, and trained with the same seeds, which decide their initial weights and the
order of their data. So a difference is taken document by document and seed by seed, where most of what varies from one
document or seed to the next cancels.

Documents are resampled: the paired percentile bootstrap of Efron and Tibshirani (1993), "An Introduction to the
Bootstrap", chapters 10 and 13. Deviations of the replicates are widened by sqrt(n / (n - 1)) and by the quotient of
the quantiles of Student's t and of the normal distribution, because the percentile interval of n documents is too
narrow otherwise (Hesterberg 2015, "What teachers should know about the bootstrap", arXiv 1411.5279, section 5.3).
n is the effective number of documents (`effective`), as a few long ones may hold most of the text.

Three seeds are too few to be resampled. Their spread is the residual of a two-way analysis of variance of the losses,
with an effect for each variant and one for each seed. All variants are taken to vary equally. The spread enters as
Student's t with its degrees of freedom.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # probability with which an interval holds the true value
REPLICATES = 2000  # of the bootstrap
FEWEST = 10  # effective number of documents below which no interval is given
_LEAST_FREEDOM = 3  # of a spread over seeds that is used: Student's t is 13 and 4 times as wide with 1 and 2


class Interval(NamedTuple):
    """An estimate, and the interval around it. `low` and `high` are NaN where no interval is known."""

    value: float
    low: float
    high: float

    @property
    def finds(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Estimate(NamedTuple):
    """An estimate with its replicates, drawn together with those of other estimates. NaN: no interval is known."""

    value: float
    replicates_R: np.ndarray

    @property
    def interval(self) -> Interval:
        if not np.isfinite(self.replicates_R).any():
            return Interval(self.value, math.nan, math.nan)
        low, high = np.nanquantile(self.replicates_R, _TAILS)
        return Interval(self.value, float(low), float(high))


class SeedSpread(NamedTuple):
    """How much a loss varies with the seed.

    deviation: standard deviation of one run's loss, beyond the effects of its variant and of its seed.
    freedom: its degrees of freedom; 0: there is one seed, so that no deviation is known.
    """

    deviation: float
    freedom: int

    def times(self, factor: float) -> "SeedSpread":
        return self._replace(deviation=self.deviation * factor)


NO_SPREAD = SeedSpread(math.nan, 0)
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def spread_of_seeds(losses_VS: np.ndarray) -> SeedSpread:
    """The spread of losses over seeds, pooled over variants.

    Args:
      losses_VS: losses of variants (rows) by seed (columns), NaN where there is no run.
    """
    variant, seed = np.nonzero(np.isfinite(losses_VS))
    losses_N = losses_VS[variant, seed]
    effects_NE = np.concatenate([np.eye(len(losses_VS))[variant], np.eye(losses_VS.shape[1])[seed]], axis=1)
    found_E, _, rank, _ = np.linalg.lstsq(effects_NE, losses_N, rcond=None)
    freedom = len(losses_N) - int(rank)
    if freedom < 1:
        return NO_SPREAD
    return SeedSpread(math.sqrt(np.square(losses_N - effects_NE @ found_E).sum() / freedom), freedom)


def shared_spread(own: SeedSpread, known: Sequence[SeedSpread]) -> SeedSpread:
    """The spread to use in a cell, from those of the cells that it may share one with.

    Args:
      own: of the cell.
      known: of the cells that have several seeds, the most similar cell last.
    Returns: the pooled spread, unless Bartlett's test finds the spreads unequal. Then it is the cell's own, or the last
      one for a cell of one seed. `NO_SPREAD` if too few runs have several seeds.
    """
    if sum(spread.freedom for spread in known) < _LEAST_FREEDOM:
        return NO_SPREAD
    variance_C = np.maximum(np.square([spread.deviation for spread in known]), np.finfo(float).tiny)
    freedom_C = np.array([spread.freedom for spread in known])
    freedom = int(freedom_C.sum())
    variance = float(freedom_C @ variance_C / freedom)
    if len(known) > 1 and _are_unequal(variance_C, freedom_C, variance):
        return own if own.freedom >= _LEAST_FREEDOM else known[-1]
    return SeedSpread(math.sqrt(variance), freedom)


def _are_unequal(variance_C, freedom_C, pooled: float) -> bool:
    """Bartlett's test of the equality of variances, at the level of the intervals."""
    from scipy import stats  # which takes a second to import; jax requires SciPy

    others = len(variance_C) - 1
    statistic = freedom_C.sum() * math.log(pooled) - freedom_C @ np.log(variance_C)
    correction = 1 + ((1 / freedom_C).sum() - 1 / freedom_C.sum()) / (3 * others)
    return bool(statistic / correction > stats.chi2.ppf(LEVEL, others))


def effective(units_D: np.ndarray) -> float:
    """The effective number of documents: as many of equal size would have a mean that varies equally (Kish 1965)."""
    return float(units_D.sum() ** 2 / max(np.square(units_D).sum(), np.finfo(float).tiny))


class Documents:
    """Resamples held-out documents, the same ones for everything that is compared.

    Args:
      number: of documents.
      seed: of the resampling.
    """

    def __init__(self, number: int, replicates: int = REPLICATES, seed: int = 0):
        self.number = number
        self._rng_seed = seed
        # How often each replicate draws each document
        counts_RD = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), replicates)
        self._counts_RD = counts_RD.astype(np.float64)

    def mean(self, sums_SD: np.ndarray, units_D: np.ndarray) -> Interval:
        """A mean over units, such as the loss in nats a token, averaged over seeds.

        Args:
          sums_SD: sums over each document's units, such as nats, by seed.
          units_D: number of units of each document, such as tokens.
        Returns: the interval over documents alone.
        """
        return self.estimate(sums_SD, units_D).interval

    def difference(
        self, a_SD: np.ndarray, b_SD: np.ndarray, units_D: np.ndarray, spread: SeedSpread = NO_SPREAD
    ) -> Interval:
        """The mean of a less that of b, paired by document and seed.

        Args:
          a_SD, b_SD: as `sums_SD` of `mean`, with the same seeds in the same order.
          spread: of one run's loss, in the same unit.
        Returns: the interval over documents and, if `spread` is known, over seeds.
        """
        return self.estimate(a_SD - b_SD, units_D, spread.times(math.sqrt(2))).interval

    def estimate(
        self, sums_SD: np.ndarray, units_D: np.ndarray, spread: SeedSpread = NO_SPREAD, draw: int = 0
    ) -> Estimate:
        """A mean over units, averaged over seeds, with its replicates over documents and, if known, over seeds.

        Args:
          sums_SD, units_D: as of `mean`.
          spread: of the mean of one seed.
          draw: number of the draw of seeds. Means whose seeds vary independently have different ones; documents are
            the same in all.
        """
        sums_D, total, counts_RD = sums_SD.mean(0), units_D.sum(), self._counts_RD
        if not total:
            return Estimate(math.nan, np.full(len(counts_RD), math.nan))
        value = float(sums_D.sum() / total)
        number = effective(units_D)
        if number < FEWEST:
            return Estimate(value, np.full(len(counts_RD), math.nan))
        drawn_R = counts_RD @ units_D
        drawn_R[drawn_R == 0] = math.nan  # a replicate may draw no unit of a rare group
        deviations_R = (counts_RD @ sums_D / drawn_R - value) * math.sqrt(number / (number - 1)) * _widening(number - 1)
        if spread.freedom:
            # One draw of the unknown deviation serves all means that share the spread.
            chi2_R = np.random.default_rng([self._rng_seed, 1]).chisquare(spread.freedom, len(deviations_R))
            normal_R = np.random.default_rng([self._rng_seed, 2, draw]).normal(size=len(deviations_R))
            deviation = spread.deviation / math.sqrt(len(sums_SD))
            deviations_R += deviation * normal_R * np.sqrt(spread.freedom / chi2_R)
        return Estimate(value, value + deviations_R)


@functools.cache
def _widening(freedom: float) -> float:
    """The half width of the interval of Student's t as a multiple of that of the normal distribution."""
    from scipy import stats

    return float(stats.t.ppf(_TAILS[1], freedom) / stats.norm.ppf(_TAILS[1]))


def simultaneous(estimates: Sequence[Estimate]) -> tuple[list[Interval], float]:
    """Intervals that hold all true values at once with the probability LEVEL.

    All are widened by one factor, such that LEVEL of the replicates lie in all of them: the single-step max-t method
    (Westfall and Young 1993, "Resampling-Based Multiple Testing", section 2.3).

    Args:
      estimates: with replicates that were drawn together.
    Returns: the intervals, symmetric about the estimates, and the factor.
    """
    alone = [estimate.interval for estimate in estimates]
    half_E = [(interval.high - interval.low) / 2 for interval in alone]
    ratios_ER = [
        np.abs(estimate.replicates_R - estimate.value) / half
        for estimate, half in zip(estimates, half_E)
        if half > 0  # neither unknown nor of two equal losses
    ]
    factor = max(1.0, float(np.quantile(np.max(ratios_ER, axis=0), LEVEL))) if ratios_ER else 1.0
    widened = [
        Interval(interval.value, interval.value - factor * half, interval.value + factor * half)
        for interval, half in zip(alone, half_E)
    ]
    return widened, factor


def of_replicates(value: float, replicates: Sequence[float]) -> Interval:
    """The percentile interval of replicates of an estimate, which may be infinite."""
    # Quantiles of numbers that may be infinite must not interpolate between them.
    low, high = np.quantile(np.asarray(replicates), _TAILS, method="nearest")
    return Interval(value, float(low), float(high))
