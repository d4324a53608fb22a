"""95% intervals of losses and of their differences between variants: over held-out documents, and over seeds.

Variants are scored on the same documents, and trained with the same seeds, which decide their initial weights and the
order of their data. So a difference is taken document by document and seed by seed, where most of what varies from one
document or seed to the next cancels.

Documents are resampled: the paired percentile bootstrap of Efron and Tibshirani (1993), "An Introduction to the
Bootstrap", chapters 10 and 13. Deviations of the replicates are widened by sqrt(D / (D - 1)), and their quantiles by
those of Student's t, because the percentile interval of D documents is too narrow otherwise (Hesterberg 2015, "What
teachers should know about the bootstrap", arXiv 1411.5279, section 5.3).

Three seeds are too few to be resampled. Their spread is the residual of a two-way analysis of variance of the losses,
with an effect for each variant and one for each seed. It is pooled over all variants of a table, which are taken to
vary equally, and enters as Student's t with its degrees of freedom.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # probability with which an interval holds the true value
REPLICATES = 2000  # of the bootstrap


class Interval(NamedTuple):
    """An estimate, and the interval around it. `low` and `high` are NaN where no interval is known."""

    value: float
    low: float
    high: float

    @property
    def finds(self) -> bool:
        """Whether the interval excludes 0, so that a difference is a finding."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Spread(NamedTuple):
    """How much a loss varies with the seed.

    deviation: standard deviation of one run's loss, beyond the effects of its variant and of its seed.
    freedom: its degrees of freedom; 0: there is one seed, so that no deviation is known.
    """

    deviation: float
    freedom: int


NO_SPREAD = Spread(math.nan, 0)


def spread_of_seeds(losses_VS: np.ndarray) -> Spread:
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
    return Spread(math.sqrt(np.square(losses_N - effects_NE @ found_E).sum() / freedom), freedom)


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
        return self._interval(sums_SD.mean(0), units_D, NO_SPREAD)

    def difference(
        self, a_SD: np.ndarray, b_SD: np.ndarray, units_D: np.ndarray, spread: Spread = NO_SPREAD
    ) -> Interval:
        """The mean of a less that of b, paired by document and seed.

        Args:
          a_SD, b_SD: as `sums_SD` of `mean`, with the same seeds in the same order.
          spread: of the losses in the same unit.
        Returns: the interval over documents and, if `spread` is known, over seeds.
        """
        # The difference of two means over S seeds varies with 2 / S of one run's variance.
        of_difference = spread._replace(deviation=spread.deviation * math.sqrt(2 / len(a_SD)))
        return self._interval((a_SD - b_SD).mean(0), units_D, of_difference)

    def _interval(self, sums_D, units_D, spread: Spread) -> Interval:
        """The interval of sums over units; `spread` is that of this quotient."""
        total = units_D.sum()
        if not total:
            return Interval(math.nan, math.nan, math.nan)
        value = float(sums_D.sum() / total)
        if self.number < 2:
            return Interval(value, math.nan, math.nan)
        drawn_R = self._counts_RD @ units_D
        some_R = drawn_R > 0  # a replicate may draw no unit of a rare group
        deviations_R = self._counts_RD[some_R] @ sums_D / drawn_R[some_R] - value
        deviations_R *= math.sqrt(self.number / (self.number - 1))
        if spread.freedom:
            rng = np.random.default_rng([self._rng_seed, 1])
            deviations_R += spread.deviation * rng.standard_t(spread.freedom, len(deviations_R))
        low, high = value + np.quantile(deviations_R, _tails(self.number - 1))
        return Interval(value, float(low), float(high))


@functools.cache
def _tails(freedom: int) -> tuple[float, float]:
    """The quantiles of a normal distribution at which Student's t has those of the level."""
    from scipy import stats  # which takes a second to import; jax requires SciPy

    tail = stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, freedom))
    return float(tail), float(1 - tail)


def of_replicates(value: float, replicates: Sequence[float]) -> Interval:
    """The percentile interval of replicates of an estimate, which may be infinite."""
    # Quantiles of numbers that may be infinite must not interpolate between them.
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(np.asarray(replicates), tails, method="nearest")
    return Interval(value, float(low), float(high))
