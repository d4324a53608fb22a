"""The choice of a peak learning rate from the runs of a sweep."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from memoryllm_jax.experiments.protocol import Sweep, rounded


class Choice(NamedTuple):
    """What the sweep of one setting says so far.

    Attributes:
      losses: {rate: held-out loss in nats a token, infinite if the run diverged}, in rising order of the rates.
      missing: rates to try next. The choice is made when there are none.
      rate: the best rate, or None while rates are missing or if all diverged.
      is_inside: whether rates on both sides of the best were tried.
    """

    losses: dict[float, float]
    missing: tuple[float, ...]
    rate: float | None
    is_inside: bool


def choose(sweep: Sweep, losses: Mapping[float, float]) -> Choice:
    """Chooses the best of the rates that were tried, or says which to try next.

    Args:
      losses: as of `Choice`, of the rates that were tried, in any order.
    """
    row = list(sweep.rates)
    while True:
        tried = {rate: losses[rate] for rate in row if rate in losses}
        missing = tuple(rate for rate in row if rate not in losses)
        if missing:
            return Choice(tried, missing, None, False)
        best = min(row, key=lambda rate: (tried[rate], rate))  # the lowest, if all diverged
        is_inside = row[0] < best < row[-1]
        if is_inside or len(row) >= sweep.most:
            return Choice(tried, (), best if math.isfinite(tried[best]) else None, is_inside)
        factor = row[1] / row[0]
        row = [rounded(row[0] / factor), *row] if best == row[0] else [*row, rounded(row[-1] * factor)]
